"""Several projections in one weight: found from how the model cuts them, in every layout that models use.

Six heads on 2, 3 and 4 ranks: on four the last one holds none. Each layout is split in whole heads, costs Megatron's
two all-reduces, one each way, and gives its weight back as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import tensor_parallel
from fxshard.placement import shard
from tests.helpers import assert_equivalent, slow_but_for
from tests.models.zoo import ids, images, transformers

HEADS, DIM = 6, 8
SIZE = HEADS * DIM
ALL_REDUCES = {("forward", "all_reduce"): 1, ("backward", "all_reduce"): 1}

Tensors = Sequence[torch.Tensor]


def some_ranks(*fast: int) -> pytest.MarkDecorator:
    return slow_but_for("ranks", (2, 3, 4), *fast)


def shares_of(units: int, ranks: int) -> tuple[int, ...]:
    """As ``torch.chunk`` gives units to ranks; the last ones may get none."""
    parts = [len(part) for part in torch.arange(units).chunk(ranks)]
    return tuple(parts + [0] * (ranks - len(parts)))


def counts(program: fxshard.ParallelModule) -> Counter[tuple[str, str]]:
    return Counter((c.phase, c.kind) for c in program.collectives())


def check(model: nn.Module, ranks: int, args: tuple[Any, ...] = (), kwargs: Any = None) -> fxshard.ParallelModule:
    """Outputs and gradients are one device's, and so are all weights, to the bit."""
    torch.manual_seed(1)
    with torch.no_grad():  # so that no bias is zero
        for parameter in model.double().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    program = assert_equivalent(model, tensor_parallel(ranks), args, kwargs)
    expected, actual = model.state_dict(), program.full_state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert not program.fallbacks()
    return program


# --- attention: q, k and v in one weight ----------------------------------------------------------------------------


def by_heads(*parts: torch.Tensor) -> list[torch.Tensor]:
    """[batch, length, (heads dim)] -> [batch, heads, length, dim]"""
    return [part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in parts]


def sizes(groups: int) -> list[int]:
    return [SIZE, groups * DIM, groups * DIM]


def mp_blocks(x: torch.Tensor, groups: int) -> Tensors:
    """CodeGen's: [block, (q v k), heads of the block], of the ranks that once trained it."""
    q, v, k = x.unflatten(-1, (groups, -1)).chunk(3, -1)
    return by_heads(*(part.flatten(-2) for part in (q, k, v)))


