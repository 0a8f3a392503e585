"""Optimizers over parts of matrices: those that treat each element alone are right, for others there is a way round.

SGD, Adam and their like make of every element's gradient that element's step, so that it does not matter who holds the
element. Muon orthogonalizes the update of a whole matrix, Adafactor keeps sums of its rows and columns, LAMB scales by
its norm: given a part they compute something else, and say nothing. So before an optimizer's first step over parts it
is looked at: torch's own are known, any other is tried on a small matrix and on its halves. One that was made over the
model's parameters, of which the program has its own, would train nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fxshard.errors import InputError
from fxshard.runtime.collectives import Axis
from fxshard.runtime.module import local_part
from fxshard.weights.gathering import fill_whole, gather_whole
from fxshard.weights.layout import layout_of
from fxshard.weights.weights import Weights

__all__ = ["WholeMatrix", "note_parted", "watch_optimizers"]

_ALONE = (
    torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop,
    torch.optim.SGD, torch.optim.SparseAdam,
)  # fmt: skip
"""Torch's optimizers that treat each element alone."""
_SEEN = "_fxshard_seen"
_watching: list[Any] = []
_parted = WeakTensorKeyDictionary()


def note_parted(parameter: nn.Parameter, name: str) -> None:
    """A program has a parameter of its own in place of this one of the model."""
    _parted[parameter] = name


def watch_optimizers() -> None:
    """From now on every optimizer is looked at before its first step over parts."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if vars(optimizer).get(_SEEN) == count or isinstance(optimizer, WholeMatrix):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parted = [p for p in parameters if p in _parted and p.requires_grad]
    if parted and all(p.grad is None for p in parted):
        raise InputError(
            f"the optimizer has {len(parted)} parameters of a model that was parallelized, the first "
            f"{_parted[parted[0]]!r}: they have no gradients, since the program trains parameters of its own",
            fix="make the optimizer over program.parameters(), once the program was captured",
        )
    cut = [layout for layout in map(layout_of, parameters) if layout is not None and layout.is_cut]
    if cut and not treats_elements_alone(optimizer):
        name = type(optimizer).__name__
        raise InputError(
            f"{name} computes a parameter's step from all of its elements, and {len(cut)} of its parameters are parts: "
            f"the first is {cut[0]}",
            fix=f"make it with program.whole_matrix({name}, ...), which steps whole matrices",
        )
    vars(optimizer)[_SEEN] = count


def treats_elements_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer steps parts of a matrix as it steps the whole.

    >>> weight = nn.Parameter(torch.ones(2, 2))
    >>> treats_elements_alone(torch.optim.AdamW([weight])), treats_elements_alone(torch.optim.Muon([weight]))
    (True, False)
    """
    cls = type(optimizer)
    known = next((each for each in cls.__mro__ if each in _ALONE), None)
    if known is not None and cls.step is known.step:
        return True
    if cls.__module__.startswith("torch."):
        return False
    try:
        with torch.random.fork_rng([]):
            return _steps_parts_alike(optimizer)
    except Exception:  # whatever keeps it from being tried, nothing is known of it
        return False


def _steps_parts_alike(optimizer: torch.optim.Optimizer) -> bool:
    parameters = inspect.signature(type(optimizer).__init__).parameters
    group = optimizer.param_groups[0]
    options = {name: group[name] for name in parameters if name in group and name != "params"}

    stepped = functools.partial(_stepped, functools.partial(type(optimizer), **options))
    torch.manual_seed(0)
    weight, steps = torch.randn(8, 6), [torch.randn(8, 6) * scale for scale in (1.0, 10.0, 0.1)]
    (whole,) = stepped([weight], [[step] for step in steps])
    for dim in (0, 1):
        parts = stepped(weight.chunk(2, dim), [list(step.chunk(2, dim)) for step in steps])
        if not torch.allclose(torch.cat(parts, dim), whole, rtol=1e-5, atol=1e-6):
            return False
    return not torch.equal(whole, weight)


def _stepped(
    make: Callable[..., torch.optim.Optimizer], weights: Iterable[torch.Tensor], steps: Iterable[Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """What an optimizer makes of copies of weights, with the gradients of each step."""
    held = [nn.Parameter(weight.clone()) for weight in weights]
    tried = make(held)
    vars(tried)[_SEEN] = len(held)
    for grads in steps:
        for parameter, grad in zip(held, grads, strict=True):
            parameter.grad = grad.clone()
        tried.step()
    return [parameter.detach() for parameter in held]


def _check_alone(optimizer_class: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Raises where a parameter's step depends on other parameters: of L-BFGS, or where one step size is found for all.

    Raises:
        InputError: then, and where it cannot be tried.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator) for size in ((6, 4), (4, 6))]
    steps = [[torch.randn(w.shape, generator=generator) * scale for w in weights] for scale in (1.0, 10.0, 0.1)]

    stepped = functools.partial(_stepped, functools.partial(optimizer_class, **options))
    name = getattr(optimizer_class, "__name__", str(optimizer_class))
    try:
        with torch.random.fork_rng([]):
            together = stepped(weights, steps)
            alone = [stepped([w], [[grads[i]] for grads in steps])[0] for i, w in enumerate(weights)]
    except Exception as error:
        raise InputError(
            f"{name} cannot be tried on two small matrices: {type(error).__name__}: {error}",
            fix="give an optimizer whose step() takes no closure, and whose options hold for any matrix",
        ) from error
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(together, alone, strict=True)):
        raise InputError(
            f"{name} computes a parameter's step from other parameters too, of which each is stepped by itself here",
            fix="train with an optimizer that treats each matrix alone: Muon, Adafactor, Shampoo",
        )


