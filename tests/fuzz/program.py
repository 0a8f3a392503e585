"""A program: Python text of a module, what it is given, and what it returns."""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

HEADER = """\
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.fuzz.pieces import MLP, Attention, Gated, Running, Scaled, Twice
"""
NAME = re.compile(r"\b(?:v\d+|t\d+|x|y|ids|state)\b")


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """float64 is the dtype of what names none: programs are compared in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Statement:
    """A few lines of forward, and of ``__init__``."""

    text: str
    init: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The values that it reads or makes, in the order of the text."""
        return tuple(dict.fromkeys(NAME.findall(self.text)))

    @property
    def makes(self) -> set[str]:
        """The values that it makes."""
        return set(re.findall(r"^\s*([vt]\d+) = ", self.text, re.MULTILINE))


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: seed and index.
        inputs: argument -> the expression that makes it.
        statements: what forward does.
        returned: what it returns: names, and how they are put together.
        training: the mode of the first call.
        gain: whether the attributes that ``Scaled`` reads are changed before the second call.
    """

    name: str
    inputs: dict[str, str]
    statements: tuple[Statement, ...]
    returned: tuple[str, ...]
    form: str = "tuple"
    training: bool = True
    gain: bool = False

    def source(self) -> str:
        """A module of Python text: the class ``Net``, and ``inputs()``."""
        init = "\n".join(s.init for s in self.statements if s.init) or "pass"
        body = "\n".join(s.text for s in self.statements)
        given = ", ".join(f"{name!r}: {text}" for name, text in self.inputs.items())
        return (
            f"{HEADER}\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{textwrap.indent(init, ' ' * 8)}\n\n    def forward(self, {', '.join(self.inputs)}):\n"
            f"{textwrap.indent(body, ' ' * 8)}\n        return {self._result()}\n\n\n"
            f"def inputs():\n    return {{{given}}}\n"
        )

    def _result(self) -> str:
        names = ", ".join(self.returned)
        if self.form == "dict":
            return "{" + ", ".join(f"{name!r}: {name}" for name in self.returned) + "}"
        if self.form == "list":
            return f"[{names}]"
        return self.returned[0] if self.form == "one" and len(self.returned) == 1 else f"({names},)"

    def load(self) -> Any:
        """The text as a module, whose lines tracebacks can show."""
        source, name = self.source(), f"tests.fuzz.made_{self.name.replace('-', '_')}"
        made: Any = types.ModuleType(name)
        made.__file__ = f"<{self.name}>"
        linecache.cache[made.__file__] = (len(source), None, source.splitlines(True), made.__file__)
        sys.modules[name] = made
        exec(compile(source, made.__file__, "exec"), made.__dict__)
        return made

    def without(self, index: int) -> Program | None:
        """The program without a statement and all that depends on it; None where nothing would be left."""
        gone, kept = set[str](), []
        for i, statement in enumerate(self.statements):
            if i == index or gone & {*statement.names}:
                gone |= statement.makes
            else:
                kept.append(statement)
        returned = tuple(name for name in self.returned if name not in gone)
        returned = returned or tuple(sorted(kept[-1].makes))[-1:] if kept else ()
        return replace(self, statements=tuple(kept), returned=returned) if returned else None
