"""Random modules, meshes and plans for property tests.

A module is a list of steps; each reads earlier values and gives one. A step is built while it is drawn and runs at
once, so shapes are known without a second description of every operator. What is simple comes first in every choice:
that is where shrinking leads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxshard import Plan, Replicate, Shard, context_parallel, data_parallel, sequence_parallel, tensor_parallel, zero
from fxshard.placement import BlockShard, chunk_shares, cut_of

Draw = Callable[[st.SearchStrategy[Any]], Any]
Compute = Callable[..., torch.Tensor]
MAX_ELEMENTS = 4096


class Step(nn.Module):
    """One step: named, so that a failing example can be read."""

    def __init__(self, text: str, reads: tuple[int, ...], compute: Compute, **tensors: torch.Tensor | None) -> None:
        super().__init__()
        self.text, self.reads, self.compute = text, reads, compute
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.compute(self, *values)


class RandomModel(nn.Module):
    """Runs its steps in order, over the values so far; the first ones are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.returned: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x, ids]
        for step in self.steps:
            values.append(step(*(values[i] for i in step.reads)))
        return tuple(values[i] for i in self.returned)

    def __repr__(self) -> str:
        lines = [f"    v{i + 2} = {s.text}({', '.join(f'v{r}' for r in s.reads)})" for i, s in enumerate(self.steps)]
        return "\n".join(["RandomModel (v0 = x, v1 = ids):", *lines, f"    return {self.returned}"])


@dataclass
class Builder:
    """A model being drawn, and the values that its steps gave."""

    draw: Draw
    model: RandomModel
    values: list[torch.Tensor]
    weights: list[nn.Parameter] = field(default_factory=list)

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def maybe(self) -> bool:
        return bool(self.draw(st.booleans()))

    def parameter(self, *shape: int) -> nn.Parameter:
        made = nn.Parameter(torch.randn(*shape, dtype=torch.float64) * (0.5 if len(shape) < 2 else shape[-1] ** -0.5))
        self.weights.append(made)
        return made

    def pick(self, fits: Callable[[torch.Tensor], bool] = lambda v: True) -> int | None:
        """A floating-point value that fits, often the latest."""
        found = [i for i, v in enumerate(self.values) if v.is_floating_point() and fits(v)][::-1]
        return int(self.choose([found[0]] * (len(found) - 1) + found)) if found else None

    def add(self, text: str, reads: tuple[int, ...], compute: Compute, **tensors: Any) -> None:
        """Appends a step, unless its result is too large."""
        step = Step(text, reads, compute, **tensors)
        with torch.no_grad():
            value = step(*(self.values[i] for i in reads))
        if 0 < value.numel() <= MAX_ELEMENTS and value.dim() <= 5:
            self.model.steps.append(step)
            self.values.append(value)


# --- steps ----------------------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "neg": torch.neg,
    "double": lambda x: x * 2,
    "plus_one": lambda x: x + 1,
    "one_minus": lambda x: 1 - x,
    "third": lambda x: x / 3,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": lambda x: x.pow(2),
    "exp": lambda x: torch.exp(torch.tanh(x)),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "relu_by_where": lambda x: torch.where(x > 0, x, 0.1),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.25),
    "gate_without_gradient": lambda x: x * x.detach().sigmoid(),
    "in_place": lambda x: x.clone().mul_(2).add_(1),
    "clone": lambda x: x.clone() + x,
    "no_grad_scale": lambda x: x * _frozen_mean(x),
}


