"""Plans in the words of others: Hugging Face's ``tp_plan`` and the styles of ``torch.distributed.tensor.parallel``."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

import fxshard
from fxshard import Plan, Replicate, Shard, data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import MeshError, PlanError
from fxshard.placement import BlockShard
from fxshard.plan.formats import EXPERT_STYLES, HF_STYLES
from tests.helpers import assert_equivalent
from tests.models import zoo
from tests.models.zoo import transformers

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
INPUTS = {"input_ids": zoo.ids()}
GPT2_PLAN = {
    "transformer.wte": "embedding_rowwise",
    "transformer.h.*.attn.c_attn": "packed_colwise",
    "transformer.h.*.attn.c_proj": "rowwise",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
}


@functools.lru_cache
def hf_model(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()  # type: ignore[no-any-return]


class Block(nn.Module):
    """Norm, a packed projection, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.linspace(1, 2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(self.norm(self.drop(x))).chunk(2, -1)
        return x + self.down(F.silu(gate) * value * self.scale)  # type: ignore[no-any-return]


class Net(nn.Module):
    tp_plan: ClassVar = {"blocks.*.up": "packed_colwise", "blocks.*.down": "rowwise", "blocks.*.gone": "colwise"}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


IDS = torch.arange(4 * 6).view(4, 6) % 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def parallelize(styles: Any, mesh: Any = 2, **options: Any) -> fxshard.ParallelModule:
    """Compiles the small model, and compares it with the original."""
    return assert_equivalent(net(), styles, (IDS,), mesh=mesh, **options)


def params_of(program: fxshard.ParallelModule) -> dict[str, str]:
    return {name: repr(entry["tp"]) for name, entry in program.plan.params.items()}


def collectives_of(program: fxshard.ParallelModule) -> list[tuple[str, str, str]]:
    return [(c.kind, c.phase, c.module) for c in program.collectives()]


def refused(styles: Any, **options: Any) -> str:
    with pytest.raises(PlanError) as error:
        fxshard.parallelize(net(), styles, (IDS,), mesh={"tp": 2}, **options)
    return str(error.value)


# --- what a Hugging Face model brings along -------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"])
def test_from_hf_splits_as_tensor_parallel_does(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sources that know nothing of each other: names that people wrote down, and the dataflow."""
    model = hf_model(kind)
    program = fxshard.parallelize(model, Plan.from_hf(model, {"tp": 2}), kwargs=INPUTS)
    preset = fxshard.parallelize(model, tensor_parallel(2), kwargs=INPUTS)
    assert len(program.plan.params) >= 2 + 2 * 4
    assert params_of(program) == params_of(preset)
    assert sorted(collectives_of(program)) == sorted(collectives_of(preset))
    assert fxshard.verify(program, **INPUTS).ok, capsys.readouterr().out
    layer = program.rank_module(1).model.layers[1]
    assert layer.mlp.down_proj.weight.shape == (64, 64)


def test_from_hf_is_an_explicit_plan() -> None:
    plan = Plan.from_hf(hf_model("Llama"), {"tp": 2})
    assert plan.params["model.layers.1.self_attn.o_proj.weight"] == {"tp": Shard(1)}
    assert plan.params["model.embed_tokens.weight"] == {"tp": Shard(0)}
    assert plan.presets == ()
    assert plan.activations == {}
    assert Plan.from_json(plan.to_json()) == plan


def test_biases_of_columns_are_split_and_of_rows_are_not() -> None:
    plan = Plan.from_hf(hf_model("Qwen2"), {"tp": 2})  # q, k and v have biases
    assert plan.params["model.layers.0.self_attn.q_proj.bias"] == {"tp": Shard(0)}
    model = hf_model("Llama", attention_bias=True)
    plan = Plan.from_hf(model, {"tp": 2})
    assert "model.layers.0.self_attn.k_proj.bias" in plan.params
    assert "model.layers.0.self_attn.o_proj.bias" not in plan.params
    assert_equivalent(model, plan, kwargs=INPUTS)


def test_from_hf_composes_and_takes_its_mesh_later() -> None:
    model = hf_model("Llama")
    both = Plan.from_hf(model, {"tp": 2}) | data_parallel(2)
    program = assert_equivalent(model, both, kwargs=INPUTS)
    assert program.plan.inputs == {"input_ids": {"dp": Shard(0)}}
    later = fxshard.parallelize(model, Plan.from_hf(model), kwargs=INPUTS, mesh={"dp": 2, "tp": 2})
    assert later.plan.params == program.plan.params
    assert Plan.from_hf(model, {"model": 2}).params["lm_head.weight"] == {"model": Shard(0)}
    assert Plan.from_hf(model, {"a": 2, "b": 2}, axis="b").params["lm_head.weight"] == {"b": Shard(0)}


def test_from_hf_asks_which_axis() -> None:
    with pytest.raises(MeshError, match=r"the mesh \{a: 2, b: 2\} has several axes, and none is named 'tp'"):
        Plan.from_hf(hf_model("Llama"), {"a": 2, "b": 2})
    with pytest.raises(MeshError, match="there is no mesh axis 'c'"):
        Plan.from_hf(hf_model("Llama"), {"a": 2, "b": 2}, axis="c")


def test_one_rule_changed() -> None:
    model = hf_model("Llama")
    rules = {**model.tp_plan, "lm_head": "replicate"}
    program = assert_equivalent(model, rules, kwargs=INPUTS, mesh={"tp": 2})
    assert program.plan.params["lm_head.weight"] == {"tp": Replicate()}
    assert program.plan.params["model.embed_tokens.weight"] == {"tp": Shard(0)}


def test_a_model_that_wraps_one() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hf_model("Mistral")

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids, use_cache=False).logits  # type: ignore[no-any-return]

    model = Wrapper().eval()
    plan = Plan.from_hf(model, {"tp": 2})
    assert plan.params["inner.model.layers.0.mlp.up_proj.weight"] == {"tp": Shard(0)}
    assert set(plan.params) == {f"inner.{name}" for name in Plan.from_hf(hf_model("Mistral"), 2).params}
    assert_equivalent(model, plan, kwargs=INPUTS)


def test_the_outermost_plan_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that the user took out of the model's plan does not come back from the plan of the base model in it."""
    model = hf_model("Llama")
    monkeypatch.setattr(model, "_tp_plan", {"lm_head": "colwise_rep"})
    assert model.model.tp_plan
    assert set(Plan.from_hf(model, {"tp": 2}).params) == {"lm_head.weight"}


def test_rules_of_the_base_model_in_the_config() -> None:
    class Bare(nn.Module):
        """As in a ``transformers`` that has not copied the rules to the model."""

        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model = net()
            self.config = type("Config", (), {"base_model_tp_plan": {"head": "colwise"}})()

    model = Bare()
    model.model.tp_plan = None  # type: ignore[assignment]
    assert set(Plan.from_hf(model).params) == {"model.head.weight", "model.head.bias"}


def test_rules_for_modules_of_other_configurations_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fxshard"):
        plan = Plan.from_hf(net(), {"tp": 2})
    assert "tp_plan rules that match nothing in Net are left out: ['blocks.*.gone']" in caplog.text
    assert set(plan.params) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("up.weight", "up.bias", "down.weight")}
    assert "1. 'blocks.*.gone'" not in refused(Net.tp_plan)
    assert "'blocks.*.gone' matches no module or parameter of the model" in refused(Net.tp_plan)


def test_from_hf_without_a_plan() -> None:
    model, _ = zoo.build("gpt2")
    with pytest.raises(PlanError) as error:
        Plan.from_hf(model, {"tp": 2})
    assert str(error.value) == (
        "GPT2LMHeadModel has no tp_plan\n"
        "  fix     use fxshard.tensor_parallel(n), or give {module glob: 'colwise' or 'rowwise'} to parallelize"
    )
    model = net()
    model.tp_plan = {"layers.*.q_proj": "colwise"}  # type: ignore[assignment]
    with pytest.raises(PlanError, match=r"the tp_plan of Net matches none of its modules: 'layers\.\*\.q_proj'"):
        Plan.from_hf(model, {"tp": 2})


def test_a_vocabulary_that_does_not_divide() -> None:
    model = hf_model("Llama", tie_word_embeddings=True)
    program = fxshard.parallelize(model, {"model.embed_tokens": "embedding_rowwise"}, kwargs=INPUTS, mesh={"tp": 3})
    placed = program.plan.params["model.embed_tokens.weight"]
    assert str(placed) == "{'tp': Shard(0, shares=(43, 43, 42))}"


def test_experts_are_split_by_their_blocks() -> None:
    """Gate and up are packed in one weight: the plan names its dim, the dataflow says which blocks."""
    model = hf_model("Mixtral", num_local_experts=4).float()
    program = assert_equivalent(model, Plan.from_hf(model, {"tp": 2}), kwargs=INPUTS)
    assert program.plan.params["model.layers.0.mlp.experts.gate_up_proj"] == {"tp": BlockShard(1, (1, 1))}
    assert program.plan.params["model.layers.0.mlp.experts.down_proj"] == {"tp": Shard(2)}


# --- dicts of Hugging Face styles -----------------------------------------------------------------------------------


def test_gpt2_whose_weights_lie_the_other_way(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = zoo.build("gpt2")
    program = fxshard.parallelize(model, GPT2_PLAN, kwargs=inputs, mesh={"tp": 2})
    preset = fxshard.parallelize(model, tensor_parallel(2), kwargs=inputs)
    assert program.plan.params == preset.plan.params
    assert params_of(program)["transformer.h.1.attn.c_attn.weight"] == "Shard(1, blocks=(1, 1, 1))"
    assert params_of(program)["transformer.h.1.attn.c_attn.bias"] == "Shard(0, blocks=(1, 1, 1))"
    assert params_of(program)["transformer.h.1.mlp.c_proj.weight"] == "Shard(dim=0)"
    assert fxshard.verify(program, **inputs).ok, capsys.readouterr().out


def test_packed_weights_get_their_blocks() -> None:
    program = parallelize({"blocks.*.up": "packed_colwise", "blocks.*.down": "rowwise"})
    assert params_of(program) == {
        name: placement
        for i in (0, 1)
        for name, placement in {
            f"blocks.{i}.up.weight": "Shard(0, blocks=(1, 1))",
            f"blocks.{i}.up.bias": "Shard(0, blocks=(1, 1))",
            f"blocks.{i}.down.weight": "Shard(dim=1)",
        }.items()
    }
    assert [c.kind for c in program.collectives() if c.phase == "forward"] == ["all_reduce"] * 2


@pytest.mark.parametrize(
    ("style", "up", "bias"),
    [
        ("colwise", Shard(0), Shard(0)),
        ("colwise_rep", Shard(0), Shard(0)),
        ("colwise_gather_output", Shard(0), Shard(0)),
        ("local_colwise", Shard(0), Shard(0)),
        ("packed_colwise", Shard(0), Shard(0)),
        ("rowwise", Shard(1), None),
        ("rowwise_rep", Shard(1), None),
        ("rowwise_split_input", Shard(1), None),
        ("local_rowwise", Shard(1), None),
        ("packed_rowwise", Shard(1), None),
        ("replicate", Replicate(), Replicate()),
    ],
)
def test_styles_of_linear_layers(style: str, up: Any, bias: Any) -> None:
    program = parallelize({"head": style})
    entry = {"head.weight": {"tp": up}} | ({"head.bias": {"tp": bias}} if bias is not None else {})
    assert program.plan.params == entry


@pytest.mark.parametrize(
    ("style", "placement"),
    [
        ("embedding_rowwise", Shard(0)),
        ("rowwise", Shard(0)),
        ("embedding_colwise", Shard(1)),
        (RowwiseParallel(), Shard(0)),
        (ColwiseParallel(), Shard(1)),
    ],
)
def test_styles_of_embeddings(style: Any, placement: Shard) -> None:
    program = parallelize({"table": style})
    assert program.plan.params == {"table.weight": {"tp": placement}}
    assert program.plan.activations == {}


@pytest.mark.parametrize("style", sorted(name for name, ask in HF_STYLES.items() if ask.weights is None))
def test_styles_that_place_no_weight(style: str) -> None:
    program = parallelize({"blocks.*.norm": style, "blocks.*.up": "colwise"})
    assert set(program.plan.params) == {f"blocks.{i}.up.{n}" for i in (0, 1) for n in ("weight", "bias")}
    returned = {f"blocks.{i}.norm": {"tp": Shard(1)} for i in (0, 1)}
    assert program.plan.activations == (returned if style == "sequence_parallel" else {})


def test_every_style_of_this_transformers_is_known_or_named_as_not_built() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    assert set(ALL_PARALLEL_STYLES) <= {*HF_STYLES, *EXPERT_STYLES}


def test_entries_may_name_parameters() -> None:
    """Such an entry goes before one that names the module."""
    program = parallelize({"blocks.*.scale": "colwise", "head": "rowwise", "head.weight": "colwise"})
    assert params_of(program) == {
        "blocks.0.scale": "Shard(dim=0)", "blocks.1.scale": "Shard(dim=0)", "head.weight": "Shard(dim=0)",
    }  # fmt: skip


def test_star_stands_for_one_component() -> None:
    assert params_of(parallelize({"blocks.*.down": "rowwise"})).keys() == {f"blocks.{i}.down.weight" for i in (0, 1)}
    assert params_of(parallelize({"blocks.1.down": "rowwise"})).keys() == {"blocks.1.down.weight"}
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    program = fxshard.parallelize(nested, {"*": "replicate"}, (torch.randn(2, 4),), mesh=2)
    assert set(program.plan.params) == {"0.weight", "0.bias"}


def test_star_stands_for_more_where_nothing_else_matches() -> None:
    """As in our own plans."""
    program = parallelize({"*.down": "rowwise", "*up*": "colwise"})
    assert {name.rpartition(".")[0] for name in program.plan.params} == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")
    }


def test_styles_and_placements_in_one_dict() -> None:
    program = parallelize(
        {"head": "colwise", "table.weight": Shard(1), "blocks.*.norm": Shard(1), "blocks.1.up": ColwiseParallel()}
    )
    assert set(program.plan.params) == {
        "head.weight",
        "head.bias",
        "table.weight",
        "blocks.1.up.weight",
        "blocks.1.up.bias",
    }
    assert set(program.plan.activations) == {"blocks.0.norm", "blocks.1.norm"}
    two = parallelize({"head": "colwise", "table.weight": {"dp": Shard(0)}}, mesh={"dp": 2, "tp": 2})
    assert two.plan.params["head.weight"] == {"tp": Shard(0)}
    assert two.plan.params["table.weight"] == {"dp": Shard(0)}


# --- torch's styles -------------------------------------------------------------------------------------------------


def test_torch_styles_for_llama(capsys: pytest.CaptureFixture[str]) -> None:
    model = hf_model("Llama")
    styles = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    program = fxshard.parallelize(model, styles, kwargs=INPUTS, mesh={"tp": 2})
    preset = fxshard.parallelize(model, tensor_parallel(2), kwargs=INPUTS)
    assert params_of(program) == params_of(preset)
    assert program.plan.activations == {"lm_head": {"tp": Replicate()}}
    assert sorted(collectives_of(program)) == sorted(collectives_of(preset))
    assert fxshard.verify(program, **INPUTS).ok, capsys.readouterr().out


def test_torch_styles_with_sequence_parallelism_for_llama(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of PyTorch's tutorial gives what our preset gives, collective by collective."""
    model = hf_model("Llama")
    split, whole = Shard(1), Replicate()
    styles = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=split),
        "model.layers.*.input_layernorm": SequenceParallel(),
        "model.layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": split}, desired_input_kwarg_layouts={"hidden_states": whole}
        ),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=split),
        "model.layers.*.post_attention_layernorm": SequenceParallel(),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=(split,), desired_input_layouts=(whole,)),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=split),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=split, output_layouts=whole),
    }
    program = fxshard.parallelize(model, styles, kwargs=INPUTS, mesh={"tp": 2})
    preset = fxshard.parallelize(model, sequence_parallel(2), kwargs=INPUTS)
    assert params_of(program) == params_of(preset)
    assert sorted(collectives_of(program)) == sorted(collectives_of(preset))
    assert [c.kind for c in program.collectives() if c.phase == "forward"].count("reduce_scatter") == 5
    assert program.plan.activations["model.layers.0.mlp.down_proj"] == {"tp": Shard(1)}
    assert fxshard.verify(program, **INPUTS).ok, capsys.readouterr().out


