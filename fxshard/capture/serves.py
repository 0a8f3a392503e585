"""Which calls a capture serves, beside what is given to them: those in the same state.

A model computes by its inputs (``calls.py`` holds those against a capture) and by

    each module's mode              train() and eval(), of all or of some
    attributes                      of its modules and what they hold, globals that its code names (``reads.py``)
    autocast, the default dtype     which surround the call
    whether gradients are enabled   where its code asks
    what requires a gradient        where its code asks
    how inputs lie in memory        where its code asks, or random numbers fill tensors that lie as they do

``Conditions`` are all of that as a capture found it. ``Changes`` are what the program has otherwise than the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxshard.capture.captured import Captured
from fxshard.capture.held_values import same
from fxshard.capture.queries import in_inference_mode
from fxshard.capture.reads import Guard
from fxshard.capture.writes import Written
from fxshard.errors import CaptureError
from fxshard.ir.root import Root
from fxshard.rules.lookup import draws
from fxshard.runtime.autocast import State, ambient
from fxshard.runtime.draws import order_of

__all__ = ["Changes", "Conditions", "Surroundings", "surroundings"]

_MISSING = object()


class Surroundings(NamedTuple):
    """What surrounds a call.

    Attributes:
        autocast: the devices on which it is enabled.
        dtype: of tensors that are made without one.
        deterministic: whether only deterministic algorithms may run.
        gradients: ``grad``, ``no_grad``, or ``inference``.
    """

    autocast: State
    dtype: torch.dtype
    deterministic: bool
    gradients: str


def surroundings() -> Surroundings:
    """What surrounds this place.

    >>> surroundings()
    Surroundings(autocast=(), dtype=torch.float32, deterministic=False, gradients='grad')
    """
    return Surroundings(
        ambient(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        "inference" if in_inference_mode() else "grad" if torch.is_grad_enabled() else "no_grad",
    )


@dataclass
class Changes:
    """In what a program differs from the model that it was made of: modes, and plain attributes.

    Attributes:
        modes: a module's name -> its mode; of modules that are not named, the model's own.
        attributes: a module's name, and the attribute's -> its value.
        parameters: the program's own, which tell what requires a gradient; empty while it has none.
        version: counts the changes.
    """

    modes: dict[str, bool] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    version: int = 0

    def set_mode(self, module: str, training: bool) -> None:
        """Gives a module a mode."""
        if self.modes.get(module) is not training:
            self.modes[module] = training
            self.version += 1

    def set_attribute(self, module: str, name: str, value: Any) -> None:
        """Gives a module an attribute."""
        key = module, name
        if key not in self.attributes or not same(self.attributes[key], value):
            self.attributes[key] = value
            self.version += 1

    def write(self, written: Written) -> None:
        """Notes what forward assigned to an attribute of a module; what it assigned to objects, these know."""
        if len(written.steps) == 1:
            self.set_attribute(written.module, written.steps[0], copy.deepcopy(written.value))

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The model as the program has it; behind it, as it was."""
        modules = dict(model.named_modules())
        modes = [(module, module.training) for module in modules.values()]
        held = [(modules[path].__dict__, name) for path, name in self.attributes]
        before = [attributes.get(name, _MISSING) for attributes, name in held]
        needs = [(p, p.requires_grad, self.parameters[n].requires_grad) for n, p in self._matched(model)]
        needs = [each for each in needs if each[1] != each[2]]
        try:
            for parameter, _, wanted in needs:
                parameter.requires_grad_(wanted)
            for path, mode in self.modes.items():
                if path not in modules:
                    raise CaptureError(
                        f"{path} of the model is gone: it was there when the program was made",
                        fix="a program's modules are those of its first capture: parallelize the model again",
                    )
                modules[path].training = mode
            for (attributes, name), value in zip(held, self.attributes.values(), strict=True):
                attributes[name] = value
            yield
        finally:
            for parameter, was, _ in needs:
                parameter.requires_grad_(was)
            for module, mode in modes:
                module.training = mode
            for (attributes, name), value in zip(held, before, strict=True):
                if value is _MISSING:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value

    def _matched(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in model.named_parameters() if name in self.parameters]

    def needs(self, model: nn.Module, leaves: list[Any]) -> tuple[bool, ...]:
        """Which parameters, and which inputs, require a gradient."""
        inputs = (leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))
        weights = ((n, self.parameters.get(n, p)) for n, p in model.named_parameters())
        return *(parameter.requires_grad for _, parameter in weights), *inputs


