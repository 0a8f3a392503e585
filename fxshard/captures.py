"""The captures of a program, and which of them serves a call.

A call is first looked up as a whole: one like an earlier one is served by what served that. Else every capture is held
against the state of the model and what surrounds the call (``capture.serves``), and then against the inputs
(``capture.calls``). Where none fits, another one is made, unless the program was given example inputs, and other ones
than those fit the same state: they are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxshard.capture.calls import canonical_call
from fxshard.capture.captured import Excluded
from fxshard.capture.known_calls import KnownCalls, describe
from fxshard.capture.serves import Changes, Conditions, Surroundings, surroundings
from fxshard.capture.trees import flatten
from fxshard.errors import CaptureError, InputError
from fxshard.passes.pipeline import Compiled
from fxshard.runtime.draws import extent

logger = logging.getLogger("fxshard")

LIMIT = 8
"""How many captures of one call there may be, for values of the model's attributes that change."""


@dataclass(frozen=True)
class Held:
    """A capture, and what it holds for.

    Attributes:
        compiled: the capture, compiled.
        conditions: beside the inputs.
        exact: whether it is of the very sizes of its inputs, in a program that was given dynamic ones.
    """

    compiled: Compiled
    conditions: Conditions
    exact: bool


class Captures:
    """All captures of a program.

    Attributes:
        changes: what the program has otherwise than the model.
        fixed: whether the program was given example inputs: other inputs are an error then.
        all: in the order in which they were made.
    """

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.fixed = False
        self.all: list[Held] = []
        self._known: KnownCalls[Held] = KnownCalls()

    def add(self, held: Held) -> None:
        """Takes one more."""
        self.all.append(held)
        self._known.clear()

    def look_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module) -> tuple[Held, Any] | None:
        """What served a call like this one, and its leaves; None where none did, or something has changed."""
        key = self._key(args, kwargs)
        known = self._known.find(key, args, kwargs) if key is not None else None
        if known is None:
            return None
        conditions = known[0].conditions
        fits = conditions.still_hold() and conditions.are_needed(model, self.changes, known[1])
        return known if fits and conditions.lie_alike(known[1]) else None

    def find(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        model: nn.Module,
        make: Callable[[bool], Held],
    ) -> tuple[Held, list[Any]]:
        """What serves a call, and its leaves.

        Args:
            args: of the call.
            kwargs: likewise, by name.
            model: as the program has it: the changes are on it.
            make: makes a capture of this call, and adds it; of its very sizes, if it is told so.

        Raises:
            InputError: when the inputs do not fit what was captured with example inputs.
            CaptureError: when the model's attributes change from call to call.
        """
        held, leaves = self._fitting(args, kwargs, model, make)
        key = self._key(args, kwargs)
        if key is not None:
            self._known.add(key, args, kwargs, held, held.compiled.captured)
        return held, leaves

    def _fitting(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module, make: Callable[[bool], Held]
    ) -> tuple[Held, list[Any]]:
        candidates = [held for held in self.all if held.conditions.hold(model, self.changes)]
        problem: InputError | None = None
        exact = False
        for held in reversed(candidates):
            try:
                leaves = held.compiled.captured.flatten_inputs(args, kwargs)
            except InputError as error:
                if problem is None or not held.exact:
                    problem = error
                exact = exact or isinstance(error, Excluded)
                continue
            if not held.conditions.are_needed(model, self.changes, leaves):
                continue
            if not held.conditions.lie_alike(leaves):
                exact = True
                continue
            if held.compiled.fits(leaves):
                return held, leaves
            exact = True
        if self.fixed and problem is not None and not exact:
            raise problem
        if exact:
            logger.info(
                "sizes that the captures exclude are captured for themselves: %s", problem or "uneven parts, or memory"
            )
        elif self.all and not candidates:
            self._tell_why(args, kwargs)
        held = make(exact)
        return held, held.compiled.captured.flatten_inputs(args, kwargs)

    def _tell_why(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Says which attributes have changed since calls like this one were captured.

        Raises:
            CaptureError: when they changed too often.
        """
        broken: list[str] = []
        count = 0
        for held in self.all:
            captured = held.compiled.captured
            lines = held.conditions.broken() or _otherwise(held.conditions.attributes, self.changes.attributes)
            same_tree = flatten(canonical_call(captured.signature, args, kwargs))[1] == captured.in_spec
            if lines and same_tree:
                broken, count = lines, count + 1
        if count >= LIMIT:
            raise CaptureError(
                f"the model was captured {count} times for values of its attributes that change: {broken[0]}",
                fix="give what changes from call to call as an input (a tensor), or keep it in a buffer of no dims",
            )
        if broken:
            logger.info("the model is captured anew: %s", "; ".join(broken[:3]))

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
        state: tuple[int, Surroundings] = self.changes.version, surroundings()
        return describe(args, kwargs, state)


def check_apart(compiled: Compiled, leaves: list[Any]) -> None:
    """Raises where an input that the model writes to shares memory with another one, which would not change with it.

    Raises:
        InputError: then.
    """
    infos = compiled.captured.example_inputs
    for index in compiled.overwritten_inputs:
        start, end = _span(leaves[index])
        for other, leaf in enumerate(leaves):
            if other != index and isinstance(leaf, torch.Tensor):
                low, high = _span(leaf)
                if low < end and start < high:
                    raise InputError(
                        f"the model writes to {infos[index].path}, which shares memory with {infos[other].path}",
                        fix="give the program tensors of their own: x.clone()",
                    )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """From where to where in memory a tensor reaches."""
    if not tensor.numel() or tensor.is_meta or tensor.layout != torch.strided:
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _otherwise(then: Mapping[tuple[str, str], Any], now: Mapping[tuple[str, str], Any]) -> list[str]:
    return [
        f"{'.'.join(filter(None, key))} was {then.get(key)!r}, and is {now.get(key)!r}"
        for key in {**then, **now}
        if then.get(key) is not now.get(key)
    ]