def _frozen_mean(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.abs().mean() + 1


def unary(b: Builder) -> None:
    at, name = b.pick(), b.choose(UNARY)
    b.add(name, (at,), lambda self, x: UNARY[name](x))


SIZES = (4, 8, 12, 2, 6, 3, 24)


def linear(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    out, inner = b.choose(SIZES), b.values[at].shape[-1]
    bias = b.parameter(out) if b.maybe() else None
    b.add(
        f"linear[{inner}->{out}{', bias' if bias is not None else ''}]",
        (at,),
        lambda self, x: F.linear(x, self.weight, self.bias),
        weight=b.parameter(out, inner),
        bias=bias,
    )


def conv1d_of_gpt2(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() >= 2)
    if at is None:
        return
    out, inner = b.choose(SIZES), b.values[at].shape[-1]

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], out)

    if b.values[at].is_contiguous():
        b.add(f"addmm[{inner}->{out}]", (at,), compute, weight=b.parameter(inner, out), bias=b.parameter(out))


def tied_linear(b: Builder) -> None:
    """Uses an earlier weight once more, as it is or transposed."""
    at = b.pick(lambda v: v.dim() > 0 and any(w.dim() == 2 and v.shape[-1] in w.shape for w in b.weights))
    if at is None:
        return
    size = b.values[at].shape[-1]
    weight = b.choose([w for w in b.weights if w.dim() == 2 and size in w.shape])
    turned = weight.shape[1] != size
    text = f"tied_linear[{list(weight.shape)}{', transposed' if turned else ''}]"
    b.add(text, (at,), lambda self, x: F.linear(x, self.weight.t() if turned else self.weight), weight=weight)


def mlp(b: Builder) -> None:
    """up, gate, down: gate and up in one weight, in two, or no gate."""
    at = b.pick(lambda v: v.dim() >= 2)
    if at is None:
        return
    size, inner, kind = b.values[at].shape[-1], b.choose((8, 12, 24)), b.choose(("plain", "gated", "fused"))
    bias = b.maybe()

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = F.linear(x, self.up, self.up_bias)
        if kind == "fused":
            gate, up = up.chunk(2, -1)
            up = F.silu(gate) * up
        elif kind == "gated":
            up = F.silu(F.linear(x, self.gate)) * up
        else:
            up = F.gelu(up)
        return F.linear(up, self.down, self.down_bias) + x

    wide = 2 * inner if kind == "fused" else inner
    b.add(
        f"mlp[{size}->{inner}, {kind}{', bias' if bias else ''}]",
        (at,),
        compute,
        up=b.parameter(wide, size),
        up_bias=b.parameter(wide) if bias else None,
        gate=b.parameter(inner, size) if kind == "gated" else None,
        down=b.parameter(size, inner),
        down_bias=b.parameter(size) if bias else None,
    )


def norm(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    size, kind = (
        b.values[at].shape[-1],
        b.choose(("layer_norm", "rms_norm", "rms_by_hand", "layer_norm without weight")),
    )

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        if kind == "rms_norm":
            return F.rms_norm(x, (size,), self.weight, 1e-5)
        if kind == "rms_by_hand":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return F.layer_norm(x, (size,), self.weight, self.bias, 1e-5)

    has_weight = kind != "layer_norm without weight"
    b.add(
        kind, (at,), compute,
        weight=b.parameter(size) if has_weight else None, bias=b.parameter(size) if kind == "layer_norm" else None,
    )  # fmt: skip


def scale_or_shift(b: Builder) -> None:
    """A parameter of the trailing dims, or of some that broadcast, added or multiplied."""
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    shape = b.values[at].shape
    count = b.choose(range(1, len(shape) + 1))
    wanted = [n if b.maybe() else 1 for n in shape[-count:]]
    name = b.choose(("add", "mul", "add_first"))

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        if name == "mul":
            return x * self.weight
        return x + self.weight if name == "add" else self.weight + x

    b.add(f"{name} parameter{wanted}", (at,), compute, weight=b.parameter(*wanted))


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "div": lambda x, y: x / (1 + y * y),
    "add_scaled": lambda x, y: torch.add(x, y, alpha=2),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "where_by_mask": lambda x, y: torch.where((torch.arange(x.shape[-1] if x.dim() else 1) % 2).bool(), x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}


def binary(b: Builder) -> None:
    at = b.pick()
    other = b.pick(lambda v: _broadcasts(v.shape, b.values[at].shape))
    name = b.choose(BINARY)
    b.add(name, (at, other), lambda self, x, y: BINARY[name](x, y))


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def matmul(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() >= 2)
    if at is None:
        return
    x = b.values[at]
    other = b.pick(lambda v: v.dim() >= 2 and v.shape[-1] == x.shape[-1] and _broadcasts(v.shape[:-2], x.shape[:-2]))
    kind = b.choose(("x @ y.mT", "einsum", "x.mT @ y"))
    y = b.values[other]
    if kind == "einsum" and x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0]:
        equation = b.choose(("bid,bjd->bij", "bid,bjd->ij", "bid,bjd->bd", "bid,bjd->jbi"))
        b.add(f"einsum[{equation}]", (at, other), lambda self, x, y: torch.einsum(equation, x, y))
    elif kind == "x.mT @ y" and x.shape[-2] == y.shape[-2]:
        b.add(kind, (at, other), lambda self, x, y: x.mT @ y)
    else:
        b.add("x @ y.mT", (at, other), lambda self, x, y: x @ y.transpose(-1, -2))