class WholeMatrix(torch.optim.Optimizer):
    """Steps whole matrices, of which each rank holds a part: see ``ParallelModule.whole_matrix``.

    For each parameter the ranks gather its gradient, its value and its state, all of them make the step of one device,
    and each keeps its part: of state of the parameter's shape as well, so that memory is what it was.

    Args:
        weights: how the program's parameters lie.
        axes: gives this rank's axes.
        optimizer_class: steps a whole matrix.
        params: the parameters, or groups of them, as optimizers take them.
        options: the optimizer's.
    """

    def __init__(
        self,
        weights: Weights,
        axes: Callable[[], Mapping[str, Axis]],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        params: Any,
        options: Mapping[str, Any],
    ) -> None:
        probe = optimizer_class([nn.Parameter(torch.zeros(2, 2))], **options)
        self._weights, self._axes, self._make, self._options = weights, axes, optimizer_class, dict(options)
        self._known: dict[torch.Size, set[str]] = {}
        _check_alone(optimizer_class, options)
        super().__init__(params, probe.defaults)
        strange = [p for group in self.param_groups for p in group["params"] if id(p) not in weights.parameters]
        if strange:
            raise InputError(
                f"{len(strange)} parameters are not the program's, the first of shape {list(strange[0].shape)}",
                fix="give program.parameters(), or some of program.named_parameters()",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; collective: every rank has a gradient of the same parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, {name: value for name, value in group.items() if name != "params"})
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``Optimizer.zero_grad``; in simulation of the parts of all ranks."""
        for group in self.param_groups:
            for parameter in group["params"]:
                for part in self._parts(self._weights.parameters[id(parameter)]):
                    if set_to_none or part.grad is None:
                        part.grad = None
                    else:
                        part.grad = torch.zeros_like(part.grad)

    def _step(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        name = self._weights.parameters[id(parameter)]
        parts = self._parts(name)
        whole = nn.Parameter(self._whole(name, [part.detach() for part in parts]))
        whole.grad = self._whole(name, [_grad_of(part) for part in parts])
        inner = self._make([whole], **self._options)
        inner.param_groups[0].update(group)
        held = self.state[parameter]
        if held:
            cut = self._keys_like(whole)
            of_rank = [self._state_of(name, rank) for rank in self._ranks()]
            inner.state[whole] = {
                key: self._whole(name, [state[key] for state in of_rank]) if key in cut else value
                for key, value in held.items()
            }
        inner.step()
        after = dict(inner.state[whole])
        cut = _of_shape(after, whole.shape)
        for rank, part in zip(self._ranks(), parts, strict=True):
            part.data.copy_(self._cut(name, whole.detach(), rank))
            kept = {key: self._cut(name, value, rank) if key in cut else value for key, value in after.items()}
            self.state[part] = kept

    def _keys_like(self, whole: torch.Tensor) -> set[str]:
        """The state that the optimizer keeps in the shape of a parameter: found by a step of another one."""
        if whole.shape not in self._known:
            other = nn.Parameter(torch.zeros_like(whole))
            other.grad = torch.ones_like(whole)
            inner = self._make([other], **self._options)
            with torch.random.fork_rng([]):
                inner.step()
            self._known[whole.shape] = _of_shape(inner.state[other], whole.shape)
        return self._known[whole.shape]

    def _ranks(self) -> list[int]:
        return list(self._weights.modules)

    def _parts(self, name: str) -> list[torch.Tensor]:
        return [self._weights.part(name, rank) for rank in self._ranks()]

    def _state_of(self, name: str, rank: int) -> dict[str, Any]:
        held: dict[str, Any] = self.state[self._weights.part(name, rank)]
        return held

    def _cut(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        layout = self._weights.layout(name, rank)
        return local_part(whole, layout.placements, layout.mesh, rank)

    def _whole(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        layout = self._weights.layout(name)
        if not self._weights.is_simulated:
            return gather_whole(parts[0], layout.placements, layout.mesh, self._axes()).clone()
        whole = parts[0].new_empty(layout.shape)
        for rank, part in zip(self._ranks(), parts, strict=True):
            fill_whole(whole, part, layout.of(rank))
        return whole


def _of_shape(state: Mapping[str, Any], shape: torch.Size) -> set[str]:
    return {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == shape}


def _grad_of(part: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(part) if part.grad is None else part.grad
