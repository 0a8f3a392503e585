"""The ruler can fail: at any scale, in any precision, on one element; and it knows what is only rounding."""

from __future__ import annotations

import pytest
import torch

from fxshard.ruler import TOLERANCE, compare

REAL = [dtype for dtype in TOLERANCE if not dtype.is_complex]


def verdict(got: object, want: object, **options: object) -> bool:
    return compare([("x", got, want)], **options)[0].ok  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_one_wrong_element(dtype: torch.dtype, scale: float) -> None:
    want = (torch.linspace(-1, 1, 64, dtype=torch.float64) * scale).to(dtype)
    wrong = want.clone()
    wrong[5] += 4 * TOLERANCE[dtype] * scale
    assert verdict(want.clone(), want)
    assert not verdict(wrong, want)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nearly_right_is_wrong_at_every_scale(scale: float) -> None:
    want = torch.randn(100) * scale
    assert not verdict(want * 1.001, want)
    assert not verdict(torch.zeros(100), want)


def test_what_is_missing_and_what_should_not_be() -> None:
    x = torch.ones(3)
    assert not verdict(None, x)
    assert not verdict(x, None)
    assert not verdict(x.double(), x)
    assert not verdict(x[:2], x)
    assert verdict(torch.zeros(3), None)
    assert not verdict(torch.tensor([1.0, torch.nan, 1.0]), x)
    assert not verdict(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_rounding_of_one_device_is_allowed_and_no_more() -> None:
    """A gradient in which large numbers cancel: all that it holds is rounding."""
    large, noise = torch.randn(50), 1e-8 * torch.randn(50)
    rows = [("large", large.clone(), large), ("noise", noise.flip(0), noise)]
    exact = [large.double(), torch.zeros(50, dtype=torch.float64)]
    assert not all(each.ok for each in compare(rows[1:]))
    assert all(each.ok for each in compare(rows, again=lambda: exact))
    rows[1] = ("noise", noise + 1e-5, noise)
    assert [each.ok for each in compare(rows, again=lambda: exact)] == [True, False]


def test_a_second_run_that_is_about_something_else_counts_for_nothing() -> None:
    want = torch.randn(50)
    assert not verdict(want + 0.1, want, again=lambda: [torch.randn(50, dtype=torch.float64)])


def test_values_of_other_dtypes_do_not_widen_what_is_allowed() -> None:
    want, noise = torch.randn(50), 1e-8 * torch.randn(50)
    rows = [("large", want, want), ("noise", noise + 1e-4, noise), ("mask", want > 0, want > 0)]
    rows += [("ids", torch.tensor([2**40]), torch.tensor([2**40]))]
    exact = [want.double(), torch.zeros(50, dtype=torch.float64), want > 0, torch.tensor([2**40])]
    assert [each.ok for each in compare(rows, again=lambda: exact)] == [True, False, True, True]
    assert not verdict(torch.tensor([True]), None)
