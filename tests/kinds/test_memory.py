"""Values that lie in one memory: what is written to one is seen in the other, whatever the operators' schemas say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import CaptureError
from tests.helpers import problems_of, run_original, run_simulated

# Their schemas promise a new tensor, or say nothing of the parts of a list.
SILENT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "atleast_1d": lambda h: torch.ops.aten.atleast_1d.default(h),
    "atleast_3d": lambda h: torch.atleast_3d(h[0])[0, 0],
    "atleast_2d of several": lambda h: torch.atleast_2d((h, h[0]))[1],
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h, h[:1])[0],
    "broadcast_tensors, the second": lambda h: torch.broadcast_tensors(h[:1], h[:1])[1],
    "conj_physical of real numbers": torch.conj_physical,
    "cartesian_prod of one": lambda h: torch.cartesian_prod(h[:, 0]),
    "unsafe_chunk of one piece": lambda h: torch.unsafe_chunk(h, 1)[0],
    "unsafe_split": lambda h: torch.unsafe_split(h, 2)[1],
    "histogramdd gives back its edges": lambda h: torch.histogramdd(h.detach()[:, :1], [h[0]])[1][0],
    "histogramdd gives back all": lambda h: torch.histogramdd(h.detach()[:, :2], [h[0], h[:, 1]])[1][1],
    "hsplit": lambda h: torch.hsplit(h, 2)[1],
    "vsplit": lambda h: torch.vsplit(h, [1, 3])[1],
    "feature_dropout of none": lambda h: torch.feature_dropout(h, 0.0, True),
}
STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all of it": lambda h: h.as_strided((2, 2), (1, 3)),
    "within a column": lambda h: h.select(-1, 1).as_strided((2,), (8,)),
    "beside a column": lambda h: h.select(-1, 1).as_strided((2, 2), (1, 2)),
    "before a slice": lambda h: h[1:].as_strided((2, 2), (3, 1), 2),
    "behind nothing": lambda h: h[:0].as_strided((2, 2), (1, 2)),
    "half beside a slice": lambda h: h[1:3].as_strided((3, 4), (8, 1), 8),
    "of what is detached": lambda h: h.detach().as_strided((2, 2), (1, 3)) * h[0, 0],
    "of a view without gradient": lambda h: without(h).as_strided((2, 2), (1, 3)) * h[0, 0],
    "of an einsum": lambda h: torch.einsum("ij->ji", h).as_strided((2, 2), (1, 3)),
}


def without(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return h[1:]


class Net(nn.Module):
    def __init__(self, show: Callable[[torch.Tensor], torch.Tensor], writes: bool, of_input: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.show, self.writes, self.of_input = show, writes, of_input

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x if self.of_input else self.up(x) * 1
        before, shown = h * 2, self.show(h)
        if self.writes:
            shown.add_(1.5)
        return self.down(h) + before, shown * 2, h.flatten()[-9:]


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["tp", "dp"])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("show", SILENT)
def test_a_write_is_seen_wherever_the_memory_is(show: str, of_input: bool, plan: str) -> None:
    check(Net(SILENT[show], True, of_input).double(), plan)


@pytest.mark.parametrize("plan", ["tp", "dp"])
@pytest.mark.parametrize("show", STRIDED)
def test_the_gradient_of_as_strided_goes_to_its_operand_alone(show: str, plan: str) -> None:
    check(Net(STRIDED[show], False, False).double(), plan)


def check(model: Net, plan: str) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    ours, theirs = x.clone(), x.clone()
    made = fxshard.parallelize(model, {"tp": fxshard.tensor_parallel(2), "dp": fxshard.data_parallel(2)}[plan], (x,))
    assert not problems_of(run_simulated(made, (x,)), run_original(model, (x,)))
    model(theirs)
    fxshard.simulate(made, ours)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("show", "writes", "said"),
    [
        (lambda h: torch.einsum("ij->ji", h), True, "writes through aten.einsum.default, which cannot be undone"),
        (STRIDED["beside a column"], True, "beside its operand, and is written to"),
        (lambda h: h.view(torch.int64).as_strided((2,), (1,)), False, "memory of torch.float64 as torch.int64"),
    ],
)
def test_what_cannot_be_followed_is_refused(show: Callable[..., torch.Tensor], writes: bool, said: str) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(CaptureError, match=said):
        fxshard.parallelize(Net(show, writes, False).double(), fxshard.tensor_parallel(2), (x,))
