"""A model that decides by a value what it computes: both ways are there; a run takes the one that one device takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxshard
from fxshard.errors import CaptureError
from fxshard.runtime.conditional import TAKEN
from tests.distributed import branches
from tests.distributed.branches import Dropping
from tests.distributed.launch import launch
from tests.helpers import slow_but_for
from tests.presets import preset

PLANS = ("tp2", "sp2", "dp2", "zero2", "dp2_tp2", "tp3")


def same(model: nn.Module, program: fxshard.ParallelModule, *args: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Compares outputs, gradients, which weights have none, and what is drawn afterwards; gives the output."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    want = model(*args)
    after = torch.rand(3)
    want.pow(2).sum().backward()
    program.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    run = fxshard.simulate(program, *args)
    assert torch.equal(torch.rand(3), after)
    for got in run.outputs:
        torch.testing.assert_close(got, want)
    run.backward(lambda out: out.pow(2).sum())
    grads = run.full_grads()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads), name
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad)
    out: torch.Tensor = want.detach()
    return out


@slow_but_for("plan", PLANS, "tp2", "dp2_tp2")
def test_dropped_layers(plan: str) -> None:
    torch.manual_seed(0)
    model, x = Dropping(0.4).double(), torch.randn(4, 6, 12, dtype=torch.float64)
    program = fxshard.parallelize(model, preset(plan), (x,))
    outputs = [same(model, program, x, seed=seed) for seed in range(8)]
    assert len({round(float(out.sum()), 9) for out in outputs}) > 4  # other layers are dropped each time
    model.eval()
    same(model, program.eval(), x)


@pytest.mark.parametrize("ask", ["tensor", "one element", "item", "not"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_what_a_draw_always_is_is_no_branch(ask: str, p: float) -> None:
    asks: dict[str, Callable[[], object]] = {
        "tensor": lambda: torch.rand([]) < p,
        "one element": lambda: torch.rand(1) < p,
        "item": lambda: torch.rand(1).item() < p,
        "not": lambda: not torch.rand([]) >= p,
    }

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.a(x) if asks[ask]() else F.dropout(self.b(x), 0.5, self.training)
            return out

    model, x = Sometimes().double(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset("tp2"), (x,))
    same(model, program, x)
    nodes = program.graph_after("optimize").nodes
    assert not any(node.target is TAKEN for node in nodes)


class ByValue(nn.Module):
    """Which way is taken depends on the input."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.up, self.down, self.other, self.both = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8), both

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mask.any():
            x = x + self.down(self.up(x).relu()) * mask
        elif self.both:
            x = self.other(x).tanh()
        if mask.all().item():
            x = x * 2
        return x


@slow_but_for("plan", PLANS, "tp2", "dp2_tp2")
@pytest.mark.parametrize("both", [False, True])
def test_the_way_that_an_input_decides(both: bool, plan: str) -> None:
    torch.manual_seed(0)
    model, x = ByValue(both).double(), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    some = torch.zeros(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset(plan), (x, some))
    for mask in (some, some + 1, some.index_fill(0, torch.tensor([1]), 1.0), some):
        same(model, program, x, mask)


def test_a_way_that_raises_unless_it_decides_otherwise_is_not_taken() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
            if marked.any():
                assert marked.sum() == 4, "four are to be marked"
                x = x * 2
            out: torch.Tensor = self.l(x)
            return out

    model, x, none = Checked().double(), torch.randn(4, 8, dtype=torch.float64), torch.zeros(4)
    program = fxshard.parallelize(model, preset("tp2"), (x, none))
    same(model, program, x, none)
    for marked in (none + 1, none.index_fill(0, torch.tensor([1]), 1.0)):
        with pytest.raises(RuntimeError, match="four are to be marked"):
            fxshard.simulate(program, x, marked)
    same(model, program, x, none)


def test_a_layer_that_may_be_dropped_writes_to_what_it_made() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                if torch.rand([]) < 0.4:
                    continue
                x = x + layer(x)
                x *= mask
            return x

    model, x = Layers().double(), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 1, dtype=torch.float64).index_fill(0, torch.tensor([1]), 0.0)
    program = fxshard.parallelize(model, preset("tp2"), (x, mask))
    for seed in range(6):
        same(model, program, x, mask, seed=seed)


def test_a_way_that_raises_raises_in_the_program() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("what is this?")
            if (x > 100).any():
                raise ValueError("too much")
            out: torch.Tensor = self.l(x)
            return out

    model, x = Careful().double(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset("dp2"), (x,))
    same(model, program, x)
    with pytest.raises(RuntimeError, match="what is this"):
        fxshard.simulate(program, x / 0)
    with pytest.raises(RuntimeError, match="too much"):
        fxshard.simulate(program, x + 1000)


