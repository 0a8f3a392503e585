"""Ring attention: queries, keys and values lie split along the sequence, and the keys and values go round the ranks.

In each of n steps a rank attends to the block of keys that it holds, while the next one is on its way. What the steps
give is merged by the running maximum and sum of the exponents, as in flash attention. The backward pass computes the
scores of each block anew from the log-sum of the exponents, while keys and values go round again, and with them their
gradients, which come home in the end.

    rank 0    q0 k0    q0 k3    q0 k2    q0 k1      a causal mask forbids all of these but the first:
    rank 1    q1 k1    q1 k0    q1 k3    q1 k2      blocks that lie in the future are passed on, not computed

A rank holds two blocks at most, and the scores of ``TILE`` of its queries with one block. Half precision is computed in
single precision.

Reference: Ring Attention with Blockwise Transformers (Liu et al., 2023); FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxshard.runtime.collectives import Axis, Lengths
from fxshard.runtime.rounds import Arrival, Rotation, Rounds

TILE = 1024
"""How many queries are attended to at once."""

HALF = (torch.float16, torch.bfloat16)


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    axis: Axis,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    lengths: Lengths = (),
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks of the axis.

    Args:
        query: ``[..., heads, this rank's length, features]``.
        key: ``[..., key heads, this rank's length, features]``; each key head serves as many query heads.
        value: likewise.
        axis: the mesh axis that splits the sequence.
        mask: added, or where it is boolean, what is attended to: ``[..., this rank's length or 1, whole length or 1]``.
        is_causal: a query attends to no later key.
        scale: of the scores; by default one over the root of the features.
        lengths: what each rank holds of the sequence; empty where all hold the same.
    """
    function = Ring(is_causal, query.shape[-1] ** -0.5 if scale is None else scale, lengths)
    return axis.group.joint(function, query, key, value, *([] if mask is None else [mask]))


