"""check_local: a rank's final graph is run without values, and whatever a pass behind ``check`` spoils is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxshard
from fxshard import Plan, Shard, sequence_parallel, tensor_parallel
from fxshard.errors import SoundnessError
from fxshard.ir.info import copy_graph, info_of, set_info
from fxshard.passes import pipeline
from fxshard.passes.check_local import check_local
from fxshard.runtime import async_collectives
from fxshard.runtime import collectives as run

aten = torch.ops.aten
X = torch.randn(4, 6, 8)


class Heads(nn.Module):
    """Column and row weights around a view that makes heads, a norm, and a branch of columns that is gathered late."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(x))
        heads = h.view(*h.shape[:-1], 4, 4)
        return x + self.down(torch.relu(heads).flatten(-2))


def whole_heads(graph: fx.Graph) -> None:
    """The view keeps the sizes of the whole."""
    node = next(n for n in graph.nodes if n.target in (aten.view.default, aten.reshape.default))
    node.args = (node.args[0], [4, 6, 4, 4])


def not_cut(graph: fx.Graph) -> None:
    """A sum that each rank should hold a part of is whole."""
    node = next(n for n in graph.nodes if n.target is run.reduce_scatter)
    node.target, node.args = run.all_reduce, node.args[:2]


def another_dim(graph: fx.Graph) -> None:
    """A collective that begins early joins another dim."""
    begins = (async_collectives.begin_all_gather, run.all_gather)
    node = next(n for n in graph.nodes if n.target in begins)
    node.kwargs = {**node.kwargs, "dim": 0}


def another_dtype(graph: fx.Graph) -> None:
    """A result is claimed to be of another precision."""
    node = next(n for n in graph.nodes if n.target is aten.relu.default)
    node.meta["val"] = node.meta["val"].double()


def another_placement(graph: fx.Graph) -> None:
    """A result is claimed to be cut along another dim."""
    node = next(n for n in graph.nodes if n.target is aten.relu.default)
    info = info_of(node)
    set_info(node, type(info)(((Shard(0),),), differentiable=info.differentiable))


SPOILED: dict[str, tuple[str, Plan, Callable[[fx.Graph], None]]] = {
    "localize": ("localize", tensor_parallel(2), whole_heads),
    "optimize, a sum that is not cut": ("optimize", sequence_parallel(2), not_cut),
    "optimize, a dtype": ("optimize", tensor_parallel(2), another_dtype),
    "optimize, a placement": ("optimize", tensor_parallel(2), another_placement),
    "schedule": ("schedule", sequence_parallel(2), another_dim),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_a_pass_spoils_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plan, spoil = SPOILED[case]
    fxshard.parallelize(Heads(), plan, (X,))
    passed = getattr(pipeline, name)

    @functools.wraps(passed)
    def spoiled(*args: Any, **kwargs: Any) -> fx.Graph:
        graph = copy_graph(passed(*args, **kwargs))
        spoil(graph)
        return graph

    monkeypatch.setattr(pipeline, name, spoiled)
    with pytest.raises(SoundnessError, match=r"of rank 0 (gives|cannot run)") as caught:
        fxshard.parallelize(Heads(), plan, (X,))
    assert caught.value.op
    assert "function" not in caught.value.op, "its name, as in the code"
    assert "bug of fxshard" in str(caught.value.fix)


def test_calls_that_are_alike_run_once() -> None:
    count = []

    def calls(layers: int) -> int:
        model = nn.Sequential(*(Heads() for _ in range(layers)))
        program = fxshard.parallelize(model, tensor_parallel(2), (X,))
        count.clear()
        check_local(program.graph_after("schedule"), program.mesh.seen_by(0))
        return len(count)

    ran = torch.ops.aten.relu.default

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ran:
                count.append(func)
            return func(*args, **(kwargs or {}))

    with Counted():
        assert calls(1) == calls(3) == 1


class AsKernelsLeaveIt(nn.Module):
    """Views that hold for how a kernel of this device lays out its result, and not for how one without values does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(*x.shape[:2], 4, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
        return self.o(y.view(*x.shape[:2], 2, 8).view(*x.shape[:2], 16))


class Bags(nn.Module):
    """``embedding_bag`` gives other sizes of what nobody reads on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(ids)


class Picked(nn.Module):
    """How many rows there are, values say."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return h.masked_select(h > 0).sum() + (h > 0).nonzero().sum()


@torch.library.custom_op("fxshard_tests::doubled_here", mutates_args=())
def doubled_here(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled_here.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "meta":
        raise RuntimeError("there is no such kernel")
    return torch.empty_like(x)


doubled_here.register_autograd(lambda ctx, grad: grad * 2)


class Here(nn.Module):
    """An operator that has a kernel for the device of its operands only."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return torch.bmm(doubled_here(h), h.transpose(1, 2))


@pytest.mark.parametrize("plan", [fxshard.data_parallel(2), tensor_parallel(2)])
@pytest.mark.parametrize("model", [AsKernelsLeaveIt, Bags, Picked, Here])
def test_what_differs_without_values_is_no_bug(model: type[nn.Module], plan: Plan) -> None:
    x = torch.randint(0, 16, (4, 4)) if model is Bags else X
    assert fxshard.verify(fxshard.parallelize(model(), plan, (x,)), x)
