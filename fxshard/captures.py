"""The captures of a program: which of them serves a call, and how another one is made.

A call is first looked up as a whole: one like an earlier one is served by what served that. Else every capture is held
against the state of the model and what surrounds the call (``capture.serves``), and then against the inputs
(``capture.calls``). Where none fits, another one is made, unless the program was given example inputs, and other ones
than those fit the same state: they are an error.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshard.cache import cached
from fxshard.capture.calls import canonical_call
from fxshard.capture.capture import LOCK, capture, number_constants
from fxshard.capture.captured import Captured, Excluded
from fxshard.capture.constants import check_constants, declared
from fxshard.capture.fidelity import check_fidelity
from fxshard.capture.known_calls import KnownCalls, describe
from fxshard.capture.queries import outside_inference_mode
from fxshard.capture.reads import Guard, check_kept, check_unread
from fxshard.capture.serves import Changes, Conditions, Surroundings, surroundings
from fxshard.capture.tensors import Kinds, check_own_memory, check_same, kinds_of
from fxshard.capture.trees import flatten
from fxshard.capture.writes import LOST, check_lost
from fxshard.errors import CaptureError, InputError, SoundnessError
from fxshard.inspect.fallbacks import fallbacks_of
from fxshard.inspect.report import notes_of
from fxshard.parts import Parts
from fxshard.passes.annotate import placements
from fxshard.passes.pipeline import Compiled, Options, compile_graph
from fxshard.placement import Placements
from fxshard.plan.plan import Plan
from fxshard.ranks.devices import target_device
from fxshard.runtime.autocast import ambient
from fxshard.runtime.draws import extent
from fxshard.runtime.module import joined
from fxshard.torch_internals import SEES_EVERY_APPLY

logger = logging.getLogger("fxshard")

LIMIT = 8
"""How many captures of one call there may be, for values of the model's attributes that change."""


