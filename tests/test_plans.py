"""How a plan resolves: globs, dims, axes, presets, composition, and the explicit plan that comes out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Mesh, Plan, Replicate, Shard, data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import MeshError, PlanError
from tests.helpers import assert_equivalent, problems_of, run_original, run_simulated


class MLP(nn.Module):
    def __init__(self, size: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Two residual blocks, a table, and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.blocks = nn.ModuleList(MLP() for _ in range(2))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.linspace(1, 2, 8))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x * self.scale), x.mean()


def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().double()


IDS = torch.arange(4 * 6).view(4, 6) % 12


def parallelize(plan: Any, **options: Any) -> fxshard.ParallelModule:
    """Compiles and compares with the original."""
    return assert_equivalent(model(), plan, (IDS,), **options)


def params_of(program: fxshard.ParallelModule) -> dict[str, str]:
    return {name: str({a: str(p) for a, p in e.items()}) for name, e in program.plan.params.items()}


# --- the ways to write a plan ---------------------------------------------------------------------------------------


def test_dict_of_globs_on_one_axis() -> None:
    program = parallelize({"*.up.*": Shard(0), "*.down.weight": Shard(1)}, mesh={"tp": 2})
    assert program.plan.params == {
        **{f"blocks.{i}.up.{n}": {"tp": Shard(0)} for i in (0, 1) for n in ("weight", "bias")},
        **{f"blocks.{i}.down.weight": {"tp": Shard(1)} for i in (0, 1)},
    }
    assert [c.kind for c in program.collectives()] == ["all_reduce"] * 4
    assert program.rank_module(1).blocks[1].up.weight.shape == (8, 8)


@pytest.mark.parametrize("mesh", [{"tp": 2}, Mesh(("tp",), (2,)), 2])
def test_mesh_beside_the_plan(mesh: Any) -> None:
    plan = Plan(params={"*.up.*": Shard(0), "*.down.weight": {"tp": Shard(1)}})
    program = parallelize(plan, mesh=mesh)
    assert program.mesh == Mesh(("tp",), (2,))
    assert params_of(program) == params_of(parallelize({"*.up.*": Shard(0), "*.down.weight": Shard(1)}, mesh=2))


def test_negative_dims_count_from_the_end() -> None:
    program = parallelize({"*.up.weight": Shard(-2), "*.up.bias": Shard(-1), "*.down.weight": Shard(-1)}, mesh=2)
    assert program.plan.params["blocks.0.up.weight"] == {"tp": Shard(0)}
    assert program.plan.params["blocks.0.up.bias"] == {"tp": Shard(0)}
    assert program.plan.params["blocks.0.down.weight"] == {"tp": Shard(1)}
    split = fxshard.parallelize(model(), Plan({"tp": 2}, inputs={"ids": Shard(-2)}, outputs={"0": Shard(-3)}), (IDS,))
    assert split.plan.inputs["ids"] == {"tp": Shard(0)}
    assert split.plan.outputs["0"] == {"tp": Shard(0)}


def test_a_dict_may_name_modules() -> None:
    """What the module returns is split."""
    program = parallelize({"norms.?": Shard(1)}, mesh={"tp": 2})
    assert program.plan.activations == {"norms.0": {"tp": Shard(1)}, "norms.1": {"tp": Shard(1)}}
    assert program.plan.params == {}


def test_sequence_parallelism_by_hand() -> None:
    params = {"*.up.*": Shard(0), "*.down.weight": Shard(1)}
    program = parallelize(Plan({"tp": 2}, params=params, activations={"table": Shard(1), "norms.*": Shard(1)}))
    assert program.plan.activations == {n: {"tp": Shard(1)} for n in ("table", "norms.0", "norms.1")}
    kinds = [c.kind for c in program.collectives() if c.phase == "forward" and "blocks" in c.module]
    assert kinds.count("reduce_scatter") == 2
    gathers = [c for c in program.collectives() if c.phase == "forward" and c.module.startswith("norms")]
    assert [c.kind for c in gathers] == ["all_gather"] * 2


def test_buffers_are_split_too() -> None:
    program = parallelize({"scale": Shard(0)}, mesh={"tp": 4})
    assert program.rank_module(3).scale.tolist() == model().scale[6:].tolist()
    assert torch.equal(program.full_state_dict()["scale"], model().scale)


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_tied_weights_go_by_either_name(name: str) -> None:
    program = parallelize({name: Shard(0)}, mesh={"tp": 3})
    local = program.rank_module(1)
    assert local.table.weight is local.head.weight
    assert local.table.weight.shape == (4, 8)


def test_exact_name_goes_before_glob_characters() -> None:
    class Bracket(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["a0"](self.layers["a[0]"](x))  # type: ignore[no-any-return]

    program = fxshard.parallelize(Bracket(), {"layers.a[0].weight": Shard(0)}, (torch.randn(2, 4),), mesh=2)
    assert list(program.plan.params) == ["layers.a[0].weight"]


# --- several axes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{"a": 2, "b": 2}, {"b": 2, "a": 2}, {"a": 2, "b": 4}])
def test_two_axes_on_one_dim_cut_in_the_order_of_the_mesh(mesh: dict[str, int]) -> None:
    program = parallelize(Plan(mesh, params={"*.up.weight": {"b": Shard(0), "a": Shard(0)}}))
    weight = model().blocks[0].up.weight
    pieces = weight.chunk(program.mesh.world_size, 0)
    for rank, piece in enumerate(pieces):
        assert torch.equal(program.rank_module(rank).blocks[0].up.weight, piece)


def test_two_axes_on_two_dims() -> None:
    program = parallelize(Plan({"a": 2, "b": 4}, params={"*.up.weight": {"a": Shard(0), "b": Shard(1)}}))
    weight = model().blocks[1].up.weight
    for rank in range(8):
        a, b = program.mesh.coordinate(rank)
        assert torch.equal(program.rank_module(rank).blocks[1].up.weight, weight.chunk(2, 0)[a].chunk(4, 1)[b])


def test_an_axis_of_one_rank_changes_nothing() -> None:
    program = parallelize(data_parallel(1) | tensor_parallel(2))
    alone = parallelize(tensor_parallel(2))
    assert [(c.kind, c.num_bytes) for c in program.collectives()] == [
        (c.kind, c.num_bytes) for c in alone.collectives()
    ]
    assert not parallelize(tensor_parallel(1)).collectives()


# --- presets and composition ----------------------------------------------------------------------------------------


def test_tensor_parallel_knows_no_names() -> None:
    class Odd(nn.Module):
        """MLP, packed attention and two heads, under names that say nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.z1 = nn.Linear(8, 24)
            self.z2 = nn.Linear(8, 8)
            self.y1 = nn.Parameter(torch.randn(8, 32))
            self.y2 = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.z1(x).split(8, -1))
            x = x + self.z2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            left, right = (x @ self.y1).chunk(2, -1)
            return x + (left.sigmoid() * right) @ self.y2

    torch.manual_seed(0)
    program = assert_equivalent(Odd().double(), tensor_parallel(2), (torch.randn(2, 3, 8).double(),))
    assert {n: str(e["tp"]) for n, e in program.plan.params.items()} == {
        "z1.weight": "Shard(0, blocks=(1, 1, 1))",
        "z1.bias": "Shard(0, blocks=(1, 1, 1))",
        "z2.weight": str(Shard(1)),
        "y1": "Shard(1, blocks=(1, 1))",
        "y2": str(Shard(0)),
    }
    assert [c.phase for c in program.collectives()] == ["forward", "forward", "backward"]
    assert {c.kind for c in program.collectives()} == {"all_reduce"}