class Told(nn.Module):
    """A model whose forward is a function of its own layers and the input."""

    def __init__(self, forward: Callable[[Told, torch.Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.how = nn.Linear(8, 8), nn.Linear(8, 4), nn.BatchNorm1d(8), forward
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> object:
        return self.how(self, x)


def twice(m: Told, x: torch.Tensor) -> torch.Tensor:
    dropped = False
    for _ in range(3):  # never two in a row
        if torch.rand([]) < 0.5 and not dropped:
            dropped = True
        else:
            x, dropped = m.a(x), False
    return x


def loop(m: Told, x: torch.Tensor) -> torch.Tensor:
    while x.norm() > 1:
        x = x * 0.5
    return x


def kept_view(m: Told, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    first = h[0]
    if x.sum() > 0:
        h.mul_(2).add_(first)
    return h


def given_on(m: Told, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = m.a(x)
    y = h * 2 if x.sum() > 0 else h
    y += 1
    return y, h


def unseen(m: Told, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    if x.sum() > 0:
        with torch.no_grad():
            h.mul_(2)
    return h


def handed_on_behind_autograd(m: Told, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    with torch.no_grad():
        h = h * 2 if h.sum() > 0 else h
    out: torch.Tensor = m.a(h)
    return out


def asserting_on_one_way(m: Told, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        assert x.abs().max() < 100
    return m.a(x)  # type: ignore[no-any-return]


def read_again(m: Told, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x) if x.sum() > 0 else m.a(x)
    return y + m.norm.running_mean


REFUSED: dict[str, Callable[[Told, torch.Tensor], object]] = {
    "other shapes": lambda m, x: m.a(x) if x.sum() > 0 else m.b(x),
    "other kinds": lambda m, x: (m.a(x), x) if x.sum() > 0 else m.a(x),
    "depend on each other": twice,
    "a loop": loop,
    "a view that is read as well": kept_view,
    "what is handed on is written": given_on,
    "written behind autograd": unseen,
    "handed on behind autograd": handed_on_behind_autograd,
    "what one way alone refuses": lambda m, x: m.a(x) if x.sum() > 0 else m.a(torch.from_numpy(x.detach().numpy())),
    "an assertion on one way": asserting_on_one_way,
    "running statistics are read": read_again,
    "drawn by numpy": lambda m, x: m.a(x) * float(np.random.rand()),
    "masked by numpy": lambda m, x: m.a(x) * torch.from_numpy(np.random.rand(4, 8)),
    "drawn by python": lambda m, x: m.a(x) if random.random() < 0.5 else m.a(x) * 2,
    "drawn between": lambda m, x: m.a(x) * random.uniform(2, 3),
    "chosen by python": lambda m, x: m.a(x) * random.choice([1.0, 2.0, 3.0, 4.0]),
}


@pytest.fixture
def quiet_draws() -> Iterator[None]:
    state, other = random.getstate(), np.random.get_state()
    yield
    random.setstate(state)
    np.random.set_state(other)


@pytest.mark.usefixtures("quiet_draws")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_two_ways_that_meet_is_refused(name: str) -> None:
    model, x = Told(REFUSED[name]).double(), torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(CaptureError) as caught:
        fxshard.parallelize(model, preset("tp2"), (x,))
    assert caught.value.fix


@pytest.mark.usefixtures("quiet_draws")
@pytest.mark.parametrize("draw", [np.random.random, random.random, lambda: np.random.uniform(0, 1)])
def test_numbers_of_the_host_that_decide_nothing_do_no_harm(draw: Callable[[], float]) -> None:
    model = Told(lambda m, x: m.a(x) if draw() > 0 else m.b(x)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    same(model, fxshard.parallelize(model, preset("tp2"), (x,)), x)


def counting(m: Told, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        m.seen.add_(x.sum(0).detach())
        m.seen[2:4] *= 0.5
    return m.a(x) + m.seen


def both_count(m: Told, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        m.seen.add_(1)
        x = m.a(x)
    else:
        m.seen.mul_(0.5)
        x = m.a(x * 2)
    return x * m.seen.clone()


def residual(m: Told, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    for scale in (1.0, 0.5):
        if h.sum() > 0:
            h += m.a(scale * x)
    return h * 2


def buffer_handed_on(m: Told, x: torch.Tensor) -> torch.Tensor:
    scale = m.seen.add_(1) if x.sum() > 0 else m.seen
    return m.a(x) * scale


WRITES: dict[str, Callable[[Told, torch.Tensor], object]] = {
    "a buffer": counting,
    "a buffer, on both ways": both_count,
    "the residual stream": residual,
    "a buffer that is handed on": buffer_handed_on,
    "running statistics and their counter": lambda m, x: m.norm(x) if x.sum() > 0 else m.a(x),
    "running statistics on both ways": lambda m, x: m.norm(x) if x.sum() > 0 else m.norm(m.a(x)),
}


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "tp2", "dp2_tp2")
@pytest.mark.parametrize("name", WRITES)
def test_what_a_way_writes_is_written_where_it_is_taken(name: str, plan: str) -> None:
    torch.manual_seed(0)
    model = Told(WRITES[name]).double()
    x = torch.randn(4, 8, dtype=torch.float64) / 8
    program = fxshard.parallelize(model, preset(plan), (x + 1,))
    for each in (x + 1, x - 1, x + 1, x - 1, x - 1):
        same(model, program, each)
        state = program.full_state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value)


class Several(nn.Module):
    """Decisions by flags: ``how`` says what each of them does."""

    def __init__(self, how: Callable[[Several, torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.one, self.other, self.how = nn.BatchNorm1d(8), nn.BatchNorm1d(8), how

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(F.dropout(self.b(x).relu(), 0.5, self.training))
        return out

    def forward(self, x: torch.Tensor, flags: torch.Tensor) -> object:
        return self.how(self, x, flags)


def past_another(m: Several, x: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t, g = x * 1, x
    if flags[0] > 0:
        t = m.a(x)
    g = g + t
    if flags[1] > 0:
        g = m.b(g)
    if flags[2] > 0:
        t = m.c(x)
    return t, g


def in_turns(m: Several, x: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, g = x, x.tanh()
    for i in range(6):
        if flags[i] > 0:
            if i % 2:
                g = m.b(g + h)
            else:
                h = m.a(h) * 2
    return h, g


def other_layers(m: Several, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    h = m.one(x) if flags[0] > 0 else m.other(x)
    return m.a(h) if flags[1] > 0 else m.mlp(h)


def checkpointed(m: Several, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    if flags[0] > 0:
        h = checkpoint(m.mlp, h, use_reentrant=False)
    return m.d(h) if flags[1] > 0 else h


def results_and_writes(m: Several, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    h, t = m.a(x), x * 1
    if flags[0] > 0:
        h += t * 0.5
        t[1] = 0.2
    return h * t


SEVERAL: dict[str, tuple[int, Callable[[Several, torch.Tensor, torch.Tensor], object]]] = {
    "past another decision": (3, past_another),
    "two streams in turns": (6, in_turns),
    "other layers on either way": (2, other_layers),
    "a checkpointed call": (2, checkpointed),
    "results and writes": (1, results_and_writes),
}


@pytest.mark.thin(2)
@slow_but_for("plan", ("dp2", "tp2", "dp2_tp2"), "dp2")
@pytest.mark.parametrize("name", SEVERAL)
def test_every_set_of_answers(name: str, plan: str) -> None:
    count, how = SEVERAL[name]
    torch.manual_seed(0)
    model, x = Several(how).double(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset(plan), (x, torch.zeros(count)))
    sets = list(itertools.product((0.0, 1.0), repeat=count))
    for flags in map(torch.tensor, sets if count < 4 else sets[::3]):
        torch.manual_seed(1)
        want, after = model(x, flags), torch.rand(2)
        torch.manual_seed(1)
        got = fxshard.simulate(program, x, flags).outputs[1]
        assert torch.equal(torch.rand(2), after)
        torch.testing.assert_close(got, want)
        state = program.full_state_dict()
        torch.testing.assert_close(state, dict(model.state_dict()))
    assert len(program._captures.all) == 1


@pytest.mark.parametrize("plan", ["tp2", "dp2"])
def test_an_input_that_a_way_writes(plan: str) -> None:
    def changing(m: Told, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x.add_(1)
        return m.a(x)  # type: ignore[no-any-return]

    model, x = Told(changing).double(), torch.randn(4, 8, dtype=torch.float64) / 8
    program = fxshard.parallelize(model, preset(plan), (x.clone(),))
    for each in (x + 1, x - 1):
        mine, theirs = each.clone(), each.clone()
        torch.testing.assert_close(fxshard.simulate(program, mine).outputs[1], model(theirs))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_dropped_layers_on_ranks() -> None:
    launch(2, branches.dropping)
