"""Sample calls of operators beyond the everyday ones: experts, recurrent cells, linear algebra, rare pooling."""

from __future__ import annotations

from typing import Any

import torch

from tests.rules.samples import D, bools, call, cplx, ints, pos, r, samples


def offsets(groups: int, rows: int) -> torch.Tensor:
    """Where groups of rows end; one of them is empty."""
    ends = torch.randint(0, rows + 1, (groups - 1,)).sort().values
    ends[1] = ends[0]
    return torch.cat((ends, torch.tensor([rows]))).to(torch.int32)


@samples("_grouped_mm.default")
def _() -> list[Any]:
    f = lambda *shape: r(*shape).float()  # noqa: E731 (there is no double one)
    return [
        call(f(24, 48), f(4, 48, 96), offsets(4, 24)),
        call(f(24, 48), f(4, 96, 48).transpose(1, 2), offsets(4, 24)),
        call(f(4, 48, 96), f(96, 24), offsets(4, 24)),
        call(f(48, 24).t(), f(24, 96), offsets(4, 24), gradients=False),
        call(f(4, 48, 96), f(4, 96, 48)),
    ]


@samples("transformers::grouped_mm_fallback.default")
def _() -> list[Any]:
    return [
        call(r(24, 12), r(4, 12, 24), offsets(4, 24)),
        call(r(24, 12), r(4, 24, 12).transpose(1, 2), offsets(4, 24).long()),
    ]


@samples("histc.default")
def _() -> list[Any]:
    return [
        call(r(24), 6, -2, 2, gradients=False),
        call(ints(4, 12, 24).float(), 4, 0, 3, gradients=False),
        call(r(24), 6, gradients=False),
    ]
