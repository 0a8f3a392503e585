"""What stays whole for want of a rule is reported, with a rule that was tried: printed, registered, and it is split."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard, data_parallel, sequence_parallel, tensor_parallel
from fxshard.rules import table
from tests.helpers import assert_equivalent


def forget(*operators: str) -> None:
    """Takes rules out of the table; the fixture of all tests puts them back."""
    table.all_rules()
    for operator in operators:
        assert table._rules.pop(operator, None), operator
    table.generation.append("forgotten")


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    """Operators of a user's: a scale, a product, a norm, a scan, one that mixes all, and one without gradients."""
    with torch.library._scoped_library("fallbacks", "DEF") as found:
        for schema, function in {
            "scale(Tensor x, Tensor w) -> Tensor": lambda x, w: x * w,
            "project(Tensor x, Tensor w) -> Tensor": lambda x, w: torch.einsum("...i,io->...o", x, w),
            "normalize(Tensor x, float eps) -> Tensor": lambda x, eps: (
                x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
            ),
            "decay(Tensor x) -> Tensor": lambda x: x.cumsum(1),
            "swap(Tensor x) -> (Tensor, Tensor)": lambda x: (x.transpose(1, 2) * 2, x.sum(1)),
            "mix(Tensor x) -> Tensor": lambda x: torch.fft.fft2(x.flatten(0, -2)).real.reshape(x.shape),
            "rounded(Tensor x) -> Tensor": lambda x: x.detach().round(),
        }.items():
            name = schema.split("(")[0]
            found.define(schema)
            found.impl(name, function, "CompositeImplicitAutograd")
        yield found


class Between(nn.Module):
    """An operator between the two products of a pair."""

    def __init__(self, act: Callable[..., torch.Tensor], weight: tuple[int, ...] = (32,)) -> None:
        super().__init__()
        self.act = act
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.w = nn.Parameter(torch.randn(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x)), self.w))


def ops() -> Any:
    return torch.ops.fallbacks


OWN: dict[str, tuple[str, str, Callable[..., torch.Tensor], Plan, str]] = {
    "scale": ("fallbacks.scale", "... a, a -> ... a", lambda x, w: ops().scale(x, w), data_parallel(2), "0;1"),
    "normalize": (
        "fallbacks.normalize", "... z! -> ... za!", lambda x, w: ops().normalize(x, 1e-5), data_parallel(2), "",
    ),
    "decay": ("fallbacks.decay", "... z! a -> ... za! a", lambda x, w: ops().decay(x), data_parallel(2), "0"),
    "swap": (
        "fallbacks.swap", "... c+ b -> ... b za!", lambda x, w: ops().swap(x)[0].transpose(1, 2), data_parallel(2), "0",
    ),
    "rounded": ("fallbacks.rounded", "... -> ...", lambda x, w: x + ops().rounded(x), data_parallel(2), ""),
    "gelu": ("aten.gelu", "... -> ...", lambda x, w: F.gelu(x), data_parallel(2), ""),
    "mul": ("aten.mul", "... a, a -> ... a", lambda x, w: x * w, data_parallel(2), "0;1"),
    "softmax": ("aten.softmax", "... z! -> ... za!", lambda x, w: x.softmax(-1), data_parallel(2), ""),
    "cumsum": ("aten.cumsum", "... z! a -> ... za! a", lambda x, w: x.cumsum(1), data_parallel(2), "0"),
}  # fmt: skip
X = torch.randn(4, 6, 16, dtype=torch.float64)


def run(fix: str) -> None:
    """Runs a line that a report printed."""
    eval(fix, {"fxshard": fxshard})


