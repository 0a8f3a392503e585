"""Products at the edge of what is split, together with the collective before or behind them, which runs beside them.

    function                                      forward                          backward
    vary_linears(x, weights, axis)                x @ w.T for each weight          all_reduce of x's gradient
    gather_linears(x, weights, axis, dim)         all_gather(x), then the same     reduce_scatter of x's gradient
    linear_all_reduce(x, weight, axis)            all_reduce(x @ w.T)              no collective
    linear_reduce_scatter(x, weight, axis, dim)   reduce_scatter(x @ w.T)          all_gather of the gradient

What is communicated is cut along the sequence, or along all rows, in ``pieces``: while one is under way, the next is
multiplied. The weights' gradients are computed while the sum of x's gradient is under way.

Values and gradients are those of ``F.linear`` and the collectives of ``runtime.collectives``, which run where nothing
can run beside: on ranks of ``fxshard.simulate``, under ``torch.compile`` (whose own passes overlap) and transforms of
``torch.func``.

Reference: Wang et al., 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models"; Megatron-LM's ``async_grad_allreduce``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

from fxshard.runtime.collectives import Axis, ProcessAxisGroup, all_gather, all_reduce, joined, reduce_scatter, vary
from fxshard.torch_internals import is_transformed, record

Weights: TypeAlias = Sequence[torch.Tensor]
Biases: TypeAlias = Sequence[torch.Tensor | None]
Cut: TypeAlias = tuple[int, int]


def cuts(length: int, pieces: int) -> list[Cut]:
    """Where each of so many pieces begins and ends; never an empty one beside others.

    >>> cuts(7, 3), cuts(2, 4), cuts(0, 4)
    ([(0, 2), (2, 4), (4, 7)], [(0, 1), (1, 2)], [(0, 0)])
    """
    count = max(1, min(pieces, length))
    return list(pairwise(length * i // count for i in range(count + 1)))


def vary_linears(
    x: torch.Tensor, weights: Weights, axis: Axis, biases: Biases = (), pieces: int = 1
) -> tuple[torch.Tensor, ...]:
    """``F.linear(vary(x, axis), weight, bias)`` for each weight: columns of Megatron's layers.

    Args:
        x: the whole value, ``[..., in]``.
        weights: this rank's rows of each weight, ``[out, in]``.
        axis: the mesh axis.
        biases: this rank's part of each bias, if there are any.
        pieces: how often what is communicated is cut.
    """
    if _runs_beside(axis):
        out: tuple[torch.Tensor, ...] = record(_Column, axis.group, None, pieces, x, *weights, *_all(biases, weights))
        return out
    x = vary(x, axis)
    return tuple(F.linear(x, w, b) for w, b in zip(weights, _all(biases, weights), strict=True))


def gather_linears(
    x: torch.Tensor, weights: Weights, axis: Axis, dim: int, biases: Biases = (), pieces: int = 1
) -> tuple[torch.Tensor, ...]:
    """``F.linear(all_gather(x, axis, summed=True, dim=dim), weight, bias)`` for each weight.

    Args:
        x: this rank's part along ``dim``, ``[..., in]``.
        weights: this rank's rows of each weight, ``[out, in]``.
        axis: the mesh axis.
        dim: along which ``x`` is split: not the last one.
        biases: this rank's part of each bias, if there are any.
        pieces: how often what is communicated is cut.
    """
    if _runs_beside(axis):
        out: tuple[torch.Tensor, ...] = record(_Column, axis.group, dim, pieces, x, *weights, *_all(biases, weights))
        return out
    x = all_gather(x, axis, True, dim)
    return tuple(F.linear(x, w, b) for w, b in zip(weights, _all(biases, weights), strict=True))


def linear_all_reduce(x: torch.Tensor, weight: torch.Tensor, axis: Axis, pieces: int = 1) -> torch.Tensor:
    """``all_reduce(F.linear(x, weight), axis)``: rows of Megatron's layers.

    Args:
        x: this rank's features, ``[..., in]``.
        weight: this rank's columns, ``[out, in]``.
        axis: the mesh axis.
        pieces: how often what is communicated is cut.
    """
    if _runs_beside(axis):
        out: torch.Tensor = record(_Row, axis.group, None, pieces, x, weight)
        return out
    return all_reduce(F.linear(x, weight), axis)


def linear_reduce_scatter(x: torch.Tensor, weight: torch.Tensor, axis: Axis, dim: int, pieces: int = 1) -> torch.Tensor:
    """``reduce_scatter(F.linear(x, weight), axis, dim)``.

    Args:
        x: this rank's features, ``[..., in]``.
        weight: this rank's columns, ``[out, in]``.
        axis: the mesh axis.
        dim: along which the sum is split: not the last one.
        pieces: how often what is communicated is cut.
    """
    if _runs_beside(axis) and x.shape[dim] % axis.size == 0:
        out: torch.Tensor = record(_Row, axis.group, dim, pieces, x, weight)
        return out
    return reduce_scatter(F.linear(x, weight), axis, dim)


def _all(biases: Biases, weights: Weights) -> Biases:
    return biases or [None] * len(weights)


def _runs_beside(axis: Axis) -> bool:
    """Whether a collective can be begun here, and waited for later."""
    return isinstance(axis.group, ProcessAxisGroup) and not is_transformed()


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessAxisGroup, dim: int | None, pieces: int, x: torch.Tensor, *given: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = _halves(given)
        if dim is None:
            whole, outs = x, [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        else:
            whole, outs = _gather_multiply(group, x, dim, pieces, weights, biases)
        outs = list(map(_itself, outs))
        of_x, *of_given = ctx.needs_input_grad[3:]
        of_weights, of_biases = _halves(of_given)
        flows = [of_x or w or b for w, b in zip(of_weights, of_biases, strict=True)]
        ctx.mark_non_differentiable(*(out for out, flow in zip(outs, flows, strict=True) if not flow))
        # the backward pass asks for weights that were let go of in the opposite order
        kept = reversed(weights) if of_x else [None] * len(weights)
        ctx.save_for_backward(*kept, whole if any(of_weights) else None)
        ctx.group, ctx.dim, ctx.pieces = group, dim, pieces
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        *weights, whole = ctx.saved_tensors
        wanted, wanted_biases = _halves(ctx.needs_input_grad[4:])
        given = zip(grads, reversed(weights), strict=True)
        pairs = [(grad, w.conj()) for grad, w in given if grad is not None and w is not None]
        finish: Callable[[], torch.Tensor | None] = _none
        if pairs:
            finish = (
                _multiply_reduce(ctx.group, pairs, ctx.pieces)
                if ctx.dim is None
                else _multiply_scatter(ctx.group, pairs, ctx.dim, ctx.pieces)
            )
        of_weights = [
            _weight_grad(g, whole) if g is not None and w else None for g, w in zip(grads, wanted, strict=True)
        ]
        of_biases = [
            _rows(g).sum(0) if g is not None and b else None for g, b in zip(grads, wanted_biases, strict=True)
        ]
        return (None, None, None, finish(), *of_weights, *of_biases)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessAxisGroup, dim: int | None, pieces: int, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        of_x, of_weight = ctx.needs_input_grad[3:]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.group, ctx.dim, ctx.pieces = group, dim, pieces
        pairs = [(x, weight.t())]
        if dim is None:
            return _multiply_reduce(group, pairs, pieces)()
        return _multiply_scatter(group, pairs, dim, pieces)()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        matrices = [weight.t().conj()] if weight is not None else []
        if ctx.dim is None:
            outs = [F.linear(grad, matrix) for matrix in matrices]
        else:
            grad, outs = _gather_multiply(ctx.group, grad, ctx.dim, ctx.pieces, matrices, [None] * len(matrices))
        of_weight = _weight_grad(grad, x) if x is not None else None
        return None, None, None, outs[0] if outs else None, of_weight


def _halves(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return list(values[: len(values) // 2]), list(values[len(values) // 2 :])


def _none() -> None:
    return None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_grad(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _rows(grad).t() @ _rows(x).conj()


def _itself(x: torch.Tensor) -> torch.Tensor:
    """The same values and memory, not as a view: a result may be changed in place."""
    return _shaped(x, x.shape) if x._is_view() else x


def _shaped(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._unsafe_view.default(x, list(shape))
    return out


Pairs: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Values ``[..., in]``, each with a matrix ``[in, out]``: what is asked for is the sum of their products."""


