"""One ruler: is a tensor what another one is, but for how results round?

Everything that compares values uses it: ``verify``, the check of new captures, the prover of rules, the tests.

A difference is measured against the largest element of the tensor itself, however small that is: of a gradient of 1e-6
a tenth is as wrong as of one of 1e6. But a tensor may be small because large numbers cancel in it, as the gradient of a
bias in front of a norm: then all that it holds is rounding. How much that is, the reference itself tells, computed once
more in another precision: nobody can ask for less than a few times what one device rounds. That second run is made only
where the first look finds a difference, and counts for nothing where it is too far from the first to be about rounding.

Reference: N. Higham, Accuracy and Stability of Numerical Algorithms, 2002 (forward errors against a higher precision).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TOLERANCE", "Compared", "compare"]

TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2,
    torch.complex128: 1e-9, torch.complex64: 1e-4,
}  # fmt: skip
"""Largest difference that counts as equal, relative to the largest magnitude of the tensor."""
TIMES = 8
"""How many times what one device rounds may be between two ways to compute a tensor."""


@dataclass(frozen=True)
class Compared:
    """What came of one comparison.

    Attributes:
        name: of the tensor.
        shape: what it should be.
        error: the largest absolute difference; inf where shape or dtype differ, or one of both is missing.
        ok: whether it is within what is allowed.
    """

    name: str
    shape: str
    error: float
    ok: bool


Row = tuple[str, Any, Any]
"""A name, what was computed, and what should have been; None for no tensor."""


def compare(
    rows: Sequence[Row],
    tolerance: float = 0.0,
    again: Callable[[], Sequence[Any] | None] = lambda: None,
    floor: float = 0.0,
) -> list[Compared]:
    """Compares tensors of one computation.

    Args:
        rows: what is compared.
        tolerance: allowed relative to each tensor's scale, where that is more than the dtype's.
        again: computes the reference once more, in another precision: a value a row.
        floor: an absolute difference that is allowed anywhere.

    >>> want = torch.tensor([1e-6, 2e-6])
    >>> [row.ok for row in compare([("a", want * 1.01, want), ("b", want.clone(), want), ("c", want, None)])]
    [False, True, False]
    """
    found = [_look(row, tolerance, floor) for row in rows]
    if all(each.ok for each in found):
        return found
    rounding = _rounding(rows, again(), tolerance)
    scales = (_scale(want) for _, _, want in rows if isinstance(want, torch.Tensor) and want.dtype in TOLERANCE)
    largest = max(scales, default=0.0)
    out = []
    for each, (_, got, want) in zip(found, rows, strict=True):
        if not each.ok and isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor) and want.dtype in TOLERANCE:
            least = (
                max(TOLERANCE[want.dtype], tolerance) * largest
            )  # where the second run says more, it is about something else
            known = rounding.get(each.name, torch.finfo(want.dtype).eps * largest)
            each = Compared(each.name, each.shape, each.error, each.error <= TIMES * min(known, least))
        out.append(each)
    return out


def _look(row: Row, tolerance: float, floor: float) -> Compared:
    name, got, want = row
    if not isinstance(want, torch.Tensor):
        error = _scale(got) if isinstance(got, torch.Tensor) else 0.0
        return Compared(name, "none", error, error == 0.0)
    error = difference(got, want)
    allowed = max(TOLERANCE.get(want.dtype, 0.0), tolerance) * _scale(want) if want.dtype in TOLERANCE else 0.0
    return Compared(name, str(list(want.shape)), error, error <= max(allowed, floor))


def difference(got: Any, want: torch.Tensor) -> float:
    """The largest absolute difference; of integers, how many differ.

    >>> difference(torch.tensor([1.0, torch.inf]), torch.tensor([1.5, torch.inf]))
    0.5
    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]))
    inf
    """
    if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.numel() == 0 or want.is_meta:
        return 0.0
    got, want = _dense(got), _dense(want)
    if want.dtype not in TOLERANCE:
        return float((got != want).sum())
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, torch.zeros_like(want), got - want).abs().max().item()
    return error if error == error else float("inf")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_sparse else tensor


def _scale(tensor: torch.Tensor) -> float:
    """The largest magnitude of the finite elements."""
    if tensor.numel() == 0 or tensor.is_meta:
        return 0.0
    tensor = _dense(tensor)
    magnitude = tensor.int() if tensor.dtype == torch.bool else tensor.abs()
    if magnitude.dtype.is_floating_point:
        magnitude = magnitude[magnitude.isfinite()]
    return float(magnitude.max()) if magnitude.numel() else 0.0


def _rounding(rows: Sequence[Row], again: Sequence[Any] | None, tolerance: float) -> dict[str, float]:
    """How far one device is from what would be exact, by name; empty where the second run does not tell."""
    found, apart = {}, 0
    for (name, _, want), other in zip(rows, again or (), strict=False):
        if not isinstance(want, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if want.dtype not in TOLERANCE or other.dtype not in TOLERANCE or want.shape != other.shape:
            continue
        wide = torch.complex128 if want.is_complex() else torch.float64
        error = difference(_dense(other).to(wide), _dense(want).to(wide))
        low = max(want.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        apart += error > max(TOLERANCE[low], tolerance) * _scale(want)
        found[name] = error * torch.finfo(want.dtype).eps / torch.finfo(low).eps
    return {} if 2 * apart > len(found) else found