def falcon(x: torch.Tensor, groups: int, spread: bool) -> Tensors:
    """[group, (heads of the group, k, v), dim]; k and v are spread over the heads, or left to the attention."""
    x = x.unflatten(-1, (groups, HEADS // groups + 2, DIM))
    q, k, v = x[..., :-2, :], x[..., [-2], :], x[..., [-1], :]
    if spread:
        k, v = torch.broadcast_to(k, q.shape), torch.broadcast_to(v, q.shape)
    return [part.flatten(2, 3).transpose(1, 2) for part in (q, k, v)]


def grouped(x: torch.Tensor, groups: int) -> Tensors:
    parts = x.unflatten(-1, (groups, -1)).split([HEADS // groups * DIM, DIM, DIM], -1)
    return by_heads(*(part.flatten(-2) for part in parts))


@dataclass(frozen=True)
class Layout:
    """How a packed projection is cut, in how many groups of heads, and in which blocks its weight is split."""

    cut: Callable[[torch.Tensor, int], Tensors]
    blocks: tuple[int, ...] = (1,)
    groups: int = HEADS


THIRDS, GROUPED = (1, 1, 1), (2, 1, 1)

LAYOUTS: dict[str, Layout] = {
    # [q heads | k heads | v heads]
    "chunk": Layout(lambda x, g: by_heads(*x.chunk(3, -1)), THIRDS),
    "chunk_clamped": Layout(lambda x, g: by_heads(*x.clamp(-0.5, 0.5).chunk(3, -1)), THIRDS),
    "split": Layout(lambda x, g: by_heads(*x.split(sizes(g), -1)), GROUPED, 3),
    "split_clamped": Layout(lambda x, g: by_heads(*x.clamp(-0.5, 0.5).split(sizes(g), -1)), GROUPED, 3),
    "split_2_groups": Layout(lambda x, g: by_heads(*x.split(sizes(g), -1)), (3, 1, 1), 2),
    "slice": Layout(
        lambda x, g: by_heads(x[..., :SIZE], x[..., SIZE : SIZE + g * DIM], x[..., SIZE + g * DIM :]), GROUPED, 3
    ),
    "narrow": Layout(lambda x, g: by_heads(*(x.narrow(-1, i * SIZE, SIZE) for i in range(3))), THIRDS),
    "heads_split": Layout(lambda x, g: by_heads(x)[0].split([HEADS, g, g], 1), GROUPED, 3),
    "heads_slice": Layout(
        lambda x, g: (lambda h: (h[:, :HEADS], h[:, HEADS : HEADS + g], h[:, HEADS + g :]))(by_heads(x)[0]), GROUPED, 3
    ),
    "timm": Layout(lambda x, g: x.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0), THIRDS),
    "indexed": Layout(lambda x, g: [*x.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)], THIRDS),
    "qwen_vl": Layout(
        lambda x, g: [p.transpose(1, 2) for p in x.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 1, 3, 4).unbind(0)],
        THIRDS,
    ),
    "three_first": Layout(
        lambda x, g: x.unflatten(-1, (3, SIZE)).permute(2, 0, 1, 3).unflatten(-1, (HEADS, DIM)).transpose(2, 3), THIRDS
    ),
    # [head, (q k v), dim]
    "neox": Layout(lambda x, g: x.unflatten(-1, (HEADS, 3 * DIM)).transpose(1, 2).chunk(3, -1)),
    "chatglm": Layout(lambda x, g: [p.permute(0, 2, 1, 3) for p in x.unflatten(-1, (HEADS, 3 * DIM)).split(DIM, -1)]),
    "bloom": Layout(lambda x, g: [x.unflatten(-1, (HEADS, 3, DIM))[..., i, :].transpose(1, 2) for i in range(3)]),
    "bloom_unbound": Layout(lambda x, g: [p.transpose(1, 2) for p in x.unflatten(-1, (HEADS, 3, DIM)).unbind(3)]),
    "interleaved": Layout(lambda x, g: [p.transpose(1, 2) for p in x.unflatten(-1, (HEADS, DIM, 3)).unbind(-1)]),
    # [group, (q heads of the group, k, v), dim]
    "falcon": Layout(lambda x, g: falcon(x, g, False), groups=3),
    "falcon_2_groups": Layout(lambda x, g: falcon(x, g, False), groups=2),
    "falcon_spread": Layout(lambda x, g: falcon(x, g, True), groups=3),
    "groups_split": Layout(grouped, groups=3),
    "codegen": Layout(mp_blocks, groups=2),
}


class Attention(nn.Module):
    def __init__(self, layout: Layout, features: int | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.LayerNorm(SIZE)
        packed = SIZE * 3 if layout.cut is mp_blocks else SIZE + 2 * layout.groups * DIM
        self.qkv, self.out = nn.Linear(SIZE, features or packed), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.layout.cut(self.qkv(self.norm(x)), self.layout.groups)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != HEADS)
        return x + self.out(y.transpose(1, 2).flatten(-2))


def attend(layout: Layout, ranks: int) -> fxshard.ParallelModule:
    return check(Attention(layout), ranks, (torch.randn(2, 5, SIZE, dtype=torch.float64),))


@pytest.mark.thin(2)
@some_ranks(4)
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_attention(name: str, ranks: int) -> None:
    layout = LAYOUTS[name]
    program = attend(layout, ranks)
    shares = shares_of(layout.groups, ranks)
    columns = {"tp": shard(0, layout.blocks, shares)}
    assert program.plan.params == {
        "qkv.weight": columns,
        "qkv.bias": columns,
        "out.weight": {"tp": shard(1, (1,), shares)},
    }
    assert counts(program) == ALL_REDUCES


def test_the_heads_that_a_rank_holds() -> None:
    program = attend(LAYOUTS["split"], 2)
    whole = program._original.get().state_dict()["qkv.weight"]
    q, k, v = whole.split(sizes(3))
    first = torch.cat([q[: 4 * DIM], k[: 2 * DIM], v[: 2 * DIM]])
    second = torch.cat([q[4 * DIM :], k[2 * DIM :], v[2 * DIM :]])
    for rank, expected in enumerate((first, second)):
        assert torch.equal(dict(program.rank_module(rank).named_parameters())["qkv.weight"], expected)


@some_ranks(2, 4)
@pytest.mark.parametrize("name", ["split", "falcon"])
def test_one_key_head_for_all(name: str, ranks: int) -> None:
    """Of [q heads | k | v] only q can be cut by heads: k and v are stored in parts where these are even, and gathered.

    Where they are not, the weight is cut evenly as a whole, and what it gives is gathered.
    """
    layout = Layout(LAYOUTS[name].cut, groups=1)
    layers = nn.Sequential(Attention(layout), Attention(layout))
    program = check(layers, ranks, (torch.randn(2, 5, SIZE, dtype=torch.float64),))
    if ranks == 2:
        assert all(program.placements_of(f"{layer}.out.weight") == (shard(1),) for layer in (0, 1))
        assert counts(program)["forward", "all_gather"] == counts(program)["forward", "all_reduce"] == 2
        return
    for layer in (0, 1):
        assert program.placements_of(f"{layer}.qkv.weight") == (shard(0, (1,), shares_of(SIZE + 2 * DIM, ranks)),)
        assert program.placements_of(f"{layer}.out.weight") == (shard(0, (1,), shares_of(SIZE, ranks)),)
    assert counts(program)["forward", "all_gather"] == 4
    assert ("forward", "all_reduce") not in counts(program)


# --- an MLP: gate and up in one weight ------------------------------------------------------------------------------

INNER = 96


def apart(x: torch.Tensor, inner: bool) -> Tensors:
    return x.unflatten(-1, (INNER, 2) if inner else (2, INNER)).unbind(-1 if inner else -2)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


HALVES = (1, 1)

GATES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], int]] = {
    "chunk": (lambda x: gated(*x.chunk(2, -1)), HALVES, INNER),
    "split": (lambda x: gated(*x.split(INNER, -1)), HALVES, INNER),
    "slice": (lambda x: gated(x[..., :INNER], x[..., INNER:]), HALVES, INNER),
    "slice_from_the_end": (lambda x: gated(x[..., -INNER:], x[..., :-INNER]), HALVES, INNER),
    "outer": (lambda x: gated(*apart(x, inner=False)), HALVES, INNER),
    "inner": (lambda x: gated(*apart(x, inner=True)), (1,), INNER),
    "every_second": (lambda x: gated(x[..., ::2], x[..., 1::2]), (1,), INNER),
    "clamped": (
        lambda x: (lambda g, u: (u.clamp(-1, 1) + 1) * gated(g.clamp(max=1), torch.ones_like(u)))(*x.chunk(2, -1)),
        HALVES, INNER,
    ),
    "of_groups": (lambda x: gated(*(p.flatten(-2) for p in x.unflatten(-1, (6, 32)).chunk(2, -1))), (1,), 6),
    "glu": (lambda x: F.glu(x, -1), HALVES, INNER),
}  # fmt: skip