MOST = 40
"""How long a constant input may be to be shown."""


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
        asked: the plan that the user gave.
        changes: what the program has otherwise than the model.
        fixed: whether the program was given example inputs: other inputs are an error then.
        all: in the order in which they were made.
    """

    def __init__(
        self, asked: Plan, parts: Parts, options: Options, dynamic_shapes: Any = None, cache: Path | None = None
    ) -> None:
        self.asked, self.options = asked, options
        self.changes = Changes()
        self.fixed = False
        self.all: list[Held] = []
        self._parts, self._dynamic_shapes, self._cache = parts, dynamic_shapes, cache
        self._signature = inspect.signature(parts.original.get().forward)
        check_constants(options.constants, self._signature)
        self._known: KnownCalls[Held] = KnownCalls()
        self._kinds: Kinds = {}
        self._lock = threading.RLock()

    def copied(self, parts: Parts) -> Captures:
        """The same captures, for parts of their own."""
        made = Captures(self.asked, parts, self.options, self._dynamic_shapes, self._cache)
        made.changes.attributes = dict(self.changes.attributes)
        made.changes.modes = dict(self.changes.modes)
        made.fixed, made.all, made._kinds = self.fixed, list(self.all), self._kinds
        return made

    @property
    def compiled(self) -> list[Compiled]:
        """All, without what they hold for."""
        return [held.compiled for held in self.all]

    # --- which one serves a call -----------------------------------------------------------------------------------

    def serving(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: Callable[[Compiled], None]
    ) -> tuple[Compiled, list[Any]]:
        """The capture that serves a call, made where there is none yet, and the call's leaves.

        Args:
            args: of the call.
            kwargs: likewise, by name.
            first: is told of the first capture.

        Raises:
            InputError: when the inputs do not fit what was captured with example inputs.
            CaptureError: when the model cannot be captured, or its attributes change from call to call.
        """
        if self.options.constants:
            args, kwargs = declared(self.options.constants, self._signature, args, kwargs)
        model = self._parts.original.get()
        found = self._look_up(args, kwargs, model)
        if found is None:
            with self._lock, LOCK, outside_inference_mode(), self.changes.on(model):
                found = self._find(args, kwargs, model, first)
        return found[0].compiled, found[1]

    def _look_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module) -> tuple[Held, Any] | None:
        """What served a call like this one, and its leaves; None where none did, or something has changed."""
        key = self._key(args, kwargs)
        known = self._known.find(key, args, kwargs) if key is not None else None
        if known is None:
            return None
        conditions = known[0].conditions
        fits = conditions.still_hold() and conditions.are_needed(model, self.changes, known[1])
        return known if fits and conditions.lie_alike(known[1]) else None

    def _find(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module, first: Callable[[Compiled], None]
    ) -> tuple[Held, list[Any]]:
        held, leaves = self._fitting(args, kwargs, model, first)
        key = self._key(args, kwargs)
        if key is not None:
            self._known.add(key, args, kwargs, held, held.compiled.captured)
        return held, leaves

    def _fitting(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module, first: Callable[[Compiled], None]
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
        held = self._make(model, args, kwargs, exact, first)
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

    # --- making one ------------------------------------------------------------------------------------------------

    def _make(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        exact: bool,
        first: Callable[[Compiled], None],
    ) -> Held:
        """Captures and compiles the model, on which the changes are; ``exact``: for the very sizes of the inputs."""
        parts, tensors = self._parts, self._parts.tensors()
        if not self.all:
            check_own_memory(tensors)
            self._kinds = kinds_of(tensors)
        check_same(kinds_of(tensors), self._kinds)
        device = target_device(()) if parts.device.type == "meta" else parts.device
        is_there = all(t.device.type == device.type for _, t in tensors)
        has_values = parts.original.has_values and (is_there or not ambient())
        with_grad = torch.is_grad_enabled()
        guards: tuple[Guard, ...] = ()

        def check(made: Captured, stored: bool) -> bool:
            nonlocal guards
            guards = made.reads.guards(model, self.changes.attributes.keys())
            check_kept(guards)
            backward = stored or with_grad or not SEES_EVERY_APPLY  # whose gradients would be others
            fits = has_values and check_fidelity(model, made, args, kwargs, backward)
            check_unread(guards)
            return fits

        shapes = None if exact else self._dynamic_shapes
        kept = self._cache if shapes is None else None
        make = partial(capture, model, args, kwargs, dynamic_shapes=shapes, device=device)
        captured, seconds = cached(kept, model, args, kwargs, device, make, check)
        compiled = self._compile(captured, model, seconds)
        leaves = captured.flatten_inputs(args, kwargs)
        held = Held(compiled, Conditions.of(captured, model, self.changes, leaves, guards), exact)
        self.all.append(held)
        self._known.clear()
        if len(self.all) == 1:
            first(compiled)
        parts.original.empty([captured.root, compiled.root])
        _warn(compiled)
        return held

    def _compile(self, captured: Captured, model: nn.Module, seconds: float) -> Compiled:
        """As the plan asks; after the first capture the weights lie as they lie."""
        placements, plan = self._parts.placements, self.asked
        if not self.all:
            return compile_graph(captured, plan, model, seconds, self.options)
        number_constants(captured, len(self.all), placements)  # a rank's module holds those of all captures
        every = {name: dict(zip(plan.mesh.names, placed, strict=True)) for name, placed in placements.items()}
        compiled = compile_graph(captured, replace(plan, params=every), model, seconds, self.options, settled=True)
        placed = weights_lie(compiled, placements)
        if placed != placements:
            wrong = next(name for name, each in placed.items() if each != placements[name])
            raise SoundnessError(
                f"a later capture reads {wrong!r} as {placed[wrong]}, but it lies as {placements[wrong]}",
                fix="this is a bug of fxshard: please report the model and the plan",
            )
        for before in self.compiled:
            check_lost(before.captured.written, captured.reads)
        return compiled


def weights_lie(compiled: Compiled, names: Iterable[str]) -> dict[str, Placements]:
    """How a capture takes each of these parameters and buffers to lie."""
    read = {str(n.target): each for n, each in compiled.resolved.nodes.items() if n.op == "get_attr"}
    aliases, params = compiled.captured.aliases, compiled.resolved.plan.params
    out = {}
    for name in names:
        asked: Any = read.get(aliases.get(name, name))
        asked = params.get(name) if asked is None else asked
        out[name] = placements(asked or {}, compiled.mesh)
    return out


def _warn(compiled: Compiled) -> None:
    """Says what of the plan could not be done, what is lost, and what gathers."""
    for note in notes_of(compiled):
        logger.warning(note)
    lost = [joined(each.module, str(each.steps[0])) for each in compiled.captured.written if each.value is LOST]
    if lost:
        others = f", and to {len(lost) - 1} more" if len(lost) > 1 else ""
        logger.warning(f"what forward assigns to {lost[0]} is lost{others}")
    for fallback in fallbacks_of(compiled):
        logger.warning(str(fallback))


def title_of(held: Held) -> str:
    """For what calls a capture was made, in short: ``train, x: float32[2, 4]``."""
    captured, around = held.compiled.captured, held.conditions.surroundings
    words = ["train" if captured.training else "eval"]
    words += [around.gradients] if around.gradients != "grad" else []
    words += [f"autocast {device} {str(dtype).removeprefix('torch.')}" for device, dtype in captured.autocast]
    words += [str(leaf) for leaf in captured.example_inputs if leaf.shape is not None]
    constants = (f"{captured.example_inputs[i].path}={value!r}" for i, value in captured.constants.items())
    return ", ".join([*words, *(text for text in constants if len(text) < MOST)])


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