@pytest.mark.parametrize(
    ("style", "returned"),
    [
        (ColwiseParallel(), None),
        (ColwiseParallel(output_layouts=Shard(-1)), None),
        (ColwiseParallel(output_layouts=Replicate()), Replicate()),
        (ColwiseParallel(output_layouts=Shard(1), use_local_output=False), Shard(1)),
        (ColwiseParallel(input_layouts=Shard(1)), None),
        (RowwiseParallel(), None),
        (RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), Shard(1)),
        (SequenceParallel(), Shard(1)),
        (SequenceParallel(sequence_dim=0), Shard(0)),
        (PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()), None),
        (PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Shard(1), None)), None),
        (PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)), Shard(1)),
        (
            PrepareModuleInputOutput(
                input_layouts=Shard(1),
                desired_input_layouts=Replicate(),
                output_layouts=Shard(-1),
                desired_output_layouts=Replicate(),
            ),
            Replicate(),
        ),
    ],
    ids=str,
)
def test_what_a_torch_style_says_of_results(style: ParallelStyle, returned: Any) -> None:
    program = parallelize({"head": style})
    assert program.plan.activations == ({} if returned is None else {"head": {"tp": returned}})


def test_dropout_follows_what_it_is_given() -> None:
    """In evaluation it is not in the graph: there is nothing that a plan could name."""
    program = parallelize({"blocks.*.drop": SequenceParallel(), "blocks.*.norm": SequenceParallel()})
    assert set(program.plan.activations) == {"blocks.0.norm", "blocks.1.norm"}


