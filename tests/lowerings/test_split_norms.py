"""Norms over split dims: outputs, gradients and running buffers are those of one device, and nothing is gathered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, tensor_parallel
from fxshard.lowerings import statistics
from fxshard.passes import localize
from fxshard.runtime import collectives as run
from tests.helpers import assert_equivalent

D = torch.float64


def randn(*shape: int, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(3)).to(dtype)


def randomized(model: nn.Module, dtype: torch.dtype = D) -> nn.Module:
    torch.manual_seed(0)
    model = model.to(dtype).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def gathered(program: fxshard.ParallelModule, at_most: int = 0) -> list[Any]:
    """What the forward pass gathers or moves, but for the model's outputs and what has at most so many bytes."""
    moved = [c for c in program.collectives() if c.phase == "forward" and c.kind != "all_reduce"]
    return [c for c in moved if not c.reason.endswith("the output of the model") and c.num_bytes > at_most]


class Apply(nn.Module):
    """A norm of an input, scaled so that the gradient of the input is seen."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(shape)), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * self.scale).sin()  # type: ignore[no-any-return]


# norm, the shape of its input, the dims that one axis may split in turn
NORMS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(12), (3, 4, 12), (1, 2)),
    "layer_norm of two dims": (lambda: nn.LayerNorm((4, 12)), (3, 4, 12), (1, 2)),
    "layer_norm without bias": (lambda: nn.LayerNorm(12, bias=False), (8, 12), (0, 1)),
    "layer_norm without weights": (lambda: nn.LayerNorm(12, elementwise_affine=False), (8, 12), (0, 1)),
    "rms_norm": (lambda: nn.RMSNorm(12), (3, 4, 12), (1, 2)),
    "rms_norm with an epsilon": (lambda: nn.RMSNorm(12, eps=0.5), (3, 4, 12), (2,)),
    "group_norm of one group": (lambda: nn.GroupNorm(1, 12), (4, 12, 4), (0, 1, 2)),
    "group_norm of two groups": (lambda: nn.GroupNorm(2, 12), (4, 12, 4), (1, 2)),
    "group_norm of three groups": (lambda: nn.GroupNorm(3, 12), (2, 12, 4, 4), (1, 2, 3)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 4, 4, 4), (0, 1, 2, 3)),
    "batch_norm of rows": (lambda: nn.BatchNorm1d(12), (8, 12), (0,)),
    "batch_norm of images": (lambda: nn.BatchNorm2d(4), (4, 4, 4, 8), (0, 2, 3)),
    "batch_norm without weights": (lambda: nn.BatchNorm1d(12, affine=False), (8, 12), (0,)),
    "batch_norm without buffers": (lambda: nn.BatchNorm1d(12, track_running_stats=False), (8, 12), (0,)),
    "batch_norm, slow": (lambda: nn.BatchNorm1d(12, momentum=0.01, eps=0.1), (8, 12), (0,)),
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_a_split_dim(name: str, ranks: int) -> None:
    make, shape, dims = NORMS[name]
    for dim in dims:
        model, x = randomized(Apply(make(), shape)), randn(*shape) + 3
        program = assert_equivalent(model, Plan({"tp": ranks}, inputs={"*": Shard(dim)}), (x,))
        whole = x.numel() * x.element_size()
        assert not gathered(program, at_most=whole // 4), (dim, gathered(program))
        assert fxshard.verify(program, x).ok


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", NORMS)
def test_two_axes_split_two_dims_or_one(name: str) -> None:
    make, shape, dims = NORMS[name]
    for first in dims:
        for second in range(len(shape)):
            if shape[second] % (4 if first == second else 2) == 0:
                model, x = randomized(Apply(make(), shape)), randn(*shape) + 3
                plan = Plan({"a": 2, "b": 2}, inputs={"*": {"a": Shard(first), "b": Shard(second)}})
                assert_equivalent(model, plan, (x,))


def test_batch_and_features_of_a_layer_norm_are_split_at_once() -> None:
    model, x = randomized(Apply(nn.LayerNorm(12), (8, 12))), randn(8, 12)
    plan = Plan({"a": 2, "b": 2}, inputs={"*": {"a": Shard(0), "b": Shard(1)}}, outputs={"a": Shard(0), "b": Shard(1)})
    program = fxshard.parallelize(model, plan, (x,))
    forward = [(c.kind, c.axis, c.num_bytes) for c in program.collectives() if c.phase == "forward"]
    assert forward == [("all_reduce", "b", 4 * 8)] * 2, "of 4 rows a number each, for mean and variance"


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Statistics are of single precision; ATen's batch_norm rounds its own, and is further off than the program."""
    make, shape, dims = NORMS[name]
    model, x = randomized(make(), dtype), randn(*shape, dtype=dtype) * 2 + 3
    program = fxshard.parallelize(model, Plan({"tp": 2}, inputs={"*": Shard(dims[-1])}), (x,))
    (y, *_), eps = fxshard.simulate(program, x).outputs, torch.finfo(dtype).eps
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(y, exact(x.double()).to(dtype), rtol=eps, atol=eps / 10)
    state = program.full_state_dict()
    for key, buffer in exact.named_buffers():
        torch.testing.assert_close(state[key], buffer.to(state[key].dtype), rtol=eps, atol=eps / 10)
    torch.testing.assert_close(y, copy.deepcopy(model)(x), rtol=4 * eps, atol=4 * eps)


