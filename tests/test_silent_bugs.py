"""Bugs that other systems had, and that nothing showed but wrong numbers: one test each.

The numbers of every case are compared with the original in float64; the rest of a test says what else must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, sequence_parallel, tensor_parallel
from tests.helpers import assert_equivalent, run_original, run_simulated

X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
IDS = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(6))


class Does(nn.Module):
    """Parameters of given shapes, and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in shapes.items():
            weight = torch.randn(*shape, dtype=torch.float64, generator=generator)
            self.register_parameter(name, nn.Parameter(weight))
        self.does = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.does(self, *inputs)


def holds(
    forward: Callable[..., Any], plan: Plan, inputs: tuple[Any, ...] = (X,), training: bool = False, **shapes: Any
) -> fxshard.ParallelModule:
    model = Does(forward, **shapes).train(training)
    inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    return assert_equivalent(model, plan, inputs)


def kinds(program: fxshard.ParallelModule, phase: str) -> list[str]:
    return [c.kind for c in program.collectives() if c.phase == phase]


def tp(size: int = 2, **entries: Any) -> Plan:
    return Plan({"tp": size}, **entries)


# --- sums and their gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bias_of_a_row_split_linear_is_added_once(ranks: int) -> None:
    program = holds(
        lambda m, x: F.linear(x, m.w, m.b), tp(ranks, params={"w": Shard(1)}), w=(5, 8), b=(5,)
    )  # fmt: skip
    assert program.rank_module(0).w.shape == (5, 8 // ranks), "the bias keeps nothing whole"
    assert kinds(program, "forward") == ["all_reduce"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_are_not_multiplied_by_the_number_of_ranks(ranks: int) -> None:
    """An all_reduce whose gradient were another all_reduce; and one that is squared behind it."""
    holds(
        lambda m, x: F.linear(F.gelu(F.linear(x, m.up)), m.down).square(),
        tp(ranks, params={"up": Shard(0), "down": Shard(1)}), up=(12, 8), down=(8, 12),
    )  # fmt: skip


def test_the_gradient_of_the_input_is_whole() -> None:
    program = holds(lambda m, x: F.linear(x, m.w), tp(params={"w": Shard(0)}), w=(4, 8))
    assert kinds(program, "backward") == ["all_reduce"]


def test_what_is_upstream_of_a_split_gets_a_whole_gradient_too() -> None:
    """Two column splits in a row, each behind its own sum."""
    holds(
        lambda m, x: F.linear(F.linear(F.layer_norm(x, (8,), m.g), m.up).tanh(), m.down),
        tp(params={"up": Shard(0)}), g=(8,), up=(16, 8), down=(8, 16),
    )  # fmt: skip


def test_sequence_parallel_sums_the_gradients_of_norms_and_biases() -> None:
    program = holds(
        lambda m, x: F.layer_norm(x, (8,), m.g, m.b) + m.c, tp(inputs={"*": Shard(1)}), g=(8,), b=(8,), c=(6, 1),
    )  # fmt: skip
    summed = [c for c in program.collectives() if (c.phase, c.kind) == ("backward", "all_reduce")]
    assert [c.num_bytes for c in summed] == [2 * 8 * 8]  # of g and b, in one bucket; c is cut along the sequence


def test_readers_of_one_value_share_its_conversions() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * m.s
        q, k, v = (F.linear(x, w) for w in (m.q, m.k, m.v))
        return F.linear(q * k.sigmoid() + v, m.o)

    column = {n: Shard(0) for n in "qkv"}
    shapes = dict.fromkeys("qkvo", (8, 8))
    program = holds(forward, tp(params={**column, "o": Shard(1)}), s=(8,), **shapes)
    assert kinds(program, "forward") == ["all_reduce"]
    assert kinds(program, "backward") == ["all_reduce"]


def test_a_sum_of_partial_sums_is_reduced_once() -> None:
    program = holds(
        lambda m, x: F.linear(x, m.a) + F.linear(x, m.b), tp(params={"a": Shard(1), "b": Shard(1)}), a=(8, 8), b=(8, 8)
    )
    assert kinds(program, "forward") == ["all_reduce"]


def test_a_number_is_not_added_to_every_partial_sum() -> None:
    holds(lambda m, x: F.linear(x, m.w) + 1, tp(params={"w": Shard(1)}), w=(8, 8))
    holds(lambda m, x: 3 - F.linear(x, m.w), tp(params={"w": Shard(1)}), w=(8, 8))
    holds(lambda m, x: torch.where(x > 0, F.linear(x, m.w), 1.0), tp(params={"w": Shard(1)}), w=(8, 8))
    holds(lambda m, x: F.linear(x, m.w).masked_fill(x > 0, 2.0), tp(params={"w": Shard(1)}), w=(8, 8))


# --- views and cuts -------------------------------------------------------------------------------------------------


def test_sizes_in_views_are_those_of_the_rank() -> None:
    """``view(x, [4, 6, -1, 2])`` with the global 4 on half a batch would give a wrong shape without any error."""
    for view in ([4, 6, -1, 2], [4, -1], [-1, 8], [4, 6, 4, 2], [2, 2, 6, 8], [4, 3, -1, 8]):
        holds(lambda m, x, view=view: x.view(view) * m.w, tp(inputs={"*": Shard(0)}), w=(1,))
        holds(lambda m, x, view=view: F.linear(x, m.w).view(view) * 2, tp(params={"w": Shard(0)}), w=(8, 8))


def test_a_part_of_an_input_may_be_viewed_as_the_whole_was() -> None:
    """A slice of a tensor that needs no gradient is not contiguous, unless made so."""
    for dim in (0, 1, 2):
        model = Does(lambda m, x: F.linear(x.view(-1, 8).view(24, 2, 4).view(-1, 8), m.w), w=(8, 8))
        assert_equivalent(model, tp(inputs={"*": Shard(dim)}), (X,))


@pytest.mark.thin(2)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(24, 8), (4, 48), (192,), (6, 4, 8), (8, 24), (4, 3, 16)])
def test_regrouping_a_split_dim(dim: int, shape: tuple[int, ...]) -> None:
    """Flattened in front of another dim it is split in blocks; a reshape across both is no slice of the whole."""
    holds(lambda m, x: (x * m.w).reshape(shape).tanh(), tp(inputs={"*": Shard(dim)}), w=(8,))


