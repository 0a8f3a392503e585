"""Autocast written out: the graph computes, bit for bit, what the model computes under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxshard
from fxshard.capture.capture import capture, signature_key
from fxshard.normal.normalize import normalize
from fxshard.passes.optimize import optimize
from fxshard.runtime.autocast import ambient, under_autocast, using
from tests.helpers import weighted_loss

LOW = torch.bfloat16


class Net(nn.Module):
    """Some layers for a function that a test writes."""

    def __init__(self, fn: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fn = [fn]
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
        self.conv, self.emb = nn.Conv1d(4, 4, 3, padding=1), nn.Embedding(5, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.fn[0](self, x)


def low(enabled: bool = True, dtype: torch.dtype = LOW) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def compute(fn: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    def inside(m: Net, x: Tensor) -> Any:
        with low():
            return fn(m, x)

    return inside


def nested(m: Net, x: Tensor) -> Any:
    with low():
        y = m.a(x)
        with low(enabled=False):
            z = m.b(y.float())
            with low(dtype=torch.float16):
                w = torch.matmul(z, z.transpose(1, 2))
        return y, z, w, m.b(z)


def island(m: Net, x: Tensor) -> Any:
    with low(enabled=False):
        return m.a(x.float()).softmax(-1)


def two_regions(m: Net, x: Tensor) -> Any:
    with low():
        y = m.b(x)
    with low():
        z = m.b(x)
    return y.float() * m.b(x), z


def without_gradient(m: Net, x: Tensor) -> Any:
    with low():
        with torch.no_grad():
            table = m.b(x)
        return m.a(x) * table


def checkpointed(m: Net, x: Tensor) -> Any:
    with low():
        return checkpoint(lambda y: m.b(F.gelu(m.a(y))), x, use_reentrant=False)


def in_place(m: Net, x: Tensor) -> Any:
    y = x.clone()
    y += m.b(x)
    y[:, 0] = m.b(y)[:, 1].float()
    return y


EXACT: dict[str, Callable[[Any, Tensor], Any]] = {
    "linear": compute(lambda m, x: m.a(x)),
    "a weight that two calls read": compute(lambda m, x: m.b(m.b(x))),
    "an activation that three calls read": compute(lambda m, x: m.a(h := x * 2) + m.b(h) + m.a(h)),
    "matmul": compute(lambda m, x: torch.matmul(x, x.transpose(1, 2))),
    "einsum": compute(lambda m, x: torch.einsum("bic,bjc->bij", x, x)),
    "baddbmm": compute(lambda m, x: torch.baddbmm(x[..., :4], x, x.transpose(1, 2))),
    "softmax": compute(lambda m, x: torch.softmax(m.b(x), -1)),
    "layer_norm": compute(lambda m, x: (m.norm(x), m.norm(x.to(LOW)))),
    "attention": compute(lambda m, x: F.scaled_dot_product_attention(x[None], x[None].to(LOW), x[None])),
    "cat of several dtypes": compute(lambda m, x: torch.cat([x, m.b(x)], -1)),
    "stack of several dtypes": compute(lambda m, x: torch.stack([m.b(x), x])),
    "conv": compute(lambda m, x: m.conv(x)),
    "embedding": compute(lambda m, x: m.b(m.emb((x[..., 0].abs() * 2).long() % 5))),
    "pointwise": compute(lambda m, x: (m.b(x).exp() + x.pow(2), m.b(x).sum(-1), (m.b(x) ** 2).mean(-1), x.rsqrt())),
    "loss": compute(lambda m, x: F.cross_entropy(m.b(x)[0], torch.tensor([1, 2, 3, 4]))),
    "mse_loss": compute(lambda m, x: F.mse_loss(m.b(x), x)),
    "doubles": compute(lambda m, x: torch.matmul(x.double(), x.double().mT).float()),
    "nested": nested,
    "an island": island,
    "two regions": two_regions,
    "without gradient": without_gradient,
    "checkpointed": checkpointed,
    "in place": compute(in_place),
    "cumsum": compute(lambda m, x: m.b(x).cumsum(-1)),
    "cdist": compute(lambda m, x: torch.cdist(m.b(x), m.b(x))),
    "interpolate": compute(lambda m, x: F.interpolate(m.b(x), scale_factor=2)),
    "pool": compute(lambda m, x: F.avg_pool1d(m.b(x), 2)),
    "a recurrent layer": compute(lambda m, x: m.rnn(m.b(x))[0]),
    "norm": compute(lambda m, x: torch.linalg.vector_norm(m.b(x), dim=-1)),
}


def leaves(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def results(model: nn.Module, call: Callable[[Tensor], Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of a call, and the gradients of all weights and of the input."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = leaves(call(x))
    weighted_loss([o for o in out if o.requires_grad]).backward()
    return out, [p.grad for p in model.parameters()] + [x.grad]


def assert_equal(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)))


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", EXACT)
def test_region_is_inlined_exactly(name: str) -> None:
    model = Net(EXACT[name])
    want = results(model, model)
    gm = normalize(capture(model, (torch.randn(2, 4, 8, requires_grad=True),)).root)
    targets = [node.target for node in gm.graph.nodes]
    assert torch.ops.higher_order.wrap_with_autocast not in targets
    assert under_autocast not in targets
    gm = gm.over(optimize(gm.graph, gm))
    got = results(model, gm)
    assert_equal(got[0], want[0])
    assert_equal(got[1], want[1])


AROUND = [name for name in EXACT if name not in ("nested", "an island", "two regions")]


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", AROUND)
def test_capture_under_autocast_runs_without(name: str) -> None:
    def plainly(m: Net, x: Tensor) -> Any:
        return EXACT[name](m, x)

    model = Net(plainly)

    def under(x: Tensor) -> Any:
        with low():
            return model(x)

    want = results(model, under)
    with low():
        captured = capture(model, (torch.randn(2, 4, 8, requires_grad=True),))
    assert captured.autocast == (("cpu", LOW),)
    gm = normalize(captured.root, captured.autocast)
    gm = gm.over(optimize(gm.graph, gm))
    got = results(model, gm)
    assert_equal(got[0], want[0])
    assert_equal(got[1], want[1])


@pytest.mark.filterwarnings("ignore")  # of torch's own
def test_what_cannot_be_written_out_stays_under_autocast(capfd: pytest.CaptureFixture[str]) -> None:
    def branch(m: Net, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: m.b(y).float(), lambda y: m.b(y).float() * 2, (x,))  # type: ignore[no-any-return]

    model, x = Net(compute(branch)), torch.randn(2, 4, 8)
    captured = capture(model, (x,))
    gm = normalize(captured.root)
    assert [node.args[1] for node in gm.graph.nodes if node.target is under_autocast] == ["higher_order.cond"]
    want = captured.root(x)[0]
    assert torch.equal(gm(x)[0], want)
    assert not torch.equal(want, m_in_float32(model, x)), "it computed in bfloat16"
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (x,))
    assert [fallback.operator for fallback in program.fallbacks()] == ["higher_order.cond"]
    assert torch.equal(fxshard.simulate(program, x).outputs[1], want)
    assert not capfd.readouterr().err


def m_in_float32(model: Net, x: Tensor) -> Tensor:
    y: Tensor = model.b(x)
    return y if x.sum() > 0 else y * 2


def test_state() -> None:
    assert ambient() == ()
    with low():
        assert ambient() == (("cpu", LOW),)
        with using(()):
            assert ambient() == ()
            with using((("cpu", torch.float16),)):
                assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float16
        assert ambient() == (("cpu", LOW),)
    assert ambient() == ()


# --- autocast around the call ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm(x)
        q, k, v = (f(h).view(b, t, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return self.down(F.gelu(self.up(x)))


X = torch.linspace(-2, 2, 2 * 8 * 16).sin().reshape(2, 8, 16)
PLANS = {
    "tp": fxshard.tensor_parallel(2),
    "sp": fxshard.sequence_parallel(2),
    "dp": fxshard.data_parallel(2),
    "dp_tp": fxshard.data_parallel(2) | fxshard.tensor_parallel(2),
}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    with low():
        out = model(X)
    weighted_loss(out.float()).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
def test_autocast_around_the_call(plan: str) -> None:
    model = Block()
    program = fxshard.parallelize(model, PLANS[plan], (X,))
    plain = fxshard.simulate(program, X).outputs[0]
    with low():
        run = fxshard.simulate(program, X)
    assert not program.fallbacks()
    run.backward(lambda out: weighted_loss(out.float()))
    want, grads = step(model)
    exact = weighted_step(model)
    assert run.outputs[0].dtype == want.dtype == LOW
    torch.testing.assert_close(run.outputs[0], want, rtol=0.02, atol=0.02)
    for name, grad in run.full_grads().items():
        assert grad.dtype == grads[name].dtype == torch.float32
        own = (grads[name] - exact[name]).norm()
        assert (grad - exact[name]).norm() <= 1.7 * own + 1e-3, name
    again = fxshard.simulate(program, X).outputs[0]
    assert again.dtype == torch.float32
    assert torch.equal(again, plain), "a capture made under autocast serves calls under it only"


def weighted_step(model: nn.Module) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    weighted_loss(model(X.double())).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def test_captured_under_autocast_from_the_start() -> None:
    model = Block()
    with low():
        program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (X,))
    assert fxshard.simulate(program, X).outputs[0].dtype == torch.float32
    torch.testing.assert_close(fxshard.simulate(program, X).outputs[0], model(X))
    with low():
        assert fxshard.simulate(program, X).outputs[0].dtype == LOW


def test_autocast_is_part_of_the_signature() -> None:
    model = Block()
    keys = {signature_key(model, (X,), {})}
    for dtype in (LOW, torch.float16):
        with low(dtype=dtype):
            keys.add(signature_key(model, (X,), {}))
    with low(enabled=False):
        keys.add(signature_key(model, (X,), {}))
    assert len(keys) == 3


def test_gradients_of_an_activation_that_is_cast_often_are_summed_once() -> None:
    program = fxshard.parallelize(Block(), fxshard.tensor_parallel(2), (X,))
    backward = [c.value for c in program.collectives() if c.phase == "backward"]
    with low():
        fxshard.simulate(program, X)
    assert backward == ["f32[2, 8, 16]"] * 2
    low_precision = [c.value for c in program.collectives(capture=1) if c.phase == "backward"]
    assert low_precision == ["bf16[2, 8, 16]", "f32[2, 8, 16]"]


def test_gradients_of_weights_are_summed_in_the_weights_precision() -> None:
    program = fxshard.parallelize(Block(), fxshard.data_parallel(2), (X,))
    with low():
        fxshard.simulate(program, X)
    assert all(c.value.startswith("f32") for c in program.collectives() if c.phase == "backward")


@pytest.mark.parametrize("plan", PLANS)
def test_verify_under_autocast(plan: str) -> None:
    program = fxshard.parallelize(Block(), PLANS[plan], (X,))
    with low():
        assert fxshard.verify(program, X).ok
    assert fxshard.verify(program, X).ok