def test_mean_of_large_numbers_does_not_cost_the_variance_its_digits() -> None:
    x = (randn(8, 12) + 1e4).float()
    program = fxshard.parallelize(nn.LayerNorm(12), Plan({"tp": 2}, inputs={"*": Shard(1)}), (x,))
    exact = F.layer_norm(x.double(), (12,))
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[0].double(), exact, rtol=0, atol=5e-3)


# --- batch_norm, trained ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


def steps_of_both(program: fxshard.ParallelModule, model: nn.Module, inputs: list[torch.Tensor]) -> nn.Module:
    """Trains the program and a copy of the model alike; returns the copy."""
    reference = copy.deepcopy(model)
    whole = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    ranks = range(program.mesh.world_size)
    parts = [torch.optim.SGD(program.rank_module(r).parameters(), lr=0.1, momentum=0.9) for r in ranks]
    for x in inputs:
        for optimizer in (whole, *parts):
            optimizer.zero_grad()
        reference(x).square().mean().backward()
        fxshard.simulate(program, x).backward(lambda y: y.square().mean())
        for optimizer in (whole, *parts):
            optimizer.step()
    return reference


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_residual_network_trains_data_parallel_as_on_one_device(ranks: int) -> None:
    model = randomized(ResNet())
    inputs = [randn(8, 3, 8, 8) * scale for scale in (1, 2, 3)]
    program = assert_equivalent(model, data_parallel(ranks), (inputs[0],))
    assert not gathered(program), "no activation is gathered"
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    summed = [c for c in program.collectives() if c.phase == "forward" and c.kind == "all_reduce"]
    assert len(summed) == 2 * norms
    assert max(c.num_bytes for c in summed) == 16 * 8, "a number a channel"

    program = fxshard.parallelize(model, data_parallel(ranks), (inputs[0],))
    reference = steps_of_both(program, model, inputs)
    state, expected = program.full_state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(state[name], want, rtol=1e-10, atol=1e-10)
    assert int(state["stem.1.num_batches_tracked"]) == len(inputs)
    for name, buffer in program.rank_module(0).named_buffers():
        for rank in range(1, ranks):
            assert torch.equal(dict(program.rank_module(rank).named_buffers())[name], buffer), "equal on all ranks"
    program.eval()
    torch.testing.assert_close(
        fxshard.simulate(program, inputs[1]).outputs[0], reference.eval()(inputs[1]), rtol=1e-9, atol=1e-9
    )


def test_evaluated_it_communicates_nothing_but_the_output() -> None:
    program = assert_equivalent(randomized(ResNet()).eval(), data_parallel(2), (randn(8, 3, 8, 8),))
    assert [c.kind for c in program.collectives() if c.phase == "forward"] == ["all_gather"]


def test_channels_split_over_one_axis_and_the_batch_over_another() -> None:
    """Statistics of a rank's channels are its own, and so are their running buffers."""
    model = randomized(nn.Sequential(nn.Conv1d(6, 8, 1, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)))
    params = {f"1.{name}": {"tp": Shard(0)} for name in ("weight", "bias", "running_mean", "running_var")}
    params |= {"0.weight": {"tp": Shard(0)}, "3.weight": {"tp": Shard(1)}}
    plan = Plan({"dp": 2, "tp": 2}, params=params, inputs={"*": {"dp": Shard(0)}})
    program = assert_equivalent(model, plan, (randn(4, 6, 5),))
    sums = [c for c in program.collectives() if c.phase == "forward" and c.module == "1"]
    assert [(c.kind, c.axis, c.num_bytes) for c in sums] == [("all_reduce", "dp", 4 * 8)] * 2
    assert not gathered(program)
    assert program.rank_module(0).get_buffer("1.running_var").shape == (4,)
    program = fxshard.parallelize(model, plan, (randn(4, 6, 5),))
    reference = steps_of_both(program, model, [randn(4, 6, 5), randn(4, 6, 5) + 1])
    state = program.full_state_dict()
    for name, want in reference.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=1e-10, atol=1e-10)