@pytest.mark.parametrize(
    "cut",
    [
        lambda h: h[..., 3:9], lambda h: h[..., :5], lambda h: h[..., -7:], lambda h: h[..., ::2],
        lambda h: h.split([5, 7, 4], -1)[1], lambda h: h.chunk(3, -1)[2], lambda h: h.chunk(2, -1)[1],
        lambda h: h.narrow(-1, 2, 8), lambda h: h[..., 9], lambda h: torch.cat([h[..., 8:], h[..., :8]], -1),
        lambda h: h.roll(3, -1), lambda h: h.unflatten(-1, (2, 8))[..., 1, 2:6],
        lambda h: torch.cat([-h[..., 8:], h[..., :8]], -1) * h,
    ],
)  # fmt: skip
def test_cuts_across_the_borders_of_shards(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    holds(lambda m, x: cut(F.linear(x, m.w)).square(), tp(4, params={"w": Shard(0)}), w=(16, 8))


PACKED: dict[str, Callable[[torch.Tensor], Any]] = {
    "split": lambda h: h.split(8, -1),
    "split by sizes": lambda h: h.split([8, 8, 8], -1),
    "chunk": lambda h: h.chunk(3, -1),
    "slices": lambda h: (h[..., :8], h[..., 8:16], h[..., 16:]),
    "narrow": lambda h: (h.narrow(-1, 0, 8), h.narrow(-1, 8, 8), h.narrow(-1, 16, 8)),
    "view": lambda h: h.unflatten(-1, (3, 8)).unbind(-2),
    "view and select": lambda h: [h.view(4, 6, 3, 8)[:, :, i] for i in range(3)],
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("cut", PACKED)
def test_a_packed_projection_is_not_cut_through_its_middle(cut: str) -> None:
    def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in PACKED[cut](F.linear(x, m.qkv, m.b)))
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), m.o)

    shapes = {"qkv": (24, 8), "b": (24,), "o": (8, 8)}
    for plan in (tp(params={"qkv": Shard(0), "b": Shard(0), "o": Shard(1)}), tensor_parallel(2)):
        program = holds(attention, plan, **shapes)
        whole = program._original.get().qkv
        local = torch.cat([part.chunk(2)[0] for part in whole.split(8)])
        assert torch.equal(program.rank_module(0).qkv, local)
        assert kinds(program, "forward") == ["all_reduce"]