@dataclass(frozen=True)
class Ring:
    """The joint function of the ranks: see ``rounds.Joint``."""

    causal: bool
    scale: float
    lengths: Lengths = ()

    def forward(self, index: int, size: int, *inputs: torch.Tensor) -> Rounds:
        """The result; then the inputs, the result and the log-sums of the exponents, which are kept."""
        query, key, value, *mask = inputs
        exact = _exact(query)
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=exact)
        top = query.new_full((*query.shape[:-1], 1), float("-inf"), dtype=exact)
        total = torch.zeros_like(top)
        for step in range(size):
            source = (index - step) % size
            if step + 1 < size:
                arrive = yield Rotation((key, value), self._shapes((source - 1) % size, key, value))
            for rows, scores in self._scores(index, source, query, key, mask):
                best = torch.maximum(top[..., rows, :], scores.amax(-1, keepdim=True))
                shift = best.masked_fill(best == float("-inf"), 0)
                weights, kept = (scores - shift).exp(), (top[..., rows, :] - shift).exp()
                total[..., rows, :] = total[..., rows, :] * kept + weights.sum(-1, keepdim=True)
                out[..., rows, :] = out[..., rows, :] * kept + times(weights, value.to(exact))
                top[..., rows, :] = best
            if step + 1 < size:
                key, value = arrive()
        out = (out / total.masked_fill(total == 0, 1)).to(query.dtype)
        return out, *inputs, out, top + total.log()

    def backward(self, index: int, size: int, saved: Sequence[torch.Tensor], grad: torch.Tensor) -> Rounds:
        """The gradients of query, key, value, and of a mask that is added."""
        query, key, value, *mask, out, logs = saved
        exact = _exact(query)
        grad = grad.to(exact)
        inner = (grad * out.to(exact)).sum(-1, keepdim=True)
        logs = logs.masked_fill(logs == float("-inf"), float("inf"))  # a query that attends to nothing: no weights
        of_query = torch.zeros_like(query, dtype=exact)
        of_mask = [torch.zeros_like(m, dtype=exact) for m in mask if m.is_floating_point()]
        carried: Sequence[torch.Tensor] = (torch.zeros_like(key, dtype=exact), torch.zeros_like(value, dtype=exact))
        turning: Arrival | None = None
        for step in range(size):
            source = (index - step) % size
            if step + 1 < size:
                arrive = yield Rotation((key, value), self._shapes((source - 1) % size, key, value))
            of_key, of_value = torch.zeros_like(key, dtype=exact), torch.zeros_like(value, dtype=exact)
            for rows, scores in self._scores(index, source, query, key, mask):
                weights = (scores - logs[..., rows, :]).exp()
                of_value += transposed_times(weights, grad[..., rows, :], value)
                of_scores = weights * (times(grad[..., rows, :], value.to(exact).mT) - inner[..., rows, :])
                for total in of_mask:
                    part = self._part(total, source, rows, key)
                    part += of_scores.sum_to_size(part.shape)
                of_query[..., rows, :] += times(of_scores, key.to(exact)) * self.scale
                of_key += transposed_times(of_scores, query[..., rows, :].to(exact), key) * self.scale
            carried = carried if turning is None else turning()
            carried = carried[0] + of_key, carried[1] + of_value
            turning = yield Rotation(carried, self._shapes((source - 1) % size, *carried))
            if step + 1 < size:
                key, value = arrive()
        assert turning is not None
        of_key, of_value = turning()
        grads = of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
        return *grads, *(of_mask[0].to(m.dtype) if m.is_floating_point() else None for m in mask)

    def _shapes(self, rank: int, *tensors: torch.Tensor) -> list[list[int]]:
        """The shapes of what ``rank`` held in the beginning, where this rank holds the like."""
        length = self.lengths[rank] if self.lengths else tensors[0].shape[-2]
        return [[*x.shape[:-2], length, x.shape[-1]] for x in tensors]

    def _start(self, rank: int, length: int) -> int:
        return sum(self.lengths[:rank]) if self.lengths else rank * length

    def _scores(
        self, index: int, source: int, query: torch.Tensor, key: torch.Tensor, mask: Sequence[torch.Tensor]
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The scores of this rank's queries with the keys of ``source``, some rows at a time; masked ones are -inf."""
        first, start = self._start(index, query.shape[-2]), self._start(source, key.shape[-2])
        exact, keys = _exact(query), key.shape[-2]
        for at in range(0, query.shape[-2] if keys else 0, TILE):
            rows = slice(at, min(at + TILE, query.shape[-2]))
            if self.causal and start > first + rows.stop - 1:
                continue
            scores = times(query[..., rows, :].to(exact), key.to(exact).mT) * self.scale
            if self.causal and start + keys > first + at:
                later = torch.arange(start, start + keys, device=key.device) > torch.arange(
                    first + at, first + rows.stop, device=key.device
                ).unsqueeze(-1)
                scores = scores.masked_fill(later, float("-inf"))
            for each in mask:
                part = self._part(each, source, rows, key)
                scores = scores + part if each.is_floating_point() else scores.masked_fill(~part, float("-inf"))
            yield rows, scores

    def _part(self, mask: torch.Tensor, source: int, rows: slice, key: torch.Tensor) -> torch.Tensor:
        """What a mask says of some of this rank's queries and the keys of ``source``."""
        if mask.shape[-2] > 1:
            mask = mask[..., rows, :]
        keys = key.shape[-2]
        return mask.narrow(-1, self._start(source, keys), keys) if mask.shape[-1] > 1 else mask


def _exact(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALF else x.dtype


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, where ``b`` has fewer heads, each for several heads of ``a``.

    >>> times(torch.ones(6, 2, 3), torch.ones(2, 3, 5)).shape
    torch.Size([6, 2, 5])
    """
    return (_folded(a, b) @ b).reshape(*a.shape[:-1], b.shape[-1])


def transposed_times(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``a.mT @ b``, summed over the heads that share one head of ``like``."""
    return _folded(a, like).mT @ _folded(b, like)


def _folded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The heads that share one head of ``like``, as further rows of that head."""
    if x.dim() < 3 or x.shape[-3] == like.shape[-3]:
        return x
    rows = x.shape[-3] // like.shape[-3] * x.shape[-2]
    return x.reshape(*x.shape[:-3], like.shape[-3], rows, x.shape[-1])
