"""Where a node comes from: the user's module and line, as export noted them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxshard.torch_internals import OpOverload

__all__ = [
    "BRANCH",
    "CHECKPOINT",
    "SOURCE_META",
    "TORCH_DIR",
    "branch_of",
    "checkpoint_of",
    "clean_path",
    "module_of",
    "source_meta",
    "source_of",
    "way_of",
    "where",
]

TORCH_DIR = str(Path(torch.__file__).parent)

SOURCE_META = ("nn_module_stack", "stack_trace", "custom")
"""What export notes of where a node comes from; ``custom`` is read by ``mark_recomputed`` last."""

CHECKPOINT = "@checkpoint"
"""Stands in the key of a stack's entry for a call that is computed anew in the backward pass: see ``recompute.py``."""

BRANCH = "@branch"
"""Stands in the key of a stack's entry for what is computed on one way of a branch: see ``branches.py``."""


# What an entry is, its last word says: it may stand inside of another one.
_WAY = re.compile(rf"{BRANCH}(\d+):(True|False)$")
_CHECKPOINT = re.compile(rf"{CHECKPOINT}\d*:([^@]*)$")


def way_of(key: str) -> tuple[int, bool] | None:
    """The branch of a stack's entry, and whether it is the way of True; None for another entry.

    >>> way_of("L__self___layers_0@branch3:True"), way_of("L__self___layers_0")
    ((3, True), None)
    """
    found = _WAY.search(key)
    return None if found is None else (int(found[1]), found[2] == "True")


def branch_of(node: fx.Node) -> tuple[int, bool] | None:
    """The way on which a node is computed, if it is on one."""
    stack = node.meta.get("nn_module_stack") or ()
    return next((way for way in map(way_of, stack) if way is not None), None)


def checkpoint_of(key: str) -> str | None:
    """The name of the function that a stack's entry checkpoints, ``""`` for the module's own; None for another entry.

    >>> checkpoint_of("L__self___layers_0@checkpoint3:inner"), checkpoint_of("L__self___layers_0")
    ('inner', None)
    >>> checkpoint_of("layer@checkpoint3:inner@branch0:True"), way_of("layer@checkpoint3:inner@branch0:True")
    (None, (0, True))
    """
    found = _CHECKPOINT.search(key)
    return None if found is None else found[1]


def source_meta(node: fx.Node) -> dict[str, Any]:
    """What is noted of the module and the line that a node comes from."""
    return {key: node.meta[key] for key in SOURCE_META[:2] if key in node.meta}


def module_of(node: fx.Node) -> str:
    """Return the dotted path of the module that ``node`` comes from; ``""`` for the root or where it is unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(next(reversed(stack.values()))[0])


def source_of(node: fx.Node) -> str:
    """Return the user's line that ``node`` comes from, e.g. ``model.py:6 in forward``; ``""`` where it is unknown."""
    trace = node.meta.get("stack_trace")
    return _innermost_line(trace) if trace else ""


@functools.lru_cache(maxsize=65536)
def where(node: fx.Node) -> dict[str, str]:
    """Where an error about a node happened, as ``FxshardError`` takes it."""
    op = node.target if isinstance(node.target, OpOverload) else getattr(node.target, "__name__", node.target)
    return {"op": str(op), "module": module_of(node), "source": source_of(node)}


def clean_path(path: str) -> str:
    """Return the dotted path of a module as the user writes it.

    >>> clean_path("L['self'].layers._modules['0'].mlp@1")
    'layers.0.mlp'
    """
    path = re.sub(r"^L\['self'\]\.?|^L__self__[._]?|@\d+", "", path)
    return re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]", lambda m: f".{m[1] or m[2]}", path).strip(".")


@functools.lru_cache(maxsize=65536)
def _innermost_line(trace: str) -> str:
    best = ""
    for file, line, function in re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace):
        if not file.startswith(TORCH_DIR) and not file.startswith("<"):
            best = f"{file.rsplit('/', 1)[-1]}:{line} in {function}"
    return best