class Between(nn.Module):
    """The inner features are sorted between the two weights: they make no pair."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).sort(-1).values)  # type: ignore[no-any-return]


def test_no_pair_is_a_note_never_silent() -> None:
    program = fxshard.parallelize(Between(), tensor_parallel(2), (torch.randn(64, 8),))
    assert program.plan.params == {}
    assert "found no weight" in "\n".join(program.compiled.resolved.notes)
    assert "found no weight" in program.explain()


def test_what_the_user_names_stays_as_named_beside_a_preset() -> None:
    keep = Plan({"tp": 2}, params={"table.weight": Replicate(), "blocks.0.up.weight": Shard(1)})
    program = parallelize(tensor_parallel(2) | keep)
    assert params_of(program)["table.weight"] == str({"tp": str(Replicate())})
    assert program.plan.params["blocks.0.up.weight"] == {"tp": Shard(1)}
    assert program.rank_module(0).table.weight.shape == (12, 8)
    assert program.plan.params["blocks.1.up.weight"] == {"tp": Shard(0)}


def test_composition_joins_meshes_and_entries() -> None:
    plan = data_parallel(2) | tensor_parallel(4)
    assert plan.mesh == Mesh(("dp", "tp"), (2, 4))
    assert plan.presets == (("data_parallel", "dp"), ("tensor_parallel", "tp"))
    assert (tensor_parallel(4) | data_parallel(2)).mesh == Mesh(("tp", "dp"), (4, 2))
    assert tensor_parallel(2) | tensor_parallel(2) == tensor_parallel(2)
    both = Plan({"a": 2}, params={"w": Shard(0)}) | Plan({"b": 2}, params={"w": Shard(1)})
    assert both.params == {"w": {"a": Shard(0), "b": Shard(1)}}


def test_composition_refuses_what_disagrees() -> None:
    with pytest.raises(PlanError, match=r"disagree on params 'w', axis 'a': Shard\(0\) and Shard\(1\)"):
        _ = Plan({"a": 2}, params={"w": Shard(0)}) | Plan({"a": 2}, params={"w": Shard(1)})
    with pytest.raises(MeshError, match="'tp' has size 2 in one plan and 4 in the other"):
        _ = tensor_parallel(2) | tensor_parallel(4)


def test_presets_take_any_axis_name() -> None:
    program = parallelize(data_parallel(2, axis="left") | tensor_parallel(2, axis="right"))
    assert program.mesh.names == ("left", "right")
    assert {c.axis for c in program.collectives()} == {"left", "right"}


def test_data_parallel_splits_what_has_the_batch_and_leaves_the_rest() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, table: torch.Tensor, factor: torch.Tensor, n: int) -> torch.Tensor:
            return (self.linear(x) @ table) * factor + n  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = (torch.randn(4, 8).double(), torch.randn(8, 8).double(), torch.tensor(2.0).double(), 3)
    program = assert_equivalent(Several().double(), data_parallel(2), inputs)
    assert program.plan.inputs == {"x": {"dp": Shard(0)}}


# --- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_come_back_whole_unless_the_plan_leaves_them_split() -> None:
    whole = fxshard.simulate(fxshard.parallelize(model(), data_parallel(2), (IDS,)), IDS).outputs
    plan = data_parallel(2) | Plan({"dp": 2}, outputs={"dp": Shard(0)})
    program = fxshard.parallelize(model(), plan, (IDS,))
    split = fxshard.simulate(program, IDS).outputs
    assert [o[0].shape for o in split] == [(2, 6, 12)] * 2
    torch.testing.assert_close(torch.cat([o[0] for o in split]), whole[0][0])
    assert torch.equal(split[0][1], split[1][1])  # the scalar is whole all the same
    torch.testing.assert_close(split[0][1], whole[0][1])


def test_outputs_by_position() -> None:
    program = fxshard.parallelize(model(), Plan({"tp": 2}, outputs={"0": {"tp": Shard(2)}}), (IDS,))
    outputs = fxshard.simulate(program, IDS).outputs
    assert [o[0].shape for o in outputs] == [(4, 6, 6)] * 2
    assert program.plan.outputs == {"0": {"tp": Shard(2)}}


def test_gradients_of_split_outputs_are_the_sum_of_the_ranks_losses() -> None:
    plan = data_parallel(2) | Plan({"dp": 2}, outputs={"dp": Shard(0)})
    original = run_original(model(), (IDS,), loss=lambda o: o[0].square().sum())
    simulated = run_simulated(fxshard.parallelize(model(), plan, (IDS,)), (IDS,), loss=lambda o: o[0].square().sum())
    simulated.outputs = original.outputs * 2
    assert not problems_of(simulated, original)


# --- the explicit plan ----------------------------------------------------------------------------------------------

PRESETS = {
    "tp": tensor_parallel(2),
    "sp": sequence_parallel(2),
    "dp": data_parallel(2),
    "dp_tp": data_parallel(2) | tensor_parallel(2),
    "tp_tp": tensor_parallel(2, "a") | tensor_parallel(2, "b"),
    "split outputs": data_parallel(2) | Plan({"dp": 2}, outputs={"dp": Shard(0)}),
}


@functools.cache
def _gpt2() -> tuple[nn.Module, dict[str, Any]]:
    from tests.models.zoo import build

    return build("gpt2")


def _same_program(one: fxshard.ParallelModule, other: fxshard.ParallelModule) -> None:
    assert one.collectives() == other.collectives()
    for rank in range(one.mesh.world_size):
        assert one.code(rank) == other.code(rank)
        mine, theirs = one.rank_module(rank).state_dict(), other.rank_module(rank).state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.thin(2)
@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "tp_tp"])
def test_the_explicit_plan_gives_the_same_program_through_json(preset: str) -> None:
    gpt2, inputs = _gpt2()
    program = fxshard.parallelize(gpt2, PRESETS[preset], (), inputs)
    assert program.plan.presets == ()
    text = program.plan.to_json()
    back = Plan.from_json(text)
    assert back == program.plan
    assert back.to_json() == text
    again = fxshard.parallelize(gpt2, back, (), inputs)
    assert again.plan == program.plan
    _same_program(program, again)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip_through_json(preset: str) -> None:
    assert Plan.from_json(PRESETS[preset].to_json()) == PRESETS[preset]


def test_an_edited_plan_is_a_plan() -> None:
    explicit = fxshard.parallelize(model(), tensor_parallel(2), (IDS,)).plan
    edited = dict(explicit.params)
    for name in ("blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.weight"):
        del edited[name]
    program = parallelize(Plan(explicit.mesh, edited, outputs=explicit.outputs))
    assert program.rank_module(0).blocks[1].up.weight.shape == (16, 8)
    assert program.rank_module(0).blocks[0].up.weight.shape == (8, 8)


def test_a_plan_prints_every_entry() -> None:
    program = fxshard.parallelize(model(), data_parallel(2) | tensor_parallel(2), (IDS,))
    lines = str(program.plan).splitlines()
    assert lines[0] == "Plan on {dp: 2, tp: 2}"
    assert len(lines) == 1 + len(program.plan.params) + len(program.plan.inputs)
    assert any(line.split() == ["params", "blocks.0.down.weight", "tp:", "Shard(1)"] for line in lines)
    assert any(line.split() == ["inputs", "ids", "dp:", "Shard(0)"] for line in lines)


# --- packed projections ---------------------------------------------------------------------------------------------


def test_a_packed_projection_that_the_user_splits_is_split_block_by_block() -> None:
    gpt2, inputs = _gpt2()
    plan = Plan(
        {"tp": 2},
        params={
            "*.attn.c_attn.weight": Shard(1),
            "*.attn.c_attn.bias": Shard(0),
            "*.attn.c_proj.weight": Shard(0),
        },
    )
    program = assert_equivalent(gpt2, plan, (), {**inputs, "use_cache": False})
    whole = gpt2.transformer.h[0].attn.c_attn.weight
    for rank in range(2):
        local = program.rank_module(rank).transformer.h[0].attn.c_attn.weight
        parts = [block.chunk(2, 1)[rank] for block in whole.split(64, 1)]
        assert torch.equal(local, torch.cat(parts, 1))
    forward = [c for c in program.collectives() if c.phase == "forward"]
    assert [c.kind for c in forward] == ["all_reduce", "all_reduce"]
    assert all("c_proj" in c.module for c in forward)


def test_half_of_a_packed_pair_is_right_too() -> None:
    """The packed weight is split, the projection behind attention is not."""
    gpt2, inputs = _gpt2()
    assert_equivalent(gpt2, Plan({"tp": 2}, params={"*.attn.c_attn.weight": Shard(1)}), (), inputs)
    assert_equivalent(gpt2, Plan({"tp": 4}, params={"*.attn.c_attn.weight": Shard(0)}), (), inputs)


def test_a_megatron_plan_by_hand_is_the_preset() -> None:
    by_hand = Plan(
        {"tp": 2},
        params={
            "*.up.weight": Shard(0), "*.up.bias": Shard(0), "*.down.weight": Shard(1), "table.weight": Shard(0),
        },
    )  # fmt: skip
    one, other = parallelize(by_hand), parallelize(tensor_parallel(2))
    assert params_of(one).items() == params_of(other).items()
    _same_program(one, other)