def test_a_batch_of_dynamic_size_is_counted_at_the_call() -> None:
    model = randomized(nn.Sequential(nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = fxshard.parallelize(model, data_parallel(2), (randn(4, 6, 5),), dynamic_shapes=({0: batch},))
    reference = copy.deepcopy(model)
    for size in (4, 8, 6):
        x = randn(size, 6, 5)
        torch.testing.assert_close(fxshard.simulate(program, x).outputs[0], reference(x), rtol=1e-10, atol=1e-10)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(program.full_state_dict()[name], buffer, rtol=1e-12, atol=1e-12)
    assert not gathered(program)


# --- what is followed ------------------------------------------------------------------------------------------------


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


def test_a_norm_between_a_column_and_a_row_keeps_the_features_split() -> None:
    model, x = randomized(Between()), randn(4, 6, 8)
    params = {"up.*": Shard(0), "norm.*": Shard(0), "down.weight": Shard(1)}
    program = assert_equivalent(model, Plan({"tp": 2}, params=params), (x,))
    forward = [(c.kind, c.num_bytes) for c in program.collectives() if c.phase == "forward"]
    rows, out = 4 * 6 * 8, 4 * 6 * 8 * 8
    assert forward == [("all_reduce", rows), ("all_reduce", rows), ("all_reduce", out)]
    assert "partial sum" in program.explain()


def test_where_the_result_is_read_whole_the_operand_is_gathered_once() -> None:
    """A stem that is split by itself must not split the residual stream behind it, which column weights read whole."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.up, self.down = (
                nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.dropout(self.norm(self.stem(x)), 0.1, False)
            return h + self.down(self.up(h).relu())  # type: ignore[no-any-return]

    params = {"stem.*": Shard(0), "up.*": Shard(0), "down.weight": Shard(1)}
    program = assert_equivalent(randomized(Residual()), Plan({"tp": 2}, params=params), (randn(4, 8),))
    assert [(c.kind, c.num_bytes) for c in program.collectives() if c.phase == "forward"] == [
        ("all_gather", 4 * 8 * 8),
        ("all_reduce", 4 * 8 * 8),
    ]


def test_a_preset_makes_a_pair_through_a_norm_where_there_is_none_without() -> None:
    """The ranks share two numbers a row, and the sum of the second weight."""
    program = assert_equivalent(Between().double(), tensor_parallel(2), (randn(2, 8),))
    assert len(program.plan.params) == 5
    assert sorted(c.num_bytes for c in program.collectives() if c.phase == "forward") == [2 * 8, 2 * 8, 2 * 8 * 8]
    first = fxshard.parallelize(nn.Sequential(nn.Linear(8, 8), Between()), tensor_parallel(2), (torch.randn(2, 8),))
    assert first.plan.params["1.up.weight"] == {"tp": Shard(1)}, "a pair without a norm comes first"


def test_running_buffers_that_are_whole_where_channels_are_split_gather_the_operand() -> None:
    model = randomized(nn.Sequential(nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)))
    program = assert_equivalent(model, Plan({"tp": 2}, params={"0.weight": Shard(0)}), (randn(4, 6, 5),))
    assert gathered(program)


# --- sabotage --------------------------------------------------------------------------------------------------------


def test_without_the_lowering_the_statistics_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomized(nn.BatchNorm1d(12)), randn(8, 12)
    plan = data_parallel(2)
    assert_equivalent(model, plan, (x,))
    monkeypatch.setitem(localize.LOWERINGS, "norm", lambda new, node, *rest: node)
    with pytest.raises(AssertionError, match="output"):
        assert_equivalent(model, plan, (x,))


@pytest.mark.parametrize("name", ["layer_norm", "group_norm of one group", "batch_norm of images"])
def test_without_vary_the_gradients_are_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, dims = NORMS[name]
    model, x = randomized(Apply(make(), shape)), randn(*shape)
    monkeypatch.setattr(statistics.Statistics, "varied", lambda self, x, axes=None: x)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_equivalent(model, Plan({"tp": 2}, inputs={"*": Shard(dims[-1])}), (x,))


def test_a_local_count_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    count = statistics.Statistics.count
    monkeypatch.setattr(statistics.Statistics, "count", lambda self, x, dims: count(self, x, dims) // 2)
    with pytest.raises(AssertionError, match="output"):
        assert_equivalent(randomized(nn.BatchNorm1d(12)), data_parallel(2), (randn(8, 12),))


def test_running_buffers_of_the_local_batch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are not shared: outputs and buffers both show it."""
    collective = statistics.Statistics.collective

    def without_sum(self: Any, function: Any, x: Any, axis: int) -> Any:
        return x if function is run.all_reduce else collective(self, function, x, axis)

    monkeypatch.setattr(statistics.Statistics, "collective", without_sum)
    with pytest.raises(AssertionError, match="buffer running_"):
        assert_equivalent(randomized(nn.BatchNorm1d(12)), data_parallel(2), (randn(8, 12),))
