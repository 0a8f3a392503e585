"""Bad input: one error that says what, where and how to mend it, before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Mesh, Plan, Replicate, Shard, data_parallel, tensor_parallel
from fxshard.errors import CaptureError, DivisibilityError, FxshardError, InputError, MeshError, PlanError
from fxshard.placement import BlockShard

X = torch.ones(4, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.down(self.act(self.up(x)))
        return y if scale is None else y * scale


def refused(kind: type[FxshardError], plan: Any, *args: Any, model: Any = None, **options: Any) -> FxshardError:
    """The one error, after a look at its parts."""
    with pytest.raises(FxshardError) as caught:
        fxshard.parallelize(model if model is not None else Net(), plan, args or (X,), **options)
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    assert error.what
    assert error.what in str(error)
    return error


def says(error: FxshardError, *parts: str) -> None:
    for part in parts:
        assert re.search(part, str(error)), f"{part!r} is not said in:\n{error}"


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "glob", "near"),
    [
        ("params", "upp.weight", "'up.weight'"),
        ("params", "up.wieght", "'up.weight'"),
        ("params", "layers.*.weight", r"'(up|down)\.weight'"),
        ("inputs", "xx", "'x'"),
        ("activations", "dwn", "'down'"),
        ("params", "zzzzzzzz", "names are 'up.weight', 'up.bias'"),
    ],
)
def test_a_glob_that_matches_nothing(part: str, glob: str, near: str) -> None:
    error = refused(PlanError, Plan({"tp": 2}, **{part: {glob: Shard(0)}}))
    says(error, f"{part} '{re.escape(glob)}' matches no")
    assert error.fix
    assert re.search(near, error.fix), error


def test_an_unknown_axis() -> None:
    for part, name in (("params", "up.weight"), ("inputs", "x"), ("activations", "up"), ("outputs", "0")):
        error = refused(PlanError, Plan({"dp": 2, "tp": 2}, **{part: {name: {"pp": Shard(0)}}}))
        says(error, part, "there is no mesh axis 'pp'", "use one of 'dp', 'tp'")


def test_a_bare_placement_on_several_axes() -> None:
    with pytest.raises(PlanError, match=r"params\['up.weight'\] is Shard\(0\), but the mesh .* several axes") as caught:
        Plan({"dp": 2, "tp": 2}, params={"up.weight": Shard(0)})
    assert caught.value.fix == "say which: {'dp': Shard(0)}"


@pytest.mark.parametrize(
    ("part", "name", "dim", "shape", "last"),
    [
        ("params", "up.weight", 2, "12, 8", 1),
        ("params", "up.weight", -3, "12, 8", 1),
        ("params", "up.bias", 1, "12", 0),
        ("inputs", "x", 2, "4, 8", 1),
        ("activations", "up", 5, "4, 12", 1),
        ("outputs", "0", 2, "4, 8", 1),
    ],
)
def test_a_dim_out_of_range(part: str, name: str, dim: int, shape: str, last: int) -> None:
    error = refused(PlanError, Plan({"tp": 2}, **{part: {name: Shard(dim)}}))
    says(error, part, rf"of shape \[{shape}\] has no dim {dim}", f"use a dim from -{last + 1} to {last}")


@pytest.mark.parametrize(
    ("blocks", "shares", "mend"),
    [
        ((1,), (3, 2), "give the shares of 5 pieces as many ranks"), ((1,), (1, 2, 3), "as many ranks as the axis has"),
        ((1, 1, 1, 1, 1), (), "choose blocks that tile 12"),
    ],
)  # fmt: skip
def test_a_cut_that_does_not_fit(blocks: tuple[int, ...], shares: tuple[int, ...], mend: str) -> None:
    error = refused(DivisibilityError, Plan({"tp": 2}, params={"up.weight": BlockShard(0, blocks, shares)}))
    says(error, r"dim 0 \(size 12\) of up.weight", r"mesh axis 'tp' \(size 2\)", "params", mend, "replicate dim 0")
    assert error.op, "the entry of the plan"


def test_two_axes_that_divide_alone_but_not_together() -> None:
    entry = {"a": Shard(0), "b": Shard(0)}
    error = refused(DivisibilityError, Plan({"a": 4, "b": 6}, params={"up.weight": entry}))
    says(error, r"dim 0 \(size 12\) of up.weight", r"axis 'b' \(size 6\) beside axes of sizes \[4\]")


def test_every_offender_is_listed() -> None:
    plan = Plan(
        {"tp": 5, "dp": 2},
        params={
            "upp.weight": {"tp": Shard(0)},
            "up.weight": {"tp": Shard(0), "dp": Shard(0)},
            "down.weight": {"tp": Shard(3)},
            "up.bias": {"pp": Shard(0)},
        },
        inputs={"y": {"tp": Shard(0)}},
        outputs={"0": {"tp": BlockShard(1, (1, 1, 1))}, "7": {"tp": Shard(0)}},
    )
    error = refused(PlanError, plan)
    says(
        error, "7 entries of the plan cannot be applied", r"1\. .*'upp.weight' matches no", "'up.weight'",
        r"2\. dim 0 \(size 12\) of up.weight", r"3\. .*down.weight .* has no dim 3", r"4\. .*no mesh axis 'pp'",
        r"5\. inputs 'y' matches no input", r"6\. dim 1 \(size 8\) of output 0",
        r"7\. outputs '7' matches none of the 1",
    )  # fmt: skip
    assert str(error).count("fix ") == 7


def test_what_the_plan_contradicts_itself_on() -> None:
    error = refused(PlanError, Plan({"tp": 2}, params={"up.*": Shard(0), "up.weight": Shard(1)}))
    says(error, r"up.weight is asked to be both Shard\(0\) and Shard\(1\) on axis 'tp'", "let one entry")


class Unread(Net):
    """Has a weight that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(8, 8))