def _multiply(pairs: Pairs, out: torch.Tensor) -> torch.Tensor:
    (first, matrix), *more = pairs
    torch.mm(first, matrix, out=out)
    for each, other in more:
        out.addmm_(each, other)
    return out


def _multiply_reduce(group: ProcessAxisGroup, pairs: Pairs, pieces: int) -> Callable[[], torch.Tensor]:
    """Begins the all-reduce of a sum of products; what it returns waits for it."""
    first, matrix = pairs[0]
    out = first.new_empty((*first.shape[:-1], matrix.shape[1]))
    flat, cut = _rows(out), [(_rows(x), m) for x, m in pairs]
    begun = []
    for start, end in cuts(flat.shape[0], pieces):
        part = _multiply([(x[start:end], m) for x, m in cut], flat[start:end])
        begun.append((part, group.begin("all_reduce", part)))

    def finish() -> torch.Tensor:
        for part, wait in begun:
            total = wait()
            if total is not part:  # summed in another dtype
                part.copy_(total)
        return out

    return finish


def _multiply_scatter(group: ProcessAxisGroup, pairs: Pairs, dim: int, pieces: int) -> Callable[[], torch.Tensor]:
    """Begins the reduce-scatter along ``dim`` of a sum of products; what it returns waits for it."""
    first, matrix = pairs[0]
    shape, size, features = first.shape, group.size, matrix.shape[1]
    lead, own, rest = math.prod(shape[:dim]), shape[dim] // size, math.prod(shape[dim + 1 : -1])
    cut = [(x.reshape(lead, size, own, rest, x.shape[-1]).movedim(1, 0), m) for x, m in pairs]
    begun = []
    for start, end in cuts(own, pieces):
        rows = [(_rows(x[:, :, start:end]), m) for x, m in cut]
        part = _multiply(rows, first.new_empty((rows[0][0].shape[0], features)))
        begun.append((start, end, group.begin("reduce_scatter", part.view(size * lead, end - start, rest, features))))

    def finish() -> torch.Tensor:
        of_all = (*shape[:dim], own, *shape[dim + 1 : -1], features)
        if len(begun) == 1:
            return _shaped(begun[0][2](), of_all)
        out = first.new_empty((lead, own, rest, features))
        for start, end, wait in begun:
            out[:, start:end] = wait()
        return _shaped(out, of_all)

    return finish