class Gated(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 2 * INNER), nn.Linear(INNER, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


@pytest.mark.thin(2)
@some_ranks(4)
@pytest.mark.parametrize("name", GATES)
def test_packed_gate(name: str, ranks: int) -> None:
    act, blocks, units = GATES[name]
    program = check(Gated(act), ranks, (torch.randn(2, 5, 16, dtype=torch.float64),))
    shares = shares_of(units, ranks)
    columns = {"tp": shard(0, blocks, shares)}
    assert program.plan.params == {
        "up.weight": columns,
        "up.bias": columns,
        "down.weight": {"tp": shard(1, (1,), shares)},
    }
    assert counts(program) == ALL_REDUCES


# --- models ---------------------------------------------------------------------------------------------------------

NEWER = {
    "vocab_size": 128, "hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLDER = {
    "vocab_size": 128, "n_embd": SIZE, "n_layer": 2, "n_head": HEADS, "bos_token_id": 1, "eos_token_id": 2,
    "n_positions": 64,
}  # fmt: skip
MPT = {"d_model": SIZE, "n_heads": HEADS, "n_layers": 2, "vocab_size": 128, "max_seq_len": 64}
SEEING = {
    "hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A model: its class and configuration, a packed weight, how it is split, and the all-reduces of its two layers."""

    model: str
    config: dict[str, Any]
    weight: str
    blocks: tuple[int, ...] = (1,)
    groups: int = HEADS
    dim: int = 0
    all_reduces: tuple[int, int] = (4, 4)


MODELS: dict[str, Packed] = {
    "gpt2": Packed("GPT2LMHeadModel", OLDER, "h.1.attn.c_attn.weight", THIRDS, dim=1),
    "phi3": Packed("Phi3ForCausalLM", {**NEWER, "num_key_value_heads": 3}, "qkv_proj.weight", GROUPED, 3),
    "phi3_gate": Packed("Phi3ForCausalLM", {**NEWER, "num_key_value_heads": 2}, "gate_up_proj.weight", HALVES, 96),
    "gpt_neox": Packed("GPTNeoXForCausalLM", NEWER, "query_key_value.weight"),
    "falcon": Packed(
        "FalconForCausalLM", {**NEWER, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
        "query_key_value.weight",
    ),
    "falcon_new": Packed(  # attention and MLP side by side: their sums are one
        "FalconForCausalLM", {**NEWER, "new_decoder_architecture": True, "num_kv_heads": 3}, "query_key_value.weight",
        groups=3, all_reduces=(2, 4),
    ),
    "codegen": Packed(  # one norm for both: one gradient
        "CodeGenForCausalLM", {**OLDER, "n_head": 12, "rotary_dim": 4}, "qkv_proj.weight", groups=4, all_reduces=(4, 2)
    ),
    "mpt": Packed("MptForCausalLM", MPT, "Wqkv.weight", THIRDS),
    "mpt_clipped": Packed("MptForCausalLM", {**MPT, "attn_config": {"clip_qkv": 0.5}}, "Wqkv.weight", THIRDS),
    "bigcode": Packed("GPTBigCodeForCausalLM", {**OLDER, "multi_query": False}, "c_attn.weight"),
    "glm_gate": Packed(
        "GlmForCausalLM", {**NEWER, "num_key_value_heads": 6, "head_dim": 8}, "gate_up_proj.weight", HALVES, 96
    ),
    "modernbert": Packed(
        "ModernBertForMaskedLM", {**NEWER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}, "Wqkv.weight",
        THIRDS,
    ),
    "blip": Packed("BlipVisionModel", SEEING, "qkv.weight", THIRDS),
}  # fmt: skip


def build(entry: Packed) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    cls = getattr(transformers, entry.model)
    model = cls(cls.config_class(**entry.config)).eval()
    if entry.config is SEEING:
        return model, {"pixel_values": images(16, 16, 2).double()}
    inputs = {"input_ids": ids()}
    return model, {**inputs, "use_cache": False} if hasattr(model.config, "use_cache") else inputs


def in_layers(program: fxshard.ParallelModule) -> Counter[tuple[str, str]]:
    """The collectives but those of the word table and the head that scores it, or of a patch embedding."""
    found = counts(program)
    if any("patch_embedding" in c.module for c in program.collectives()):
        return found - Counter({("forward", "all_gather"): 1, ("backward", "all_gather"): 1})
    if any(c.kind == "all_gather" for c in program.collectives()):
        found -= Counter({("forward", "all_reduce"): 1, ("forward", "all_gather"): 1, ("backward", "all_reduce"): 1})
    return found


@slow_but_for("name, ranks", product(MODELS, (2, 3, 4)), ("phi3", 4), ("falcon_new", 3))
def test_models(name: str, ranks: int) -> None:
    entry = MODELS[name]
    model, inputs = build(entry)
    program = check(model, ranks, (), inputs)
    shares = shares_of(entry.groups, ranks)
    packed = [n for n, _ in model.named_parameters() if n.endswith(entry.weight)]
    assert packed
    for weight in packed:
        assert program.placements_of(weight) == (shard(entry.dim, entry.blocks, shares),)
    forward, backward = entry.all_reduces
    assert in_layers(program) == {("forward", "all_reduce"): forward, ("backward", "all_reduce"): backward}


class Attending(nn.Module):
    """torch's own attention, behind a norm."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


@some_ranks(4)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, ranks: int) -> None:
    program = check(Attending(batch_first), ranks, (torch.randn(4, 5, SIZE, dtype=torch.float64),))
    columns = {"tp": shard(0, THIRDS, shares_of(HEADS, ranks))}
    assert program.plan.params["attention.in_proj_weight"] == columns
    assert program.plan.params["attention.in_proj_bias"] == columns
    assert program.plan.params["attention.out_proj.weight"] == {"tp": shard(1, (1,), shares_of(HEADS, ranks))}
    assert counts(program) == ALL_REDUCES


@some_ranks(4)
@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder(training: bool, ranks: int) -> None:
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 96, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    program = check(model, ranks, (torch.randn(2, 5, SIZE, dtype=torch.float64),))
    for i in (0, 1):
        placed = program.placements_of(f"layers.{i}.self_attn.in_proj_weight")
        assert placed == (shard(0, THIRDS, shares_of(HEADS, ranks)),)
    assert counts(program) == {("forward", "all_reduce"): 4, ("backward", "all_reduce"): 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("FalconForCausalLM", {**NEWER, "multi_query": True, "new_decoder_architecture": False}),
        ("GPTBigCodeForCausalLM", {**OLDER, "multi_query": True}),
        ("Phi3ForCausalLM", {**NEWER, "num_key_value_heads": 1}),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_models_of_one_key_head(model: str, config: dict[str, Any], ranks: int) -> None:
    """The packed weight and the output projection are stored in parts, and gathered; the MLP is a pair."""
    entry = Packed(model, config, "")
    module, inputs = build(entry)
    program = check(module, ranks, (), inputs)
    ends = ("query_key_value.weight", "c_attn.weight", "qkv_proj.weight")
    packed = [n for n, _ in module.named_parameters() if n.endswith(ends)]
    assert len(packed) == 2
    if ranks == 2:  # k and v are stored in parts, and gathered; the output projection is a row
        assert in_layers(program)["forward", "all_gather"] == 2
        assert in_layers(program)["forward", "all_reduce"] in (2, 4)  # attention and MLP side by side: one sum
        return
    for weight in packed:
        assert program.placements_of(weight) == (shard(0, (1,), shares_of(SIZE + 2 * DIM, ranks)),)
    assert in_layers(program)["forward", "all_gather"] == 4
