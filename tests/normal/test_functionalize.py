"""In-place operators become functional ones, and every alias sees what it saw in eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxshard.capture.capture import capture
from fxshard.capture.captured import Captured
from fxshard.errors import CaptureError
from fxshard.normal.functionalize import functionalize, is_mutating
from fxshard.normal.normalize import normalize

torch.set_num_threads(1)
Tensor = torch.Tensor


def mutating(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and is_mutating(n.target)]


def outcome(call: Callable[..., Any], owner: nn.Module, inputs: list[Tensor]) -> list[Tensor | None]:
    """Run once; return outputs, gradients of inputs and parameters, buffers, and the inputs afterwards."""
    torch.manual_seed(0)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    passed = [x * 1 for x in leaves]
    out = call(*passed)
    results = list(out) if isinstance(out, tuple | list) else [out]
    loss = sum((r * torch.arange(1.0, r.numel() + 1).view(r.shape)).sum() for r in results if r.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    state = [*owner.parameters()]
    return [*results, *(x.grad for x in (*leaves, *state)), *passed, *owner.buffers()]


def check(model: nn.Module, *inputs: Tensor, change: Callable[..., Any] = functionalize) -> fx.GraphModule:
    """Compare eager, captured, functionalized and normalized runs; return the functionalized graph."""
    eager = copy.deepcopy(model)
    expected = outcome(eager, eager, list(inputs))
    result = None
    for stage in (lambda gm: gm, change, normalize):
        own = copy.deepcopy(model)
        captured: Captured = capture(own, inputs)
        text = str(captured.root.graph)
        gm = stage(captured.root)
        gm.graph.lint()
        assert str(captured.root.graph) == text, "the input graph was changed"

        def call(*args: Tensor, c: Captured = captured, g: fx.GraphModule = gm) -> Any:
            return c.unflatten_outputs(g(*c.flatten_inputs(args, {})))

        for want, got in zip(expected, outcome(call, own, list(inputs)), strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want)
        if stage is change:
            result = gm
            assert set(mutating(gm)) <= {"aten.copy_.default"}
            check_values(gm)
    assert result is not None
    return result


def check_values(gm: fx.GraphModule) -> None:
    """Run the graph and compare shape and dtype of each node with its meta."""

    class Checker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert (result.shape, result.dtype) == (n.meta["val"].shape, n.meta["val"].dtype), n
            return result

    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    Checker(gm).run(*(torch.ones(v.shape, dtype=v.dtype) for v in values))


class Fn(nn.Module):
    """A module of one function, with a buffer and a parameter to mutate and to read."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.register_buffer("buf", torch.linspace(0, 1, 12).view(3, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Tensor) -> Any:
        return self.fn(self, *args)


def case(fn: Callable[..., Any]) -> Any:
    return pytest.param(fn, id=fn.__name__)


def arithmetic(m: Fn, x: Tensor) -> Tensor:
    y = x * m.weight
    y.add_(1).mul_(x)
    y += m.weight
    y.clamp_(min=0.1).pow_(2)
    return y.div_(3).sub_(x, alpha=2).relu_()