@dataclass(frozen=True)
class Conditions:
    """What a capture holds for.

    Attributes:
        modes: of each module.
        surroundings: of the capture.
        asks_grad: whether it matters that gradients are enabled.
        needs: which parameters and inputs required a gradient, where that matters.
        layout: tells how inputs lie in memory, where that matters; None where it does not.
        lay: how those of the capture lay.
        attributes: those of the program's own changes that were read.
        guards: what tells whether all else that was read is as it was.
    """

    modes: tuple[bool, ...]
    surroundings: Surroundings
    asks_grad: bool
    needs: tuple[bool, ...] | None
    layout: Callable[[torch.Tensor], Hashable] | None
    lay: tuple[Hashable, ...]
    attributes: Mapping[tuple[str, str], Any]
    guards: tuple[Guard, ...]

    @staticmethod
    def of(
        captured: Captured, model: nn.Module, changes: Changes, leaves: list[Any], guards: tuple[Guard, ...]
    ) -> Conditions:
        """Those of a capture that was made just now, of a model as it is now, on which the changes are."""
        reads = captured.reads
        read = {(path, name) for path, names in (*reads.attributes.items(), *reads.inherited.items()) for name in names}
        layout = layout_that_matters(captured)
        return Conditions(
            modes_of(model),
            surroundings(),
            captured.asks_grad,
            changes.needs(model, leaves) if captured.asks_needs else None,
            layout,
            lay_of(layout, leaves),
            {key: value for key, value in changes.attributes.items() if key in read},
            guards,
        )

    def hold(self, model: nn.Module, changes: Changes) -> bool:
        """Whether all is as it was, but for what requires a gradient; the changes are on the model."""
        now = surroundings()
        if now[:-1] != self.surroundings[:-1] or modes_of(model) != self.modes:
            return False
        if self.asks_grad and now.gradients != self.surroundings.gradients:
            return False
        looked_at = {key for guard in self.guards for key in guard.keys}
        changed = {k: v for k, v in changes.attributes.items() if k in looked_at or k in self.attributes}
        if changed.keys() != self.attributes.keys():
            return False
        return all(same(changed[key], value) for key, value in self.attributes.items()) and self.still_hold()

    def still_hold(self) -> bool:
        """Whether what the guards look at is as it was."""
        return all(guard.holds() for guard in self.guards)

    def lie_alike(self, leaves: list[Any]) -> bool:
        """Whether the inputs lie in memory as those of the capture did, where that matters."""
        return self.layout is None or self.lay == lay_of(self.layout, leaves)

    def are_needed(self, model: nn.Module, changes: Changes, leaves: list[Any]) -> bool:
        """Whether the same requires a gradient, where that matters."""
        return self.needs is None or self.needs == changes.needs(model, leaves)

    def broken(self) -> list[str]:
        """What the guards find changed, a line each."""
        return [line for guard in self.guards for line in guard.changed()]


def layout_that_matters(captured: Captured) -> Callable[[torch.Tensor], Hashable] | None:
    """What of the memory of inputs a capture depends on."""
    graphs = [each.graph for each in captured.root.modules() if isinstance(each, Root | fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    if captured.asks_layout or any(node.target is torch.ops.aten.as_strided.default for node in calls):
        return lies_at
    return _order if any(map(draws, calls)) else None


def _order(x: torch.Tensor) -> Hashable:
    return order_of(x)[0]


def lay_of(layout: Callable[[torch.Tensor], Hashable] | None, leaves: list[Any]) -> tuple[Hashable, ...]:
    """How the tensors among some leaves lie."""
    if layout is None:
        return ()
    return tuple(layout(x) for x in leaves if isinstance(x, torch.Tensor) and x.layout == torch.strided)


def lies_at(x: torch.Tensor) -> Hashable:
    """All of how a tensor lies in its memory.

    >>> lies_at(torch.ones(4, 2).T[1:])
    ((1, 2), 1)
    """
    return x.is_contiguous() or x.stride(), x.storage_offset()


def modes_of(model: nn.Module) -> tuple[bool, ...]:
    """The mode of each module."""
    return tuple(module.training for module in model.modules())