@pytest.mark.thin(3)
@pytest.mark.parametrize(("heads", "key_heads", "ranks"), [(4, 1, 2), (4, 2, 4), (8, 2, 4), (4, 4, 4), (6, 2, 3)])
@pytest.mark.parametrize("repeat", ["flag", "interleave", "expand"])
def test_fewer_key_heads_than_ranks(heads: int, key_heads: int, ranks: int, repeat: str) -> None:
    group = heads // key_heads

    def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
        q = F.linear(x, m.q).unflatten(-1, (heads, 2)).transpose(1, 2)
        k, v = (F.linear(x, w).unflatten(-1, (key_heads, 2)).transpose(1, 2) for w in (m.k, m.v))
        if repeat == "interleave":
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        elif repeat == "expand":
            k, v = (t[:, :, None].expand(4, key_heads, group, 6, 2).reshape(4, heads, 6, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeat == "flag")
        return F.linear(out.transpose(1, 2).flatten(2), m.o)

    split = {"q": Shard(0), "o": Shard(1)}
    keys = {"k": Shard(0), "v": Shard(0)} if 2 * key_heads % ranks == 0 else {}
    shapes = {"q": (2 * heads, 8), "k": (2 * key_heads, 8), "v": (2 * key_heads, 8), "o": (8, 2 * heads)}
    holds(attention, tp(ranks, params=split), **shapes)
    holds(attention, tp(ranks, params=split | keys), **shapes)
    holds(attention, tensor_parallel(ranks), **shapes)


def test_reading_a_shape_gathers_nothing() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.up)
        scale = h.shape[-1] ** -0.5 * h.size(0) / h.numel()
        return F.linear(h.view(h.shape[0], -1, h.shape[-1]) * scale + torch.ones_like(h), m.down)

    program = holds(forward, tp(params={"up": Shard(0), "down": Shard(1)}), up=(16, 8), down=(8, 16))
    assert kinds(program, "forward") == ["all_reduce"]


def test_reading_a_dynamic_shape_gathers_nothing() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * m.w).view(x.shape[0] * x.shape[1], -1).sum(0) / x.shape[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    model = Does(forward, w=(8,))
    program = fxshard.parallelize(model, data_parallel(2), (X,), dynamic_shapes=(({0: batch},),))
    assert kinds(program, "forward") == ["all_reduce"]
    for count in (2, 4, 8):
        x = torch.randn(count, 6, 8, dtype=torch.float64)
        torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], model(x))


# --- counts ---------------------------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean of all": lambda h: h.mean(),
    "mean of the split dim": lambda h: h.mean(-1),
    "mean of two dims": lambda h: h.mean((0, -1)),
    "mean of another dim": lambda h: h.mean(1),
    "sum by the global count": lambda h: h.sum() / h.numel(),
    "sum by a size": lambda h: h.sum(-1) / h.shape[-1],
    "variance": lambda h: h.var(-1),
    "standard deviation": lambda h: h.std((1, 2)),
    "layer norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax read by more than a loss": lambda h: h.log_softmax(-1).exp() * h,
    "logsumexp": lambda h: h.logsumexp(-1),
    "maximum": lambda h: h.amax(-1),
    "minimum": lambda h: h.amin(),
    "norm": lambda h: torch.linalg.vector_norm(h, dim=-1),
    "mean squared error": lambda h: F.mse_loss(h, h.detach() + 1),
    "cumulative sum": lambda h: h.cumsum(-1),
    "argmax": lambda h: h.argmax(-1).double() * h.sum(-1),
    "topk": lambda h: h.topk(3, -1).values,
    "any": lambda h: (h > 1).any(-1) * h.mean(-1),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dim", [0, 1])