def slices(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    row, corner = y[1], y[:, 1:3]
    row.mul_(m.weight[0])
    corner[0].add_(row[1:3])
    y[..., ::2] = 7
    return y, row * 2, corner + 1


def permuted(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    t = y.t()
    t[1:3] *= m.weight.t()[:2]
    y.transpose(0, 1).unsqueeze(0).permute(2, 0, 1)[0, 0, 1:].neg_()
    y.movedim(0, 1).diagonal().exp_()
    return y, t


def reshaped(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    flat = y.view(-1)
    flat[3:9] = m.weight.reshape(12)[:6]
    y.reshape(2, 6)[0].mul_(2)
    y.t().reshape(12).mul_(100)  # a copy: y must not see it
    y.flatten().add_(flat)
    y.unflatten(1, (2, 2))[:, 1].squeeze().tanh_()
    return y, flat


def split(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x.detach() * 2  # eager refuses to write to parts that need a gradient
    a, b = y.chunk(2, dim=1)
    first, second, third = y.unbind(0)
    c, d = y.split([1, 3], dim=-1)
    a.add_(1)
    b.mul_(a)
    second.copy_(first)
    d.sub_(c)
    return y, a, b, third, c


def filled(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    z = torch.zeros_like(y)
    z[0].fill_(3)
    y.masked_fill_(y > 0, 0.5)
    z[1:].copy_(y[0])
    z.t()[0].zero_()
    z.index_put_((torch.tensor([0, 2]), torch.tensor([1, 3])), y[0, :2])
    y.scatter_(1, torch.tensor([[0], [1], [2]]), 9.0)
    z.index_add_(0, torch.tensor([0, 0]), y[:2])
    return y, z


def dtypes(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = (x * m.weight).half()
    y.add_(m.weight.double())
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask |= x > 0
    mask[0].logical_not_()
    z = x * 1
    z.ge_(0.2)
    n = torch.arange(4)
    n.copy_(x[0] * 10)
    return y.float(), mask.float(), z, n


def buffers(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    m.count.add_(1)
    before = m.buf * 1
    m.buf[1:].mul_(0.9).add_(x.detach()[1:])
    m.buf.t()[0] = 5
    return x * m.buf, before, m.buf.sum() + m.count


def swapped(m: Fn, x: Tensor) -> Tensor:
    saved = m.buf.clone()
    m.buf.copy_(x.detach())
    x.detach().copy_(saved)
    return m.buf + x.detach()


def mutated_input(m: Fn, x: Tensor) -> Tensor:
    x[0] += 1
    y = x + m.weight
    x.mul_(2)
    return x + y


def without_gradient(m: Fn, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.buf.mul_(0.5).add_(x * 2)
        table = x.cumsum(0)
        table[0] = 3
        m.count += 1
    return x * m.buf + table * m.weight


def renamed_shapes(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    view = y[0]
    y.unsqueeze_(0)
    y.add_(1)
    y.squeeze_(0).t_()
    y[1].mul_(3)
    return y, view


def random_draws(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    noise = torch.empty_like(y).normal_(0, 2)
    noise[0].uniform_(-1, 1)
    keep = torch.empty_like(y).bernoulli_(0.5)
    y.mul_(keep)
    torch.nn.functional.dropout(y, 0.3, True, inplace=True)
    return y + noise, keep


def inert_dropout(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    z = torch.nn.functional.dropout(y, 0.3, training=False)
    z.add_(1)
    return y * z, y


def identity_aliases(m: Fn, x: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    same, other = y.to(torch.float32), y.to(torch.float64)
    y.contiguous().add_(1)
    y.t().contiguous().add_(100)
    same.mul_(2)
    return y, same, other


def shared_slice_then_loop(m: Fn, x: Tensor) -> Tensor:
    out = torch.zeros(3, 4)
    for i in range(3):
        out[i] = out[i - 1] + x[i] * m.weight[i]
    return out


CASES = [
    case(fn) for fn in (arithmetic, slices, permuted, reshaped, split, filled, dtypes, buffers, swapped, mutated_input)
] + [
    case(fn)
    for fn in (without_gradient, renamed_shapes, random_draws, inert_dropout, identity_aliases, shared_slice_then_loop)
]


@pytest.mark.parametrize("fn", CASES)
def test_same_as_eager(fn: Callable[..., Any]) -> None:
    # Regions are inlined by normalize; functionalize by itself refuses one that writes to the outside.
    change = normalize if fn is without_gradient else functionalize
    check(Fn(fn), torch.linspace(-2, 3, 12).view(3, 4) ** 3 / 5, change=change)


def test_a_buffer_is_written_once_at_the_end() -> None:
    gm = check(Fn(buffers), torch.ones(3, 4))
    *_, first, second, output = gm.graph.nodes
    assert output.op == "output"
    assert mutating(gm) == ["aten.copy_.default"] * 2
    assert {first.args[0].target, second.args[0].target} == {"buf", "count"}


def test_a_graph_without_mutation_is_left_alone() -> None:
    gm = capture(nn.Linear(3, 2), (torch.ones(4, 3),)).root
    assert str(functionalize(gm).graph) == str(gm.graph)


def test_dynamic_sizes() -> None:
    def fn(m: Fn, x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1)[:3].add_(1)
        y[:, 0] = y[:, 1]
        z = torch.zeros(x.shape[0], 4)
        z[:, 1:] = y[0, 1:]
        return y.copy_(m.buf[0]) + z

    model = Fn(fn)
    shapes = {"args": ({0: torch.export.Dim("batch", min=2)},)}
    captured = capture(model, (torch.ones(3, 4),), dynamic_shapes=shapes)
    for change in (functionalize, normalize):
        gm = change(captured.root)
        assert not mutating(gm)
        x = torch.randn(5, 4)
        torch.testing.assert_close(gm(x)[0], model(x))


def test_the_gradient_does_not_know_of_a_write_that_is_hidden_from_it() -> None:
    def fn(m: Fn, x: Tensor) -> Tensor:
        y = x * m.weight
        with torch.no_grad():
            y.clamp_(0, 1)
        return y

    model, x = Fn(fn), torch.randn(3, 4)
    normal = normalize(capture(model, (x,)).root)
    (got,), want = normal(x), model(x)
    assert torch.equal(got, want)
    weight = model.weight
    assert torch.equal(*(torch.autograd.grad((y * x).sum(), weight)[0] for y in (got, want)))


def test_writing_through_what_cannot_be_undone_is_refused() -> None:
    def fn(m: Fn, x: Tensor) -> Tensor:
        y = x * 1
        y.unfold(0, 2, 2).add_(1)
        return y

    with pytest.raises(CaptureError, match="cannot be undone") as info:
        functionalize(capture(Fn(fn), (torch.ones(4),)).root)
    assert info.value.op == "aten.add_.Tensor"
    assert info.value.fix


def test_operator_without_counterpart_is_refused() -> None:
    with torch.library._scoped_library("fxshard_test", "FRAGMENT") as library:
        library.define("bump(Tensor(a!) x) -> ()")
        library.impl("bump", lambda x: None, "CompositeExplicitAutograd")
        library.impl("bump", lambda x: None, "Meta")

        def fn(m: Fn, x: Tensor) -> Tensor:
            y = x * 1
            torch.ops.fxshard_test.bump(y)
            return y

        gm = capture(Fn(fn), (torch.ones(4),)).root
        with pytest.raises(CaptureError, match=r"fxshard_test\.bump\.default changes its operand") as info:
            functionalize(gm)
    assert info.value.source.startswith("test_functionalize.py:")