def test_the_model_itself_may_be_named() -> None:
    model, x = nn.Linear(8, 8).double(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, {"": ColwiseParallel(output_layouts=Shard(0))}, (x,), mesh=2)
    assert params_of(program) == {"weight": "Shard(dim=0)", "bias": "Shard(dim=0)"}
    assert program.plan.outputs == {"0": {"tp": Shard(0)}}
    assert [o.shape for o in fxshard.simulate(program, x).outputs] == [(2, 8), (2, 8)]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_unknown_styles_are_listed_together() -> None:
    class Mine(ColwiseParallel):
        """It may do anything."""

    text = refused({"head": "colwize", "blocks.*.up": "grouped_gemm", "blocks.*.down": Mine(), "table": "rowwise"})
    assert text == (
        "these styles are not supported: 'head': 'colwize', 'blocks.*.up': 'grouped_gemm' (expert parallel, not built"
        " yet), 'blocks.*.down': Mine\n"
        f"  fix     use {', '.join(HF_STYLES)}; or torch's ColwiseParallel, RowwiseParallel, SequenceParallel,"
        " PrepareModuleInput, PrepareModuleOutput, PrepareModuleInputOutput; or placements such as Shard(0)"
    )


@pytest.mark.parametrize("style", EXPERT_STYLES)
def test_expert_parallel_styles_are_refused(style: str) -> None:
    assert f"'blocks.*.up': {style!r} (expert parallel, not built yet)" in refused({"blocks.*.up": style})


