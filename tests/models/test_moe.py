"""Mixtures of experts: their packed weights are split by features, the routing is whole, one all-reduce a layer.

transformers computes experts in several ways: sorted by expert and multiplied in groups (a custom operator under
export, ``aten._grouped_mm`` in bfloat16), by picking each token's matrices (``batched_mm``), or in a plain loop.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import tensor_parallel
from fxshard.errors import CaptureError
from fxshard.placement import BlockShard, Shard
from tests.helpers import Result, assert_equivalent, run_original, slow_but_for
from tests.models.zoo import ids
from tests.presets import presets

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts_per_tok": 2, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FINE = {"moe_intermediate_size": 48, "first_k_dense_replace": 0, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "deepseek_v2": {**FINE, **LATENT, "topk_method": "greedy", "n_shared_experts": 1},
    "deepseek_v3": {**FINE, **LATENT, "n_shared_experts": 1},
    "glm4_moe": {**FINE, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 0},
    "minimax_m2": {"num_local_experts": 4, "rotary_dim": 8},
    "jamba": {
        "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
    },
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
}  # fmt: skip
LOOPS = ("llama4_text",)
"""Those that compute all experts in their own way, with no choice of another."""
PLANS = presets("tp2", "tp4", "dp2", "sp2")


@functools.cache
def build(name: str, how: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of random weights that computes its experts in one of the ways."""
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(name)
    config = type(known)(**{**SMALL, **MODELS[name], "use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.1)
    model = model.to(dtype).eval()
    if name not in LOOPS:
        model.set_experts_implementation(how)
    return model


@functools.cache
def expected(name: str, how: str, dtype: torch.dtype = torch.float32) -> Result:
    return run_original(build(name, how, dtype), (), {"input_ids": ids()})


def experts_of(program: fxshard.ParallelModule, model: nn.Module) -> dict[str, list[Any]]:
    """The experts' matrices, and how they lie: None where they are whole."""
    plan = program.plan.params
    packed = {name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}
    assert packed
    return {name: list(plan[name]) if name in plan else [] for name in packed}


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "tp2")
@pytest.mark.parametrize("name", MODELS)
def test_as_the_original(name: str, plan: str) -> None:
    """Outputs and all gradients; grouped products have no double precision."""
    model = build(name, "grouped_mm")
    program = assert_equivalent(
        model, PLANS[plan], (), {"input_ids": ids()}, expected=expected(name, "grouped_mm"), tolerance=5e-4
    )
    assert not program.fallbacks()
    if plan != "dp2":
        assert all(entry for entry in experts_of(program, model).values())
        sums = [c for c in program.collectives() if c.phase == "forward" and c.kind in ("all_reduce", "reduce_scatter")]
        activation = 4 * ids().numel() * model.config.hidden_size
        large = [c for c in sums if c.num_bytes >= activation]  # norms over a split dim share small statistics
        assert len(large) <= 1 + 2 * model.config.num_hidden_layers, "one of the vocabulary, two a layer"


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_as_the_original_with_picked_matrices(name: str, plan: str) -> None:
    """``batched_mm``: every token's experts are picked out of the weights, and it has double precision."""
    model = build(name, "batched_mm", torch.float64)
    done = expected(name, "batched_mm", torch.float64)
    program = assert_equivalent(model, PLANS[plan], (), {"input_ids": ids()}, expected=done)
    if plan == "dp2":  # every token goes its own way: nothing but the outputs is gathered
        gathered = [c for c in program.collectives() if c.phase == "forward"]
        assert [c.module for c in gathered] == ["lm_head"]
    else:
        assert all(experts_of(program, model).values())


def test_gate_and_up_are_blocks_and_the_router_is_whole() -> None:
    model = build("mixtral", "grouped_mm")
    program = fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})
    placed = program.plan.params
    assert placed["model.layers.0.mlp.experts.gate_up_proj"] == {"tp": BlockShard(1, (1, 1))}
    assert placed["model.layers.0.mlp.experts.down_proj"] == {"tp": Shard(2)}
    assert "model.layers.0.mlp.gate.weight" not in placed