UNEVEN = BlockShard(0, shares=(4, 4, 2, 2))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"params": {"*.weight": Shard(0), "up.weight": UNEVEN}}, "up.weight is asked to be both Shard"),
        ({"params": {"up.weight": UNEVEN, "up.w*": Shard(0)}}, "up.weight is asked to be both Shard"),
        ({"params": {"up.weight": BlockShard(0, (1, 2)), "up.*": Shard(0)}}, "up.weight is asked to be both Shard"),
        ({"params": {"spare": Shard(0), "spar?": Shard(1)}}, "spare is asked to be both Shard"),
        ({"inputs": {"x": Shard(0), "*": Replicate()}}, "x is asked to be both Shard"),
        ({"activations": {"up": Shard(-1), "u*": Shard(0)}}, "up is asked to be both Shard"),
        ({"outputs": {"*": {"tp": Shard(0)}, "0": {"tp": Shard(1)}}}, "output 0 is asked to be both Shard"),
    ],
)
def test_no_entry_of_a_plan_is_dropped_for_another(entries: dict[str, Any], said: str) -> None:
    says(refused(PlanError, Plan({"tp": 4}, **entries), model=Unread()), said, "let one entry")


def test_what_is_asked_twice_alike_is_asked_once() -> None:
    twice = {"*.weight": Shard(0), "up.weight": Shard(0), "up.weigh?": Shard(-2)}
    program = fxshard.parallelize(Net(), Plan({"tp": 4}, params=twice, outputs={"*": Shard(0), "0": Shard(-2)}), (X,))
    assert program.placements_of("up.weight") == (Shard(0),)


def test_no_mesh() -> None:
    says(refused(MeshError, Plan(params={"up.weight": Shard(0)})), "does not say on which mesh", r"mesh=\{'tp': 2\}")
    says(refused(MeshError, {"up.weight": Shard(0)}), "does not say on which mesh", r"mesh=\{'tp': 2\}")


def test_a_mesh_that_is_none() -> None:
    says(refused(MeshError, tensor_parallel(2), mesh={"dp": 2}), r"\['tp'\].*does not have")
    says(refused(MeshError, {"up.weight": Shard(0)}, mesh={"tp": 0}), "'tp' has size 0")
    says(refused(MeshError, {"up.weight": Shard(0)}, mesh="tp"), "cannot make a mesh of 'tp'")
    says(refused(MeshError, tensor_parallel(2), mesh=Mesh(("tp",), (4,))), "size 2 in one plan and 4 in the other")
    for sizes in ({}, {"a b": 2}, {"tp": 1.5}):
        with pytest.raises(MeshError):
            Plan(sizes)