@pytest.mark.parametrize("name", OWN)
def test_a_suggested_rule_works(name: str, library: Any, caplog: pytest.LogCaptureFixture) -> None:
    operator, rule, act, plan, linear = OWN[name]
    if operator.startswith("aten"):
        forget(operator)
    model = Between(act).double()
    with caplog.at_level(logging.WARNING, "fxshard"):
        program = assert_equivalent(model, plan, (X,))
    found = [f for f in program.fallbacks() if f.operator == operator]
    assert found, program.fallbacks()
    assert str(found[0]) in caplog.messages
    for fallback in found:
        assert fallback.fix.startswith(f'fxshard.register_rule("{operator.replace(".", "::")}", "')
        assert fallback.source.startswith("test_fallbacks.py:")
        assert fallback.num_bytes == 4 * 6 * 32 * 8
        if name != "swap":
            assert f'"{rule}"' in fallback.fix
            assert (f'linear="{linear}"' in fallback.fix) == bool(linear)
    run(found[0].fix)
    caplog.clear()
    taught = assert_equivalent(model, plan, (X,))
    assert not [f for f in taught.fallbacks() if f.operator == operator]
    assert not [message for message in caplog.messages if "has no rule" in message]
    moved = [sum(c.num_bytes for c in p.collectives() if c.kind == "all_gather") for p in (program, taught)]
    assert moved[1] < moved[0]


def test_a_matrix_product_that_was_forgotten() -> None:
    """Its rule is found as einsum would write it; once registered, tensor parallelism finds its pairs again."""
    forget("aten.linear")
    model = Between(lambda x, w: F.gelu(x)).double()
    program = assert_equivalent(model, data_parallel(2), (X,))
    fixes = {f.fix for f in program.fallbacks()}
    assert fixes == {'fxshard.register_rule("aten::linear", "... b+, a b+ -> ... a", linear="0;1")'}
    assert_equivalent(model, tensor_parallel(2), (X,))
    run(fixes.pop())
    assert not assert_equivalent(model, data_parallel(2), (X,)).fallbacks()
    program = assert_equivalent(model, tensor_parallel(2), (X,))
    assert [c.kind for c in program.collectives()] == ["all_reduce", "all_reduce"]


def test_what_cannot_be_split_gets_no_rule_that_splits_it(library: Any) -> None:
    model = Between(lambda x, w: ops().mix(x)).double()
    (fallback,) = assert_equivalent(model, data_parallel(2), (X,)).fallbacks()
    assert fallback.fix == 'fxshard.register_rule("fallbacks::mix", "a b c -> a b c") with a factor a dim'


def test_a_fallback_says_all_that_is_known(library: Any) -> None:
    model = nn.Sequential(Between(lambda x, w: ops().scale(x, w)), Between(lambda x, w: x)).double()
    program = fxshard.parallelize(model, data_parallel(2), (X,))
    (fallback,) = program.fallbacks()
    assert fallback.operator == "fallbacks.scale"
    assert fallback.module == "0"
    assert re.fullmatch(r"test_fallbacks\.py:\d+ in forward", fallback.source)
    assert str(fallback) == (
        f"fallbacks.scale has no rule: 6,144 bytes are gathered for it in 0, {fallback.source}, and every rank "
        'computes it whole; to split it, fxshard.register_rule("fallbacks::scale", "... a, a -> ... a", linear="0;1")'
    )
    assert str(fallback) in program.explain()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x * x * x).flip(0).flip(0)  # which is not seen to be pointwise

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


@pytest.mark.parametrize("plan", [data_parallel(2), tensor_parallel(2), sequence_parallel(2)], ids=["dp", "tp", "sp"])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_autograd_function(layers: int, plan: Plan) -> None:
    """Its operator has no rule, so no pair goes through it: weights stay whole, or their products are gathered."""
    blocks = [Between(lambda x, w: Cube.apply(x)) for _ in range(layers)]
    model = (blocks[0] if layers == 1 else nn.Sequential(*blocks)).double()
    program = assert_equivalent(model, plan, (X,))
    first, *others = program.fallbacks()
    assert len(others) == layers - 1
    assert first.operator.endswith("_Cube")
    assert '"... -> ..."' in first.fix
    if "tp" in program.mesh.names and layers == 1:
        assert not program.plan.params
        assert first.num_bytes == 0
        assert "tensor parallelism ends at it" in str(first)
    else:
        assert first.num_bytes == 4 * 6 * 32 * 8
    run(first.fix)
    taught = assert_equivalent(model, plan, (X,))
    assert not taught.fallbacks()
    if "tp" in taught.mesh.names:
        for prefix in ("",) if layers == 1 else ("0.", "1."):
            assert taught.placements_of(f"{prefix}up.weight") == (Shard(0),)
            assert taught.placements_of(f"{prefix}down.weight") == (Shard(1),)