def test_interleaved_gate_and_up_are_cut_in_pairs() -> None:
    model = build("gpt_oss", "grouped_mm")
    program = fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})
    placed = program.plan.params
    assert placed["model.layers.0.mlp.experts.gate_up_proj"] == {"tp": Shard(2)}
    assert placed["model.layers.0.mlp.experts.gate_up_proj_bias"] == {"tp": Shard(1)}
    assert placed["model.layers.0.mlp.experts.down_proj"] == {"tp": Shard(1)}
    assert "model.layers.0.mlp.experts.down_proj_bias" not in placed


def test_the_sum_of_experts_is_reduced_when_it_is_smallest() -> None:
    """Not once for each of a token's experts, but after these are added."""
    model = build("mixtral", "grouped_mm")
    program = fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})
    whole = ids().numel() * model.config.hidden_size * 4
    sums = [c.num_bytes for c in program.collectives() if c.phase == "forward" and c.kind == "all_reduce"]
    assert sums == [whole] * 5


class Experts(nn.Module):
    """Experts whose products are ``aten._grouped_mm``, as those of bfloat16 models."""

    def __init__(self, experts: int = 4, dim: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score, expert = self.router(x).softmax(-1).max(-1)
        order = expert.argsort()
        ends = torch.histc(expert.float(), self.up.shape[0], 0, self.up.shape[0] - 1).cumsum(0, dtype=torch.int32)
        rows = F.silu(torch._grouped_mm(x[order].bfloat16(), self.up.bfloat16(), ends))
        made = torch._grouped_mm(rows, self.down.bfloat16(), ends).float()
        return torch.zeros_like(x).index_add(0, order, made) * score[:, None]


@pytest.mark.parametrize("plan", ["tp2", "tp4", "dp2"])
def test_native_grouped_products(plan: str) -> None:
    torch.manual_seed(0)
    program = assert_equivalent(Experts(), PLANS[plan], (torch.randn(24, 16),), tolerance=0.05)
    if plan != "dp2":
        assert program.plan.params["up"] == {"tp": Shard(2)}
        assert program.plan.params["down"] == {"tp": Shard(1)}


class Loop(nn.Module):
    """Every expert computes every token; those that it was not chosen for count nothing."""

    def __init__(self, pick: Callable[[torch.Tensor, int], torch.Tensor], experts: int = 4) -> None:
        super().__init__()
        self.pick, self.router = pick, nn.Linear(16, experts)
        self.up = nn.Parameter(torch.randn(experts, 32, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, 16, 32) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            mine = (weights * (chosen == e)).sum(-1, keepdim=True)
            out = out + F.linear(F.relu(F.linear(x, self.pick(self.up, e))), self.pick(self.down, e)) * mine
        return out


@pytest.mark.parametrize(
    "pick",
    [lambda w, e: w[e], lambda w, e: w.unbind(0)[e], lambda w, e: w.chunk(4)[e].squeeze(0)],
    ids=["select", "unbind", "chunk"],
)
@pytest.mark.parametrize("plan", ["tp2", "dp2"])
def test_experts_one_by_one(pick: Callable[[torch.Tensor, int], torch.Tensor], plan: str) -> None:
    torch.manual_seed(0)
    program = assert_equivalent(Loop(pick).double(), PLANS[plan], (torch.randn(6, 16, dtype=torch.float64),))
    if plan == "tp2":
        assert program.plan.params["up"] == {"tp": Shard(1)}
        assert program.plan.params["down"] == {"tp": Shard(2)}
        assert {c.kind for c in program.collectives() if c.phase == "forward"} == {"all_reduce"}


def test_a_loop_over_the_experts_that_were_hit_is_refused() -> None:
    """What runs depends on values: the error says where, and nothing is guessed."""
    model = copy.deepcopy(build("mixtral", "grouped_mm"))
    model.set_experts_implementation("eager")
    with pytest.raises(CaptureError, match=r"mlp\.experts"):
        fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("olmoe", "minimax_m2")])
def test_most_of_attention_and_experts_is_split(name: str) -> None:
    """But for routers, and the projections to a latent space that all heads read. (The two left out have a norm
    over all heads.)
    """
    model = build(name, "grouped_mm")
    program = fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})
    others = ("mamba.", "q_a_proj", "kv_a_proj", "embed_tokens", "lm_head", "router", "gate.weight")
    sizes = {n: p.numel() for n, p in model.named_parameters() if not any(part in n for part in others)}
    assert sum(s for n, s in sizes.items() if n in program.plan.params) > 0.95 * sum(sizes.values())