def test_all_problems_are_listed() -> None:
    text = refused(
        {"heed": "colwise", "blocks.*.norm": "colwise", "table": "nonsense", "blocks.*.scale": SequenceParallel()}
    )
    lines = [line for line in text.splitlines() if not line.startswith("  fix")]
    assert lines == [
        "6 entries of the plan cannot be applied:",
        "1. these styles are not supported: 'table': 'nonsense'",
        "2. 'heed' matches no module or parameter of the model",
        "3. 'blocks.*.scale': blocks.0.scale is a parameter, and SequenceParallel says what a module returns",
        "4. 'blocks.*.scale': blocks.1.scale is a parameter, and SequenceParallel says what a module returns",
        "5. 'blocks.*.norm': blocks.0.norm is a LayerNorm, and 'colwise' splits linear layers and embeddings",
        "6. 'blocks.*.norm': blocks.1.norm is a LayerNorm, and 'colwise' splits linear layers and embeddings",
    ]
    assert "  fix     the nearest names are 'head'" in text


def test_embedding_styles_are_for_embeddings() -> None:
    text = refused({"head": "embedding_rowwise"})
    assert text.startswith("'head': head is a Linear, and 'embedding_rowwise' splits an nn.Embedding\n")


def test_styles_that_disagree() -> None:
    text = refused({"blocks.*.up": "colwise", "blocks.1.up": RowwiseParallel()})
    assert text.splitlines()[0] == (
        "'blocks.*.up' and 'blocks.1.up' disagree on blocks.1.up.weight: Shard(0) and Shard(1)"
    )
    assert len(parallelize({"blocks.*.up": "colwise", "blocks.1.up": "colwise_rep"}).plan.params) == 4


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (
            PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
            "'blocks.0': a plan cannot fix a module's input to be Shard(1), as desired_input_layouts asks",
        ),
        (
            PrepareModuleInput(input_kwarg_layouts={"x": Shard(0)}, desired_input_kwarg_layouts={"x": Shard(1)}),
            "'blocks.0': a plan cannot fix a module's input to be Shard(1), as desired_input_layouts asks",
        ),
        (
            PrepareModuleOutput(
                output_layouts=(Shard(0), Shard(0)), desired_output_layouts=(Shard(1), Replicate())
            ),
            "'blocks.0': a module's results are placed alike, but desired_output_layouts are (Shard(1), Replicate)",
        ),
        (
            PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Partial()),
            "'blocks.0': a module cannot be asked to return Partial(sum)",
        ),
    ],
)  # fmt: skip
def test_layouts_that_a_plan_cannot_say(style: ParallelStyle, message: str) -> None:
    assert refused({"blocks.0": style}).splitlines()[0] == message


def test_values_that_are_no_styles() -> None:
    assert refused({"head": 1}).startswith("cannot read the plan {'head': 1}\n")


def test_styles_need_a_mesh() -> None:
    with pytest.raises(MeshError, match="the plan does not say on which mesh"):
        fxshard.parallelize(net(), {"head": "colwise"}, (IDS,))
    with pytest.raises(MeshError, match="has several axes, and none is named 'tp'"):
        fxshard.parallelize(net(), {"head": "colwise"}, (IDS,), mesh={"a": 2, "b": 2})
