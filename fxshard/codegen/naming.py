"""Names for values: those of the user's own source where it names them, else those of the operators."""

from __future__ import annotations

import builtins
import functools
import keyword
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxshard.ir.conversions import PASSED_ON
from fxshard.passes.fold import PREFIX
from fxshard.torch_internals import OpOverload

_TORCH_DIR = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n *(.*)')
_TARGET = re.compile(r"([A-Za-z]\w*(?:, [A-Za-z_]\w*)*)(?:: [\w.\[\], |]+)? = ", re.ASCII)

OPERATOR_NAMES = {
    "scaled_dot_product_attention": "attention",
    "masked_fill": "masked",
    "native_layer_norm": "normed",
    "layer_norm": "normed",
    "slice": "part",
    "pow": "power",
    "sum": "total",
    "_to_copy": "copy",
    "sym_size": "size",
    "getitem": "item",
    "floordiv": "quotient",
    "logical_or": "either",
    "logical_and": "both",
    "vary_linears": "linears",
    "gather_linears": "linears",
    "linear_all_reduce": "linear",
    "linear_reduce_scatter": "linear",
}
"""What a result is called, where the operator's own name says little or is a name of Python's."""

RESERVED = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) | frozenset(dir(builtins))


@functools.lru_cache(maxsize=65536)
def source_line(trace: str) -> tuple[str, str, tuple[str, ...]]:
    r"""Reads a stack trace: where the innermost line of the user is, that line, and the names that it assigns.

    A line that only returns passes its value on: the names are then those of the line that called.

    >>> source_line('File "/x/mlp.py", line 6, in forward\n  y = self.up(x)\n')
    ('mlp.py:6', 'y = self.up(x)', ('y',))
    """
    frames = [f for f in _FRAME.findall(trace) if not f[0].startswith((_TORCH_DIR, "<"))]
    if not frames:
        return "", "", ()
    file, line, function, code = frames[-1]
    where = f"{file.rsplit('/', 1)[-1]}:{line}" + (f" in {function}" if function != "forward" else "")
    for *_, text in reversed(frames):
        if not text.startswith("return "):
            found = _TARGET.match(text)
            names = found[1].split(", ") if found else []
            return where, code, tuple(names)
    return where, code, ()


def trace_of(node: fx.Node) -> str:
    """The stack trace of a node; ``""`` where there is none."""
    return node.meta.get("stack_trace") or ""


def identifier(text: str) -> str:
    """``text`` as a part of a Python name."""
    text = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    return text if text and not text[0].isdigit() else f"x{text}"


@functools.lru_cache(maxsize=4096)
def operator_name(target: Any) -> str:
    """What the result of an operator is called where the user gave it no name."""
    if isinstance(target, OpOverload):
        name = target._schema.name.split("::")[1]
    else:
        name = str(getattr(target, "__name__", None) or getattr(target, "_name", None) or "value")
    return OPERATOR_NAMES.get(name) or identifier(name)


def user_names(node: fx.Node) -> tuple[str, ...]:
    """The names that the user's line assigns; none for a value that the compiler made."""
    trace = node.meta.get("stack_trace")
    return source_line(trace)[2] if trace else ()


def hint(node: fx.Node) -> str:
    """What a value is called outside of the line that makes it: the user's name for it, if there is one."""
    if node.op == "placeholder":
        return identifier(str(node.target))
    if node.op == "get_attr":
        names = user_names(node) if str(node.target).startswith(PREFIX) else ()
        return names[0] if len(names) == 1 else identifier("_".join(str(node.target).split(".")[-2:]))
    if node.target in PASSED_ON and isinstance(node.args[0], fx.Node):
        return hint(node.args[0])
    names = user_names(node)
    if len(names) == 1:
        return names[0]
    index = node.args[1] if len(node.args) == 2 else None
    if operator_name(node.target) == "item" and isinstance(index, int) and index < len(names) and names[index] != "_":
        return names[index]
    return operator_name(node.target)


class Scope:
    """The names of one function's values: of nodes, and of the modules that its loops run over.

    A name is free again once its value is dead.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.reserved = reserved
        self.names: dict[object, str] = {}
        self.last_use: dict[object, int] = {}
        self._held: dict[str, object] = {}

    def read(self, value: object, at: int) -> None:
        """Notes that statement number ``at`` reads ``value``."""
        self.last_use[value] = at

    def is_free(self, name: str, at: int) -> bool:
        """Whether statement ``at`` may give ``name`` to its result."""
        if name in self.reserved or name in RESERVED:
            return False
        held = self._held.get(name)
        return held is None or self.last_use.get(held, -1) <= at

    def name(self, value: object, wishes: Iterable[str], at: int) -> str:
        """Names the result of statement ``at``: by the first wish that is free, else by the last one and a number."""
        last = "x"
        for wish in wishes:
            last = wish
            if self.is_free(wish, at):
                return self._take(value, wish)
        if last in self.reserved or last in RESERVED:
            last += "_"
        name, count = last, 1
        while not self.is_free(name, at):
            count += 1
            name = f"{last}_{count}"
        return self._take(value, name)

    def holds(self, value: object) -> bool:
        """Whether ``value`` still has its name to itself."""
        return self._held.get(self.names.get(value, "")) is value

    def _take(self, value: object, name: str) -> str:
        self._held[name] = value
        self.names[value] = name
        return name
