"""Where this rank is: in which call of a program, and in which collective of it.

Keeping it costs a few assignments a collective. It becomes text only when somebody asks.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import Any

import torch

STARTING, COMPARING, RUNNING = "starting", "comparing", "running"
"""A call's phases: before the ranks compared what they run, while they do, and from then on until the next call."""

SHORT = (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c"), ("bool", "b8"))


def type_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """A type as people write it.

    >>> type_text(torch.bfloat16, (4, 8)), type_text(torch.int64, ())
    ('bf16[4, 8]', 'i64[]')
    """
    name = str(dtype).removeprefix("torch.")
    for long, short in SHORT:
        if name.startswith(long):
            name = short + name.removeprefix(long)
            break
    return f"{name}[{', '.join(map(str, shape))}]"


class Position:
    """A rank's place in its program.

    Attributes:
        call: how many calls of programs this process has begun.
        phase: of the present call.
        number: how many collectives it has begun since that call.
        inside: whether it is in the last of them now.
        name: the last one's kind.
        axis: its mesh axis.
        shape: what this rank brought.
        dtype: likewise.
    """

    __slots__ = ("axis", "call", "dtype", "inside", "name", "number", "phase", "shape")

    def __init__(self) -> None:
        self.call = self.number = 0
        self.phase = RUNNING
        self.inside = False
        self.name = self.axis = ""
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32

    def begin(self) -> None:
        """A call of a program begins."""
        self.call += 1
        self.number, self.phase, self.inside = 0, STARTING, False

    def enter(self, name: str, axis: str, x: torch.Tensor) -> None:
        """A collective begins."""
        self.number += 1
        self.name, self.axis, self.shape, self.dtype, self.inside = name, axis, x.shape, x.dtype, True

    def text(self) -> str:
        """The last collective.

        >>> here = Position()
        >>> here.begin()
        >>> here.enter("all_reduce", "tp", torch.ones(4, 8))
        >>> here.text()
        'all_reduce 1 of call 1 over tp, f32[4, 8]'
        """
        if not self.number:
            return f"call {self.call}, before its first collective"
        over = f" over {self.axis}" if self.axis else " over all ranks"
        return f"{self.name} {self.number} of call {self.call}{over}, {type_text(self.dtype, self.shape)}"

    def state(self) -> dict[str, Any]:
        """All of it, for other ranks, with the line that the main thread runs."""
        out = {key: getattr(self, key) for key in ("call", "number", "phase", "inside")}
        return {**out, "text": self.text(), "line": line_of_main_thread()}


POSITION = Position()
"""This process's."""


def line_of_main_thread() -> str:
    """What the main thread runs: the innermost line that is the user's own."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    mine = [f for f in stack if not f.filename.startswith(LIBRARIES) and "site-packages" not in f.filename]
    found = (mine or stack)[-1:]
    return "".join(f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in found)


LIBRARIES = (
    "<",
    os.path.dirname(os.__file__),
    os.path.dirname(torch.__file__),
    os.path.dirname(os.path.dirname(__file__)),
)
"""Where lines stand that are not the user's."""
