"""Symbolic batches and lengths: one capture serves many sizes, and says which ones it does not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxshard
from fxshard.errors import CaptureError, InputError
from tests.helpers import problems_of, run_original, run_simulated, slow_but_for
from tests.models.zoo import MODELS, build, dynamic, ids, images, padding, sized
from tests.presets import presets

PLANS = presets("tp2", "dp2", "sp2", "dp2_tp2", "dp2_sp2", "tp4", "sp4", "dp4")
each_model = pytest.mark.parametrize("name", MODELS)


def compiled(name: str, plan: str) -> fxshard.ParallelModule:
    model, inputs = build(name)
    return fxshard.parallelize(model, PLANS[plan], (), inputs, dynamic_shapes=dynamic(name))


def check(program: fxshard.ParallelModule, name: str, batch: int, length: int) -> int:
    """Runs other sizes; returns how many captures there are now."""
    call = sized(name, batch, length)
    problems = problems_of(run_simulated(program, (), call), run_original(build(name)[0], (), call))
    assert not problems, "\n".join([f"at batch {batch}, length {length}:", *problems[:10]])
    return len(program._captures.all)


@pytest.mark.thin(2)
@pytest.mark.in_turn(4)
@slow_but_for("plan", PLANS, "dp2_tp2")
@each_model
def test_one_capture_serves_many_sizes(name: str, plan: str) -> None:
    program = compiled(name, plan)
    sizes = ((4, 16), (8, 12), (8, 24)) if "4" in plan else ((4, 16), (6, 12), (2, 24))
    assert [check(program, name, batch, length) for batch, length in sizes] == [1, 1, 1]


@pytest.mark.thin(2)
@pytest.mark.in_turn(4)
@slow_but_for("name, plan", product(MODELS, ("dp2", "sp4", "dp2_tp2", "dp2_sp2")), ("llama", "dp2_sp2"), ("vit", "dp2"))
def test_sizes_that_do_not_divide_are_captured_for_themselves(name: str, plan: str) -> None:
    """Each once; those that divide are still served by the first capture."""
    program = compiled(name, plan)
    cuts_batch, cuts_length = "dp" in plan, "sp" in plan and name != "vit"
    counts = [check(program, name, *size) for size in ((5, 16), (4, 17), (5, 16), (4, 17), (8, 24))]
    alone = [cuts_batch, cuts_batch + cuts_length]
    assert counts == [1 + n for n in (*alone, alone[1], alone[1], alone[1])]


# --- sizes that no capture serves -----------------------------------------------------------------------------------


def refused(program: fxshard.ParallelModule, **inputs: Any) -> str:
    with pytest.raises(InputError) as caught:
        fxshard.simulate(program, **inputs)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("plan", ["tp2", "dp2_sp2"])
def test_sizes_outside_of_the_range(plan: str) -> None:
    program = compiled("llama", plan)
    assert "input_ids: dim 0 is 65, outside of its range 2 to 64" in refused(program, input_ids=ids(65, 16))
    assert "input_ids: dim 1 is 1, outside of its range 2 to 64" in refused(program, input_ids=ids(4, 1))
    assert "input_ids: expected int64[" in refused(program, input_ids=ids(4, 16).int())
    assert len(program._captures.all) == 1


def test_sizes_that_must_be_equal() -> None:
    text = refused(compiled("bert", "dp2"), input_ids=ids(2, 16), attention_mask=padding(2, 17))
    assert "attention_mask: dim 1 is 17, but the same dynamic size" in text
    assert "is 16 in another input" in text


def test_sizes_that_were_not_named() -> None:
    text = refused(compiled("vit", "dp2"), pixel_values=images(32, 40).double())
    assert "pixel_values: expected float64[" in text
    assert "got float64[4, 3, 32, 40] (dim 2)" in text
    assert "dynamic_shapes" in text


class Branching(nn.Module):
    """A model that decides by the sizes of its input."""

    def __init__(self, test: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.test = test
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.up(x).relu())
        return y * 2 if self.test(x.shape) else y


Size = tuple[int, int]
BRANCHES: dict[str, tuple[Callable[[torch.Size], bool], Size, Size, Size]] = {
    "x.shape[0] % 2 == 0": (lambda s: s[0] % 2 == 0, (4, 6), (8, 5), (7, 5)),
    "x.shape[0] != 6": (lambda s: s[0] != 6, (4, 6), (8, 5), (6, 5)),
    "x.shape[0] < x.shape[1]": (lambda s: s[0] < s[1], (4, 6), (4, 7), (8, 7)),
    "outside of its range 9 to inf": (lambda s: s[0] > 8, (10, 6), (12, 5), (8, 5)),
    "outside of its range 2 to 8": (lambda s: s[0] > 8, (4, 6), (6, 5), (12, 5)),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("said", BRANCHES)
@pytest.mark.parametrize("plan", ["tp2", "dp2"])
def test_a_branch_on_a_size(plan: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """The capture is one branch: sizes of the other one are captured for themselves, and that is said."""
    test, example, fitting, other = BRANCHES[said]
    model = Branching(test)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = fxshard.parallelize(model, PLANS[plan], (torch.randn(*example, 8),), dynamic_shapes=shapes)
    for size in (fitting, other, fitting):
        x = torch.randn(*size, 8)
        with caplog.at_level("INFO", "fxshard"):
            for output in fxshard.simulate(program, x).outputs:
                torch.testing.assert_close(output, model(x))
    assert any(said in record.message and f"is {other[0]}" in record.message for record in caplog.records)
    assert 2 <= len(program._captures.all) <= 3


def test_a_named_size_that_the_model_branches_on_is_refused_at_capture() -> None:
    model = Branching(lambda s: s[0] % 2 == 0)
    with pytest.raises(CaptureError, match=r"batch.* % 2") as caught:
        fxshard.parallelize(model, PLANS["tp2"], (torch.randn(4, 6, 8),), dynamic_shapes=({0: Dim("batch")},))
    assert "dynamic_shapes" in caught.value.fix


class Chunked(nn.Module):
    """A sequence padded to whole chunks, and folded, as state-space models do."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.up, self.chunk = nn.Linear(8, 8), chunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = (self.chunk - x.shape[1] % self.chunk) % self.chunk
        y = nn.functional.pad(self.up(x), (0, 0, 0, pad))
        y = y.reshape(y.shape[0], -1, self.chunk, 8)
        y = y.cumsum(2) + y.sum(2, keepdim=True)
        return y.reshape(y.shape[0], -1, 8)[:, : x.shape[1]]


@pytest.mark.thin(2)
@pytest.mark.parametrize("chunk", [3, 4])
@pytest.mark.parametrize("plan", ["dp2", "tp2"])
def test_a_fold_of_two_dynamic_sizes(plan: str, chunk: int) -> None:
    model = Chunked(chunk)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = fxshard.parallelize(model, PLANS[plan], (torch.randn(4, 12, 8),), dynamic_shapes=shapes)
    for batch, length in ((6, 12), (8, 16), (2, 10), (4, 7)):
        x = torch.randn(batch, length, 8)
        for output in fxshard.simulate(program, x).outputs:
            torch.testing.assert_close(output, model(x))
