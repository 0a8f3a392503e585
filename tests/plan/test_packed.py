"""Weights of a few bits, packed in buffers of integers and unpacked at each call: split as weights are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Shard
from tests.helpers import assert_equivalent
from tests.presets import preset

GROUP, BITS, EACH = 16, 4, 8
RANGE = 2**31


def packed(*shape: int) -> torch.Tensor:
    return torch.randint(-RANGE, RANGE - 1, shape, dtype=torch.int32)


class AlongInputs(nn.Module):
    """Eight input features in one int32; rows find their group by an index, as act-order needs."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("qweight", packed(inner // EACH, outer))
        self.register_buffer("qzeros", packed(inner // GROUP, outer // EACH))
        self.register_buffer("scales", torch.rand(inner // GROUP, outer).double() / 64)
        self.register_buffer("g_idx", torch.arange(inner) // GROUP)
        self.register_buffer("shifts", torch.arange(0, 32, BITS, dtype=torch.int32))
        self.bias = nn.Parameter(torch.randn(outer).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.bitwise_right_shift(self.qzeros.unsqueeze(2).expand(-1, -1, EACH), self.shifts) & 15
        zeros = (zeros + 1).reshape(self.scales.shape)
        weight = torch.bitwise_right_shift(self.qweight.unsqueeze(1).expand(-1, EACH, -1), self.shifts[:, None]) & 15
        weight = weight.reshape(-1, weight.shape[2])
        return x @ (self.scales[self.g_idx] * (weight - zeros[self.g_idx])) + self.bias


class AlongOutputs(nn.Module):
    """Eight output features in one int32; a group's scale is repeated."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("qweight", packed(inner, outer // EACH))
        self.register_buffer("qzeros", packed(inner // GROUP, outer // EACH))
        self.register_buffer("scales", torch.rand(inner // GROUP, outer).double() / 64)
        self.register_buffer("shifts", torch.arange(0, 32, BITS, dtype=torch.int32))

    def unpacked(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, None] >> self.shifts).reshape(x.shape[0], -1) & 15

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros, scales = (t.repeat_interleave(GROUP, dim=0) for t in (self.unpacked(self.qzeros), self.scales))
        return x @ ((self.unpacked(self.qweight) - zeros) * scales)


class Bytes(nn.Module):
    """One int8 a weight, a scale an output feature; nn.Linear's layout."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 127, (outer, inner), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(outer, 1).double() / 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Layer(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, linear: type[nn.Module], size: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(size).double(), nn.LayerNorm(size).double()
        self.q, self.k, self.v, self.o = (linear(size, size) for _ in range(4))
        self.up, self.gate, self.down = linear(size, 2 * size), linear(size, 2 * size), linear(2 * size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        q, k, v = (each(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.second(x)
        out: torch.Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["tp2", "sp2", "tp4", "dp2_tp2"])
@pytest.mark.parametrize("linear", [AlongInputs, AlongOutputs, Bytes])
def test_packed_weights_are_columns_and_rows(linear: type[nn.Module], plan: str) -> None:
    torch.manual_seed(0)
    model, x = Layer(linear), torch.randn(2, 4, 64, dtype=torch.float64)
    program = assert_equivalent(model, preset(plan), (x,), tolerance=1e-8)
    assert program.coverage().share > 0.8, str(program.coverage())
    if plan == "tp2":
        kinds = [(c.kind, c.phase) for c in program.collectives()]
        assert kinds.count(("all_reduce", "forward")) == 2, "one a row, as with plain weights"
        assert not any(kind == "all_gather" for kind, _ in kinds)
        name = "weight" if linear is Bytes else "qweight"
        column, row = (program.plan.params[f"{each}.{name}"]["tp"] for each in ("up", "down"))
        assert (column, row) == ((Shard(0), Shard(1)) if linear is Bytes else (Shard(1), Shard(0)))


def test_what_is_packed_and_not_split_is_listed() -> None:
    """A cumulative sum keeps the rows whole, and the columns can be no other's."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("deltas", torch.randint(-3, 3, (64, 64), dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.deltas.cumsum(0).to(x.dtype)

    program = fxshard.parallelize(Odd(), preset("tp2"), (torch.randn(4, 64),))
    (whole,) = program.coverage().whole
    assert (whole.name, whole.shape, program.coverage().share) == ("deltas", (64, 64), 0.0)
    assert whole.reason