def test_reductions_count_globally(name: str, dim: int) -> None:
    reduce = REDUCTIONS[name]
    holds(lambda m, x: reduce(F.linear(x, m.w)), tp(4, params={"w": Shard(dim)}), w=(16, 8))
    holds(lambda m, x: reduce(F.linear(x, m.w)), data_parallel(2), w=(16, 8))


@pytest.mark.thin(2)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("plan", [tp(params={"w": Shard(0)}), data_parallel(2), data_parallel(2) | tensor_parallel(2)])
def test_losses_count_what_counts(plan: Plan, reduction: str, smoothing: float) -> None:
    """Ignored targets lie unevenly over the ranks; smoothing spreads over the global vocabulary."""
    target = IDS.clone()
    target[0] = -100
    target[1, 2:] = -100

    def forward(m: Any, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = F.linear(F.embedding(ids, m.e), m.w).flatten(0, 1)
        return F.cross_entropy(logits, target.flatten(), m.c.detach(), reduction=reduction, label_smoothing=smoothing)

    holds(forward, plan, (IDS, target), e=(12, 8), w=(12, 8), c=(12,))


# --- several axes, writes, masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [{"a": 2, "b": 3}, {"b": 3, "a": 2}])
@pytest.mark.parametrize("dim", [0, 1])
def test_two_axes_on_one_dim(order: dict[str, int], dim: int) -> None:
    both = {"a": Shard(dim), "b": Shard(dim)}
    holds(lambda m, x: F.linear(x, m.w).tanh(), Plan(order, params={"w": both}), (X[..., :6],), w=(12, 6))
    holds(lambda m, x: F.linear(x, m.w).tanh(), Plan(order, inputs={"*": {"a": Shard(1), "b": Shard(1)}}), w=(12, 8))
    outputs = Plan(order, params={"w": {"a": Shard(0)}}, activations={}, inputs={"*": {"b": Shard(1)}})
    holds(lambda m, x: F.linear(x, m.w).transpose(1, 2).flatten(1).tanh(), outputs, w=(12, 8))


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "index_put that adds": lambda h: torch.zeros(3, *h.shape[1:], dtype=h.dtype).index_put(
        (torch.tensor([0, 2, 0, 0]),), h, accumulate=True
    ),
    "index_add": lambda h: torch.zeros(2, *h.shape[1:], dtype=h.dtype).index_add(0, torch.tensor([1, 1, 0, 1]), h),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(-1, (h > 0).long() * 3, h),
    "scatter": lambda h: h.scatter(1, torch.zeros(4, 1, 16, dtype=torch.long), h[:, 3:4] * 2),
    "gather": lambda h: h.gather(-1, h.argsort(-1).flip(-1)),
    "index by a tensor": lambda h: h[:, torch.tensor([0, 5, 5, 1])],
    "index_select": lambda h: h.index_select(-1, torch.tensor([0, 15, 7, 7])),
    "a slice is written": lambda h: _write(h, lambda c: c[..., 2:9].mul_(2)),
    "a select is written": lambda h: _write(h, lambda c: c[1].fill_(3)),
    "bitwise_not": lambda h: h.masked_fill(~(h > 0), 0) + (h > 1).logical_not() * h,
    "a mask from positions": lambda h: h.masked_fill(torch.arange(16) > 5, 0) * torch.arange(6)[:, None],
    "one_hot": lambda h: F.one_hot(h.argmax(-1), 16) * h,
}