def view(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    x = b.values[at]
    shape, ndim = list(x.shape), x.dim()
    kind = b.choose(("transpose", "flatten", "unflatten", "permute", "unsqueeze", "squeeze", "expand", "regroup"))
    i = b.choose(range(ndim))
    j = b.choose(range(ndim))
    if kind == "transpose":
        b.add(f"transpose[{i}, {j}]", (at,), lambda self, x: x.transpose(i, j))
    elif kind == "permute":
        order = b.draw(st.permutations(range(ndim)))
        b.add(f"permute{order}", (at,), lambda self, x: x.permute(order))
    elif kind == "flatten":
        low, high = min(i, j), max(i, j)
        b.add(f"flatten[{low}, {high}]", (at,), lambda self, x: x.flatten(low, high))
    elif kind == "unflatten":
        parts = [n for n in (2, 3, 4, 6) if shape[i] % n == 0]
        if parts:
            n = b.choose(parts)
            size = b.choose(((n, shape[i] // n), (shape[i] // n, n), (n, -1)))
            b.add(f"unflatten[{i}, {size}]", (at,), lambda self, x: x.unflatten(i, size))
    elif kind == "unsqueeze":
        b.add(f"unsqueeze[{i}]", (at,), lambda self, x: x.unsqueeze(i))
    elif kind == "squeeze":
        b.add("squeeze", (at,), lambda self, x: x.squeeze())
    elif kind == "expand":
        size = [n if n != 1 else 2 for n in shape]
        b.add(f"expand{size}", (at,), lambda self, x: x.expand(2, *size))
    else:
        total = x.numel()
        first = b.choose([n for n in (2, 3, 4, 6, 8, 12, 16) if total % n == 0] or [1])
        second = b.choose([n for n in (1, 2, 3, 4, 6, 8) if total // first % n == 0])
        size = (first, second, total // first // second)
        b.add(f"reshape{size}", (at,), lambda self, x: x.reshape(size))


def cut(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0 and max(v.shape) > 1)
    if at is None:
        return
    x = b.values[at]
    dim = b.choose([d for d, n in enumerate(x.shape) if n > 1])
    size = x.shape[dim]
    kind = b.choose(
        ("chunk", "split", "slice", "select", "step", "product", "negative", "write", "roll", "flip", "pad")
    )
    start = b.choose(range(size))
    if kind == "chunk":
        parts = b.choose([n for n in (2, 3, 4) if size % n == 0] or [2])
        pick = b.choose(range(len(x.chunk(parts, dim))))
        b.add(f"chunk[{parts}, dim {dim}][{pick}]", (at,), lambda self, x: x.chunk(parts, dim)[pick])
    elif kind == "split":
        first = b.choose(range(1, size))
        b.add(f"split[{first}, dim {dim}]", (at,), lambda self, x: x.split([first, size - first], dim)[1] * 2)
    elif kind == "product":
        parts = b.choose([n for n in (2, 3) if size % n == 0] or [1])

        def product(self: Any, x: torch.Tensor) -> torch.Tensor:
            pieces = x.chunk(parts, dim)
            return torch.cat([pieces[-1].tanh() * pieces[0], *pieces[:1]], dim)

        b.add(f"cut in {parts} and joined[dim {dim}]", (at,), product)
    elif kind == "select":
        b.add(f"select[dim {dim}, {start}]", (at,), lambda self, x: x.select(dim, start))
    elif kind == "slice":
        end = b.choose(range(start + 1, size + 1))
        b.add(f"narrow[dim {dim}, {start}:{end}]", (at,), lambda self, x: x.narrow(dim, start, end - start))
    elif kind == "step":
        b.add(f"every second[dim {dim}]", (at,), lambda self, x: x.transpose(0, dim)[start % 2 :: 2].transpose(0, dim))
    elif kind == "negative":
        b.add(f"last two[dim {dim}]", (at,), lambda self, x: x.transpose(0, dim)[-2:].transpose(0, dim))
    elif kind == "write":

        def write(self: Any, x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            out.select(dim, start).mul_(3)
            return out

        b.add(f"write[dim {dim}, {start}]", (at,), write)
    elif kind == "roll":
        b.add(f"roll[dim {dim}, {start}]", (at,), lambda self, x: x.roll(start, dim))
    elif kind == "flip":
        b.add(f"flip[dim {dim}]", (at,), lambda self, x: x.flip(dim) * 2)
    else:
        b.add("pad", (at,), lambda self, x: F.pad(x, (1, 1)))


REDUCTIONS: dict[str, Callable[[torch.Tensor, Any, bool], torch.Tensor]] = {
    "sum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "mean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "amax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "logsumexp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
    "var": lambda x, dims, keep: x.var(dims, correction=0, keepdim=keep),
    "norm": lambda x, dims, keep: torch.linalg.vector_norm(x + 2, dim=dims, keepdim=keep),
    "any": lambda x, dims, keep: (x > 1).to(x.dtype).sum(dims, keepdim=keep) * x.sum(dims, keepdim=keep),
}


def reduction(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    name, keep = b.choose(REDUCTIONS), b.maybe()
    ndim = b.values[at].dim()
    dims = sorted(b.draw(st.sets(st.integers(0, ndim - 1), min_size=1)))
    negative = [d - ndim for d in dims] if b.maybe() else dims
    if b.choose((True, True, True, False)):
        b.add(f"{name}[{negative}, {keep}]", (at,), lambda self, x: REDUCTIONS[name](x, negative, keep))
    else:
        whole = b.choose(("sum", "mean"))
        b.add(f"{whole} of all", (at,), lambda self, x: x.sum() if whole == "sum" else x.mean())


def along(b: Builder) -> None:
    """Operators that run along one dim."""
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    dim = b.choose(range(b.values[at].dim()))
    name = b.choose(("softmax", "log_softmax", "cumsum", "topk", "sort", "gather", "index_select", "tril", "glu"))
    size = b.values[at].shape[dim]

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        if name in ("softmax", "log_softmax", "cumsum"):
            return getattr(torch, name)(x, dim)
        if name == "topk":
            return x.topk(max(1, size // 2), dim).values
        if name == "sort":
            return x.sort(dim).values
        if name == "gather":
            return x.gather(dim, x.argsort(dim).flip(dim))
        if name == "index_select":
            return x.index_select(dim, self.picked)
        if name == "glu" and size % 2 == 0:
            return F.glu(x, dim)
        return x.tril() if x.dim() >= 2 else x.cumsum(0)

    b.add(f"{name}[dim {dim}]", (at,), compute, picked=torch.tensor([0, size - 1, size // 2]))


def join(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() > 0)
    if at is None:
        return
    shape = b.values[at].shape
    dim = b.choose(range(len(shape)))
    stacks = b.maybe()
    other = b.pick(lambda v: v.shape == shape or (not stacks and _joins(v.shape, shape, dim)))
    join = torch.stack if stacks else torch.cat
    b.add(f"{join.__name__}[dim {dim}]", (at, other), lambda self, x, y: join([x, y], dim))


def _joins(a: torch.Size, b: torch.Size, dim: int) -> bool:
    return len(a) == len(b) and all(m == n for d, (m, n) in enumerate(zip(a, b, strict=True)) if d != dim)


def embedding(b: Builder) -> None:
    rows, size = b.choose((16, 24)), b.choose(SIZES)
    index = b.choose((None, 0, 5))
    b.add(
        f"embedding[{rows}, {size}, padding {index}]",
        (1,),
        lambda self, ids: F.embedding(ids, self.weight, index),
        weight=b.parameter(rows, size),
    )


def positions(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() >= 2)
    if at is None:
        return
    length, size = b.values[at].shape[-2:]
    b.add(
        f"positions[{length}, {size}]",
        (at,),
        lambda self, x: x + F.embedding(torch.arange(x.shape[-2], device=x.device), self.weight),
        weight=b.parameter(length, size),
    )


def attention(b: Builder) -> None:
    at = b.pick(lambda v: v.dim() == 3 and v.shape[-1] % 2 == 0)
    if at is None:
        return
    size = b.values[at].shape[-1]
    key_heads = b.choose((2, 4, 1, 3))
    heads = key_heads * b.choose((1, 2))
    width = b.choose((2, 4))
    kind = b.choose(("sdpa", "by hand"))
    mask = b.choose(("none", "causal", "float", "bool", "padding"))
    packed = b.choose(("apart", "chunk", "view", "interleaved")) if heads == key_heads else "apart"
    share = b.choose(("repeat", "expand", "flag")) if heads != key_heads else "none"
    bias = b.maybe()

    def compute(self: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        if packed == "apart":
            q, k, v = F.linear(x, self.q, self.q_bias), F.linear(x, self.k), F.linear(x, self.v)
        else:
            qkv = F.linear(x, self.q, self.q_bias)
            if packed == "chunk":
                q, k, v = qkv.chunk(3, -1)
            elif packed == "view":
                q, k, v = (t.flatten(2) for t in qkv.view(n, s, 3, heads, width).unbind(2))
            else:
                q, k, v = (t.flatten(2) for t in qkv.view(n, s, heads, 3, width).unbind(3))
        q = q.view(n, s, heads, width).transpose(1, 2)
        k, v = (t.view(n, s, key_heads, width).transpose(1, 2) for t in (k, v))
        if share == "repeat":
            k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
        elif share == "expand":
            k, v = (
                t[:, :, None].expand(n, key_heads, heads // key_heads, s, width).reshape(n, heads, s, width)
                for t in (k, v)
            )
        added = _mask(mask, ids, s, x)
        if kind == "sdpa" or share == "flag":
            causal = mask == "causal"
            out = F.scaled_dot_product_attention(
                q, k, v, None if causal else added, is_causal=causal, enable_gqa=share == "flag"
            )
        else:
            scores = q @ k.transpose(-1, -2) / width**0.5
            if added is not None:
                low = torch.zeros_like(added, dtype=x.dtype).masked_fill(~added, -1e4) if mask != "float" else added
                scores = scores + low
            out = scores.softmax(-1) @ v
        return F.linear(out.transpose(1, 2).reshape(n, s, heads * width), self.o) + x

    inner = key_heads * width
    fused = 3 * inner if packed != "apart" else heads * width
    b.add(
        f"attention[{heads} on {key_heads} heads of {width}, {kind}, {mask}, {packed}, {share}, bias {bias}]",
        (at, 1),
        compute,
        q=b.parameter(fused, size),
        q_bias=b.parameter(fused) if bias else None,
        k=b.parameter(inner, size) if packed == "apart" else None,
        v=b.parameter(inner, size) if packed == "apart" else None,
        o=b.parameter(size, heads * width),
    )


def _mask(kind: str, ids: torch.Tensor, length: int, x: torch.Tensor) -> torch.Tensor | None:
    if kind == "none":
        return None
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    if kind in ("causal", "bool"):
        return (column <= row)[None, None]
    if kind == "float":
        return torch.zeros(length, length, dtype=x.dtype).masked_fill(column > row, float("-inf"))[None, None]
    if ids.shape[0] != x.shape[0] or ids.shape[1] != length:
        return None
    seen = (ids != 3).logical_or(column == 0)
    return seen[:, None, None, :] & (column <= row)[None, None]


def loss(b: Builder) -> None:
    """A mean, a sum or none over targets, some of them ignored."""
    ids = b.values[1]
    at = b.pick(lambda v: v.dim() == 3 and v.shape[:2] == ids.shape and v.shape[-1] > 1)
    if at is None:
        return
    classes, how = b.values[at].shape[-1], b.choose(("mean", "sum", "none"))
    smoothing = b.choose((0.0, 0.1))

    def compute(self: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        target = (ids % classes).masked_fill(ids == 3, -100).flatten()
        return F.cross_entropy(x.flatten(0, 1), target, reduction=how, label_smoothing=smoothing)

    b.add(f"cross_entropy[{how}, smoothing {smoothing}]", (at, 1), compute)


def squared_error(b: Builder) -> None:
    at = b.pick()
    other = b.pick(lambda v: v.shape == b.values[at].shape)
    how = b.choose(("mean", "sum", "none"))
    b.add(f"mse[{how}]", (at, other), lambda self, x, y: F.mse_loss(x, y + 1, reduction=how))


def dropout(b: Builder) -> None:
    at = b.pick()
    b.add("dropout", (at,), lambda self, x: F.dropout(x, 0.4, self.training))


STEPS = (
    linear, unary, norm, binary, view, reduction, mlp, attention, cut, join, along, matmul, embedding, positions,
    scale_or_shift, tied_linear, conv1d_of_gpt2, loss, squared_error, dropout, linear, mlp, attention, view,
)  # fmt: skip


@dataclass
class Example:
    """A model in training mode, its inputs, and a plan for it."""

    model: RandomModel
    x: torch.Tensor
    ids: torch.Tensor
    plan: Plan
    asked: str
    output_splits: list[dict[str, Shard]]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        wants = f"x {list(self.x.shape)}{' with gradient' if self.x.requires_grad else ''}, ids {list(self.ids.shape)}"
        return f"\n{self.model!r}\n    {wants}\n{self.asked}{self.plan}\n"


MESHES = (
    {"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}, {"x": 3}, {"a": 2, "b": 3}, {"a": 3, "b": 2}, {"tp": 2, "one": 1},
    {"a": 2, "b": 2, "c": 2}, {"x": 5}, {"a": 4, "b": 2}, {"x": 8},
)  # fmt: skip


@st.composite
def examples(draw: Draw, max_steps: int = 8, plans: int = 2) -> list[Example]:
    """Draws a model, its inputs, and several plans."""
    torch.manual_seed(0)
    batch, length, size = (
        draw(st.sampled_from((4, 6, 12, 2, 5))),
        draw(st.sampled_from((4, 6, 8))),
        draw(st.sampled_from(SIZES)),
    )
    x = torch.randn(batch, length, size, dtype=torch.float64, requires_grad=draw(st.booleans()))
    ids = torch.randint(0, 16, (batch, length))
    builder = Builder(draw, RandomModel(), [x.detach(), ids])
    for _ in range(draw(st.integers(1, max_steps))):
        draw(st.sampled_from(STEPS))(builder)
    if not builder.model.steps:
        unary(builder)
    read = {i for step in builder.model.steps for i in step.reads}
    unread = [i for i in range(2, len(builder.values)) if i not in read]  # all of them: so every step matters
    inner = [builder.pick() or 0] if builder.maybe() else []
    builder.model.returned = tuple(dict.fromkeys([*unread, *(i for i in inner if i > 1)]))
    outputs = [builder.values[i] for i in builder.model.returned]
    found = []
    for _ in range(plans):
        mesh = draw(st.sampled_from(MESHES))
        found.append(Example(builder.model, x, ids, *_plan(builder, mesh, x, ids, outputs)))
    return found


def _plan(
    b: Builder, mesh: dict[str, int], x: torch.Tensor, ids: torch.Tensor, outputs: list[torch.Tensor]
) -> tuple[Plan, str, list[dict[str, Shard]]]:
    axes = list(mesh)
    whole: list[dict[str, Shard]] = [{} for _ in outputs]
    kind = b.choose(("entries", "preset", "both"))
    presets: list[str] = []
    plan = Plan(mesh)
    if kind != "entries":
        for axis in axes:
            preset = b.choose((tensor_parallel, data_parallel, sequence_parallel, zero, context_parallel))
            plan = plan | preset(mesh[axis], axis)
            presets.append(f"{preset.__name__}({mesh[axis]}, {axis!r})")
    if kind == "preset":
        return plan, " | ".join(presets) + ": ", whole
    params = {name: e for name, p in b.model.named_parameters() if (e := _entry(b, p.shape, mesh))}
    batch = b.choose((None, *axes))
    shared = {batch: Shard(0)} if batch and kind == "entries" else None
    inputs = {name: e for name, v in (("x", x), ("ids", ids)) if (e := shared or _entry(b, v.shape, mesh))}
    activations = {}
    for index, value in enumerate(b.values[2:]):
        if b.choose((False, False, False, True)) and (entry := _entry(b, value.shape, mesh, explicit=True)):
            activations[f"steps.{index}"] = entry
    splits = [_entry(b, v.shape, mesh) if b.choose((False, False, True)) else {} for v in outputs]
    named = {str(i): e for i, e in enumerate(splits) if e}
    ring = b.choose(((), tuple(axes)))
    entries = Plan(mesh, params=params, inputs=inputs, activations=activations, outputs=named, ring=ring)
    return plan | entries, " | ".join([*presets, ""]), splits


def _entry(b: Builder, shape: torch.Size, mesh: dict[str, int], explicit: bool = False) -> dict[str, Any]:
    """Any placement: several axes may cut one dim, the outer one first; this one unevenly, in blocks, or in any shares,
    the others if they divide what that leaves to each rank.
    """
    entry: dict[str, Any] = {}
    left = list(shape)
    cut: set[int] = set()
    for axis, size in mesh.items():
        dims = [d for d, n in enumerate(left) if n > 0 and (d not in cut or n % size == 0)]
        dim = b.choose((None, *dims))
        if dim is not None:
            entry[axis] = placement = Shard(dim) if dim in cut else _shard(b, dim, left[dim], size)
            blocks, shares, _ = cut_of(placement)
            shares = shares or chunk_shares(left[dim] // sum(blocks), size) or (1,) * size
            left[dim] = left[dim] // sum(shares) * math.gcd(*shares)  # what divides each rank's part
            cut.add(dim)
        elif explicit and b.maybe():
            entry[axis] = Replicate()
    return entry


def _shard(b: Builder, dim: int, length: int, size: int) -> Shard:
    """A cut of a dim of ``length`` over ``size`` ranks that no other axis cuts."""
    kind = b.choose(("plain", "plain", "plain", "blocks", "shares"))
    if kind == "blocks" and length % 2 == 0:
        return BlockShard(dim, (1, 1))
    if kind == "shares":
        borders = [0, *sorted(b.choose(range(length + 1)) for _ in range(size - 1)), length]
        return BlockShard(dim, shares=[end - start for start, end in itertools.pairwise(borders)])
    return Shard(dim)
