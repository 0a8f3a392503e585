"""Random numbers fill a tensor in the order of its memory: here a rank's tensor gets the one that one device's has.

    h.t() + rand_like(h.t())      one device draws down the columns of h.t(), which are the rows of h
    rand_like(gathered)           a gathered tensor is contiguous: it would be filled along its rows

An ``order`` names the dims of a tensor, those that lie farthest apart in memory first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxshard.runtime.autocast import operator_named

__all__ = ["copy_as_it_lies", "draw_in_place", "in_order", "order_of"]


def order_of(x: torch.Tensor) -> tuple[tuple[int, ...], bool]:
    """The order in which a tensor is filled, and whether there are gaps in it though the order is the plain one.

    >>> x = torch.empty(4, 6)
    >>> order_of(x), order_of(x.t()), order_of(x[:, ::2])
    (((0, 1), False), ((1, 0), False), ((0, 1), True))
    """
    plain = tuple(range(x.dim()))
    if x.is_contiguous():
        return plain, False
    strides = torch.empty_like(x, device="meta").stride()  # of what overlaps or has gaps, those that torch chooses
    order = tuple(sorted(plain, key=lambda dim: -strides[dim]))
    wide = [dim for dim in order if x.shape[dim] != 1]
    order = plain if wide == sorted(wide) else order
    return order, order == plain


def in_order(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """``x``, whose dims lie in memory in this order.

    >>> in_order(torch.ones(4, 6), (1, 0)).stride()
    (1, 4)
    """
    return x.permute(*order).contiguous().permute(*_inverse(order))


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Over how many elements of memory a tensor reaches.

    >>> extent((2, 2), (3, 1)), extent((2, 0), (3, 1))
    (5, 0)
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def copy_as_it_lies(x: torch.Tensor) -> torch.Tensor:
    """A copy that lies in its memory as ``x`` does in its own, which is copied from where it begins.

    >>> copied = copy_as_it_lies(torch.ones(3, 4).T[1:])
    >>> copied.stride(), copied.storage_offset()
    ((1, 4), 1)
    """
    if x.layout != torch.strided or x.is_quantized or not x.numel():
        return x.detach().clone()
    start, strides = x.storage_offset(), x.stride()
    return (
        x.detach().as_strided((start + extent(x.shape, strides),), (1,), 0).clone().as_strided(x.shape, strides, start)
    )


def draw_in_place(
    operator: str, like: torch.Tensor, order: Sequence[int], gaps: bool, arguments: list[Any], options: dict[str, Any]
) -> torch.Tensor:
    """What an operator writes that fills a tensor with random numbers, whose kernels differ by its memory.

    Args:
        operator: its path in ``torch.ops``, e.g. ``aten.normal_.default``.
        like: of which only the shape, dtype and device are read.
        order: of the memory that is filled.
        gaps: whether there are gaps in it.
        arguments: those by position, after the tensor.
        options: those by name.
    """
    shape = [like.shape[dim] for dim in order]
    filled = like.new_empty((*shape, 2))[..., 0] if gaps else like.new_empty(shape)
    out: torch.Tensor = operator_named(operator)(filled.permute(*_inverse(order)), *arguments, **options)
    return out.contiguous() if gaps else out


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]