def _gather_multiply(
    group: ProcessAxisGroup, x: torch.Tensor, dim: int, pieces: int, weights: Weights, biases: Biases
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The whole of what is split along ``dim``, and its product with each weight."""
    shape, size, own = x.shape, group.size, x.shape[dim]
    lead, rest = math.prod(shape[:dim]), math.prod(shape[dim + 1 : -1])
    of_all = (*shape[:dim], size * own, *shape[dim + 1 : -1])
    flat = x.reshape(lead, own, rest, shape[-1])
    begun = [(start, end, group.begin("all_gather", flat[:, start:end])) for start, end in cuts(own, pieces)]
    if len(begun) == 1:
        whole = joined(begun[0][2](), size, 1 if lead > 1 else 0).view(*of_all, shape[-1])
        return whole, [F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True)]
    whole = x.new_empty((lead, size, own, rest, shape[-1]))
    outs = [x.new_empty((lead, size, own, rest, w.shape[0])) for w in weights]
    for start, end, wait in begun:
        part = wait().view(size, lead, end - start, rest, shape[-1])
        whole[:, :, start:end] = part.movedim(0, 1)
        for out, w, b in zip(outs, weights, biases, strict=True):
            out[:, :, start:end] = F.linear(part, w, b).movedim(0, 1)
    return whole.view(*of_all, shape[-1]), [out.view(*of_all, out.shape[-1]) for out in outs]
