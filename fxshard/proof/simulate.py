"""All ranks of a program in this process, no launcher: outputs and gradients as the real ranks would have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fxshard.errors import InputError
from fxshard.program import ParallelModule
from fxshard.runtime.draws import copy_as_it_lies
from fxshard.runtime.hidden_writes import overwrite
from fxshard.runtime.lockstep import Turns, lockstep_axes, run_ranks
from fxshard.torch_internals import after_backward, pytree


class Simulation:
    """One run of all ranks.

    Attributes:
        outputs: what each rank returned, in rank order.
    """

    def __init__(
        self, program: ParallelModule, outputs: list[Any], shared: Mapping[str, Sequence[torch.Tensor]]
    ) -> None:
        self._program, self._shared = program, shared
        self.outputs = outputs
        self._grads: dict[str, torch.Tensor] | None = None

    def backward(self, loss_fn: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
        """Back-propagates every rank's own loss, as the ranks of a real run do together.

        Args:
            loss_fn: maps one rank's output to that rank's scalar loss.

        Returns:
            Each rank's loss, in rank order. Gradients are added to the parameters of ``program.rank_module(r)``.
        """
        program = self._program
        modules = [program.rank_module(r) for r in range(program.mesh.world_size)]
        before = [{n: p.grad for n, p in m.named_parameters()} for m in modules]
        for module in modules:
            module.zero_grad(set_to_none=True)
        losses = [loss_fn(output) for output in self.outputs]
        torch.stack([loss.reshape(()) for loss in losses]).sum().backward()
        self._grads = program.full_grads()
        for module, old in zip(modules, before, strict=True):
            for name, parameter in module.named_parameters():
                earlier = old[name]
                if earlier is not None:
                    parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier
        return [loss.detach() for loss in losses]

    def grad(self, loss_fn: Callable[[Any], torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The gradients of every rank's own loss, as that rank has them; they can be differentiated again.

        For penalties on gradients: what is computed of them may be part of the loss that ``backward`` is given.

        Args:
            loss_fn: maps one rank's output to that rank's scalar loss.

        Returns:
            For each rank the gradients of the inputs that require one, whole, by where they stand in the call, and of
            its parameters, of which it may hold a part.

        >>> import fxshard
        >>> model, x = torch.nn.Linear(8, 4), torch.randn(4, 8, requires_grad=True)
        >>> run = fxshard.simulate(fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,)), x)
        >>> penalties = iter([found["input"].pow(2).sum() for found in run.grad(lambda y: y.pow(2).sum())])
        >>> losses = run.backward(lambda y: y.sum() + next(penalties))
        """
        ranks = range(self._program.mesh.world_size)
        wanted = [
            {name: xs[rank] for name, xs in self._shared.items()}
            | {n: p for n, p in self._program.rank_module(rank).named_parameters() if p.requires_grad}
            for rank in ranks
        ]
        total = torch.stack([loss_fn(output).reshape(()) for output in self.outputs]).sum()
        each = [value for found in wanted for value in found.values()]
        made = iter(torch.autograd.grad(total, each, create_graph=True, allow_unused=True))
        found = [{name: next(made) for name in names} for names in wanted]
        return [{name: grad for name, grad in grads.items() if grad is not None} for grads in found]

    def full_grads(self) -> dict[str, torch.Tensor]:
        """The whole gradients of this run's ``backward``, under the original names."""
        if self._grads is None:
            raise RuntimeError("call backward(loss_fn) first")
        return self._grads


class _Watch:
    """Sees to it that a backward pass begins at the outputs of all ranks, where it begins at those of one.

    A rank's gradients are made of what the other ranks send back: of a loss of one rank's output alone, they are parts.
    """

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.reached: set[tuple[int, int]] = set()
        self.watched: set[tuple[int, int]] = set()
        for rank, output in enumerate(outputs):
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf:
                    self.watched.add((rank, index))
                    leaf.register_hook(partial(self._reach, (rank, index)))

    def _reach(self, which: tuple[int, int], grad: torch.Tensor) -> None:
        if not self.reached:
            after_backward(self._check)
        self.reached.add(which)

    def _check(self) -> None:
        reached, self.reached = self.reached, set()
        missing = sorted({(r, i) for _, i in reached for r, j in self.watched if i == j} - reached)
        if missing:
            here = sorted({rank for rank, _ in reached})
            raise InputError(
                f"the loss is made of the outputs of rank {', '.join(map(str, here))}, and not of those of rank "
                f"{missing[0][0]}: gradients are sums over the ranks, and these are not whole",
                fix="back-propagate every rank's loss together: simulate(...).backward(loss_fn)",
            )


class _Share(torch.autograd.Function):
    """One input of the user, as every rank's own: its gradient is the same on all ranks, and counts once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, copied: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(copied(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.stack(grads).mean(0), None, None


def simulate(program: ParallelModule, *args: Any, **kwargs: Any) -> Simulation:
    """Runs all ranks of ``program`` in lockstep in this process, no process group needed.

    Nothing is computed anew in the backward pass, where the program asks for it (activation checkpointing): all ranks
    have one backward pass together. The values are the same; the memory is that of a program without.

    Args:
        program: what ``parallelize`` returned.
        args: the model's inputs, whole, as the model takes them.
        kwargs: likewise.

    Raises:
        InputError: when the weights of one rank were changed since the last run, and those of the others were not.

    >>> import fxshard
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> x = torch.randn(4, 8)
    >>> program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
    >>> run = fxshard.simulate(program, x)
    >>> torch.allclose(run.outputs[1], model(x), atol=1e-6)
    True
    """
    compiled, leaves = program.compile_call(args, kwargs)
    program.check_alike()
    world = program.mesh.world_size
    copied = copy_as_it_lies if compiled.captured.asks_layout else torch.clone
    shared = [
        _Share.apply(x, world, copied) if isinstance(x, torch.Tensor) and x.requires_grad else (x,) * world  # type: ignore[no-untyped-call]
        for x in leaves
    ]
    for index in compiled.overwritten_inputs:
        shared[index] = tuple(x.clone() for x in shared[index])
    turns = Turns(world, program.computes_on)
    axes = lockstep_axes(program.mesh, turns, program.options.reduce_dtype)
    functions = [program.function(compiled, rank, axes[rank]) for rank in range(world)]

    def run(rank: int) -> Any:
        return functions[rank](program.rank_module(rank), *(x[rank] for x in shared))

    made = run_ranks(world, turns, run)
    for index in compiled.overwritten_inputs:
        given, made_of_it = leaves[index], shared[index][0]
        if given.is_leaf and given.requires_grad:  # written behind autograd's back, or one device would not run it
            overwrite(given, made_of_it)
        else:
            given.copy_(made_of_it)
    outputs = [program.finish(compiled, made[0], args, kwargs)]
    outputs += [compiled.captured.unflatten_outputs(each) for each in made[1:]]
    names = [leaf.path for leaf in compiled.captured.example_inputs]
    given = {name: xs for name, xs in zip(names, shared, strict=True) if getattr(xs[0], "requires_grad", False)}
    if world > 1:
        _Watch(outputs)
    return Simulation(program, outputs, given)