@pytest.mark.parametrize("plan", [None, 3, "tp", ["tp"], tensor_parallel, {"up.weight": 0}, {"up.weight": "colwize"}])
def test_no_plan(plan: Any) -> None:
    error = refused(PlanError, plan, mesh={"tp": 2})
    assert error.fix


def test_a_partial_weight() -> None:
    says(refused(PlanError, Plan({"tp": 2}, params={"up.weight": fxshard.Partial()})), "up.weight cannot be Partial")


@pytest.mark.parametrize("model", [torch.nn.functional.gelu, Net, "gpt2", None])
def test_no_module(model: Any) -> None:
    with pytest.raises(PlanError, match=r"not an nn\.Module") as caught:
        fxshard.parallelize(model, tensor_parallel(2), (X,))
    assert type(model).__name__ in caught.value.what
    assert caught.value.fix


# --- models ---------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1  # type: ignore[no-any-return]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() > 0:  # the line
            return x * 2
        return x


def line_of(text: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(text))


def test_a_model_that_cannot_be_exported() -> None:
    error = refused(CaptureError, data_parallel(2), model=Branches())
    says(
        error, "cannot be captured", "data-dependent|[Uu]nbacked|GuardOn", f"test_bad_input.py:{line_of('# the line')}"
    )
    assert error.module == "inner"
    assert error.fix


def test_a_model_that_fails_by_itself() -> None:
    error = refused(CaptureError, tensor_parallel(2), torch.ones(4, 9))
    says(error, "cannot be captured", r"4 ?[x,] ?9")
    assert error.module == "up"
    assert error.source


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "parts"),
    [
        ((torch.ones(3, 8),), {}, ["x", "4", "3"]),
        ((torch.ones(4, 8, 1),), {}, ["x"]),
        ((torch.ones(4, 8, dtype=torch.float64),), {}, ["x", "f(loat)?64"]),
        ((), {}, ["x"]),
        ((X, torch.ones(8)), {}, ["scale"]),
        ((X,), {"scael": X}, ["scael"]),
        ((X, None, X), {}, ["too many"]),
        (("text",), {}, ["x"]),
    ],
)
def test_inputs_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[str]) -> None:
    program = fxshard.parallelize(Net(), tensor_parallel(2), (X,))
    for call in (lambda: program(*args, **kwargs), lambda: fxshard.simulate(program, *args, **kwargs)):
        with pytest.raises(InputError, match="inputs") as caught:
            call()
        says(caught.value, *parts)
        assert caught.value.fix


@pytest.mark.parametrize("value", [{X}, iter([X]), X.numpy(), [b"x"]], ids=lambda value: type(value).__name__)
def test_an_input_that_is_no_tensor_and_no_plain_value(value: Any) -> None:
    says(refused(InputError, tensor_parallel(2), value), "x", "of which a graph knows nothing")


def test_example_inputs_that_forward_does_not_take() -> None:
    says(refused(InputError, tensor_parallel(2), X, X, X), "do not fit the model's forward", r"forward\(")
    says(refused(InputError, tensor_parallel(2), X, kwargs={"scael": X}), "scael", r"forward\(")


def test_what_is_asked_too_early() -> None:
    program = fxshard.parallelize(Net(), tensor_parallel(2))
    for ask in (program.collectives, program.explain, program.code, program.print_tabular):
        with pytest.raises(FxshardError, match="has not been captured yet"):
            ask()


def test_a_rank_and_a_stage_that_are_none() -> None:
    program = fxshard.parallelize(Net(), tensor_parallel(2), (X,))
    with pytest.raises(MeshError, match="rank 2 is outside of the mesh"):
        program.rank_module(2)
    with pytest.raises(MeshError, match="rank -1 is outside of the mesh"):
        program.code(-1)
    with pytest.raises(ValueError, match="there is no stage 'emit'; the stages are capture, normalize"):
        program.graph_after("emit")


def test_nothing_ran() -> None:
    """A plan with an error leaves the model as it was."""
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(PlanError, Plan({"tp": 2}, params={"nothing": Shard(0)}), model=model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    with pytest.raises(InputError):
        program(torch.ones(4, 9))
