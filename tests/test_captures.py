"""Which capture is shown: the one that is named, or the first, whatever was called last; and it says which."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import nn

import fxshard
from fxshard.captures import weights_lie
from fxshard.errors import FxshardError, InputError
from fxshard.parts import Parts
from fxshard.passes.pipeline import Compiled
from fxshard.weights.original_model import Original

X = torch.randn(4, 8)
MESH = fxshard.Mesh(("dp",), (2,))


class Net(nn.Module):
    """Computes more in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden).tanh() if self.training else self.down(hidden)


def made() -> fxshard.ParallelModule:
    return fxshard.parallelize(Net(), fxshard.tensor_parallel(2), (X,))


def shown(program: fxshard.ParallelModule, capture: int | None = None) -> tuple[str, ...]:
    table = io.StringIO()
    program.print_tabular(table, capture)
    return program.code(0, capture), program.explain(capture), table.getvalue()


def test_what_is_shown_does_not_depend_on_what_was_called_last() -> None:
    program = made()
    alone = shown(program)
    assert not any("capture 0" in text for text in alone)
    fxshard.simulate(program.eval(), X)
    first = shown(program)
    fxshard.simulate(program.train(), X)
    assert first == shown(program) == shown(program, 0)
    assert program.captures == ("train, x: float32[4, 8]", "eval, x: float32[4, 8]")
    assert "Capture 0 of 2: train" in first[0]
    assert ".tanh()  #" in first[0]
    assert all(text.startswith("capture 0 of 2: train, x: float32[4, 8]\n\n") for text in first[1:])
    other = shown(program, 1)
    assert "Capture 1 of 2: eval" in other[0]
    assert ".tanh()  #" not in other[0]
    assert "tanh" in str(program.graph_after("normalize"))
    assert "tanh" not in str(program.graph_after("normalize", capture=1))
    assert program.collectives(capture=1) == program.collectives()
    assert program.fallbacks(capture=1) == []
    assert str(program.coverage(capture=1)) == str(program.coverage())


@pytest.mark.parametrize("capture", [2, -1])
def test_a_capture_that_is_not_there(capture: int) -> None:
    program = made()
    with pytest.raises(InputError, match=f"there is no capture {capture}: there are 1"):
        program.explain(capture)
    fxshard.simulate(program.eval(), X)
    for ask in (program.explain, partial(program.code, 0), partial(program.print_tabular, None), program.collectives):
        with pytest.raises(InputError, match=f"there is no capture {capture}: there are 2"):
            ask(capture)


def test_nothing_is_shown_before_the_first_capture() -> None:
    program = fxshard.parallelize(Net(), fxshard.tensor_parallel(2))
    assert program.captures == ()
    for ask in (program.code, program.explain, program.collectives, lambda: program.rank_module(1)):
        with pytest.raises(FxshardError, match="has not been captured yet"):
            ask()


def test_outputs_that_the_captures_place_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxshard.parallelize(Net(), fxshard.Plan(MESH, outputs={"dp": fxshard.Shard(0)}), (X,))
    run = fxshard.simulate(program.eval(), X)
    split = (fxshard.Shard(0),)
    assert program.output_placements(0) == program.output_placements(0, capture=1) == split
    assert run.outputs[0].shape == (2, 8)
    with pytest.raises(InputError, match="no tensor as output 3"):
        program.output_placements(3)
    right = Compiled.output_placements
    monkeypatch.setattr(
        Compiled, "output_placements", lambda c, i: right(c, i) if c.captured.training else (fxshard.Replicate(),)
    )
    with pytest.raises(InputError, match="output 0 lies differently in each capture"):
        program.output_placements(0)
    assert program.output_placements(0, capture=0) == split


def test_parts_alone() -> None:
    """The parts of a model, without a program around them."""
    model, program = Net(), made()
    parts = Parts(Original(model), program.mesh)
    with pytest.raises(FxshardError, match="has not been captured yet"):
        parts.of(0)
    compiled = program.compiled
    parts.settle(weights_lie(compiled, [name for name, _ in parts.tensors()]), compiled, training=False)
    assert not parts.made
    assert torch.equal(parts.of(1).up.weight, model.up.weight[8:])
    assert list(parts.made) == [1]
    assert not parts.of(1).training
    with torch.no_grad():
        model.up.weight.zero_()
    assert parts.of(0).up.weight.abs().sum() > 0  # the other ranks hold the weights of the moment
    parts.check_alike()
    with torch.no_grad():
        parts.of(0).up.weight.zero_()
    with pytest.raises(InputError, match=r"the ranks differ: up\.weight was changed on rank 0"):
        parts.check_alike()