def _write(h: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    copy = h.clone()
    write(copy)
    return copy * h


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", WRITES)
def test_writes_and_masks(name: str) -> None:
    does = WRITES[name]
    split = [tp(4, params={"w": Shard(dim)}) for dim in (0, 1)]
    for plan in (*split, data_parallel(2), tp(inputs={"*": Shard(1)})):
        holds(lambda m, x: does(F.linear(x, m.w)), plan, w=(16, 8))


@pytest.mark.thin(2)
@pytest.mark.parametrize("ranks", [3, 4, 7, 12])
def test_padding_of_uneven_shards_leaks_nowhere(ranks: int) -> None:
    """Ten features on so many ranks, some of which have none: into no sum, mean, maximum, softmax or gradient."""
    reads: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda h: h, lambda h: h.mean(), lambda h: h.sum(-1), lambda h: h.amax(-1) + h.amin((0, 2)), lambda h: h.std(),
        lambda h: h.softmax(-1), lambda h: h.logsumexp(-1), lambda h: F.layer_norm(h, (10,)), lambda h: h.cumsum(-1),
        lambda h: F.cross_entropy(h.flatten(0, 1), torch.arange(24) % 10, ignore_index=3), lambda h: h.prod(1),
        lambda h: h.flip(-1).roll(1, -1),
        lambda h: torch.cat([h, -h], -1).sort(-1)[0], lambda h: h.view(4, 6, 5, 2).sum(3),
    ]  # fmt: skip
    for read in reads:
        for dim in (0, 1):
            holds(lambda m, x, read=read: read(F.linear(x, m.w)), tp(ranks, params={"w": Shard(dim)}), w=(10, 8))
        holds(lambda m, x, read=read: read(F.linear(x, m.w)), tp(ranks, inputs={"*": Shard(1)}), w=(10, 8))


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        tp(params={"w": Shard(0)}), tp(params={"w": Shard(1)}), data_parallel(2), tp(inputs={"*": Shard(1)}),
        data_parallel(2) | tensor_parallel(2), Plan({"a": 2, "b": 3}, inputs={"*": {"a": Shard(1), "b": Shard(1)}}),
    ],
)  # fmt: skip
def test_dropout_draws_one_mask_for_all_ranks(plan: Plan) -> None:
    """Split values get different parts of one mask, replicated values the same mask, partial sums one after the sum."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        F.dropout(x, 0.3)  # unread: it draws all the same
        h = F.dropout(F.linear(x, m.w), 0.5)
        return F.dropout(F.linear(F.gelu(h), m.v), 0.2) + torch.rand_like(x) * F.dropout(x, 0.1)

    holds(forward, plan, training=True, w=(16, 8), v=(8, 16))


def test_masks_differ_from_step_to_step() -> None:
    program = fxshard.parallelize(Does(lambda m, x: F.dropout(x * m.w, 0.5), w=(8,)), data_parallel(2), (X,))
    torch.manual_seed(0)
    one, two = (fxshard.simulate(program, X).outputs[0] for _ in range(2))
    assert not torch.equal(one, two)


# --- tied weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "plan", [tensor_parallel(2), data_parallel(2) | tensor_parallel(2), tp(params={"table.weight": Shard(1)})]
)
def test_tied_weights_are_split_and_updated_once(plan: Plan) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    program = assert_equivalent(model, plan, (IDS,))
    assert len(list(program.parameters())) == len(list(model.parameters()))
    reference = Tied().double()
    reference.load_state_dict(model.state_dict())
    whole = torch.optim.SGD(reference.parameters(), 0.1)
    parts = [torch.optim.SGD(program.rank_module(r).parameters(), 0.1) for r in range(program.mesh.world_size)]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return logits.square().mean()

    for _ in range(3):
        for optimizer in (whole, *parts):
            optimizer.zero_grad()
        loss(reference(IDS)).backward()
        fxshard.simulate(program, IDS).backward(loss)
        for optimizer in (whole, *parts):
            optimizer.step()
    state = program.full_state_dict()
    for name, want in reference.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fxshard.simulate(program, IDS).outputs[0], reference(IDS), rtol=1e-12, atol=1e-12)


def test_batch_statistics_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)).double()
    for plan in (data_parallel(2), tp(inputs={"*": Shard(2)})):
        program = assert_equivalent(model, plan, (X,))
        expected, actual = run_original(model, (X,)), run_simulated(program, (X,))
        assert expected.buffers.keys() == actual.buffers.keys() | {"1.num_batches_tracked"}


def test_sequence_parallel_where_the_length_does_not_divide() -> None:
    from tests.models.zoo import build, ids

    model, _ = build("llama")
    program = assert_equivalent(model, sequence_parallel(2), (), {"input_ids": ids(length=15), "use_cache": False})
    assert "shares=(8, 7)" in str(program.plan)
    assert "all_reduce" not in kinds(program, "forward")
