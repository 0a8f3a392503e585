"""A capture serves only calls of the state that it was made in: what the model reads, modes, what needs a gradient."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import data_parallel, tensor_parallel
from fxshard.errors import CaptureError, InputError
from tests.presets import preset

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
FLAGS: dict[str, Any] = {"square": False}
GAIN = 1.0


class Config:
    def __init__(self) -> None:
        self.act, self.steps = "relu", [1.0, 2.0]


class Inner(nn.Module):
    kind = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.options = 1.0, {"shift": 0.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale + self.options["shift"]
        return x if self.kind == "plain" else -x


def grown(x: torch.Tensor) -> torch.Tensor:
    return (x.square() if FLAGS["square"] else x) * GAIN


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.inner, self.config = nn.Linear(8, 16), nn.Linear(16, 8), Inner(), Config()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = getattr(torch, self.config.act)(self.up(x)) * self.config.steps[0]
        return grown(self.inner(self.down(y)))


def model_of(cls: Callable[[], nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return cls()


def agree(program: fxshard.ParallelModule, model: nn.Module, *args: Any) -> None:
    want = model(*args)
    for out in fxshard.simulate(program, *args).outputs:
        torch.testing.assert_close(out, want)


# --- what is given ---------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0, bias: Any = None, *, negate: bool = False) -> torch.Tensor:
        y = x * scale if bias is None else x * scale + bias
        return -y if negate else y


@pytest.mark.parametrize("fixed", [False, True])
def test_a_default_that_is_given_is_as_one_that_is_not(fixed: bool) -> None:
    model = Scaled()
    program = fxshard.parallelize(model, data_parallel(2), (X,) if fixed else None)
    agree(program, model, X)
    for args, kwargs in [((X, 1.0), {}), ((X,), {"scale": 1.0, "bias": None}), ((), {"x": X, "negate": False})]:
        assert torch.equal(fxshard.simulate(program, *args, **kwargs).outputs[1], X)
    assert len(program._captures.all) == 1
    if fixed:
        with pytest.raises(InputError, match=r"scale was 1.0 at capture, its default"):
            fxshard.simulate(program, X, 2.0)
    else:
        agree(program, model, X, 2.0)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, one: dict[str, Any], other: list[Any]) -> Any:
        one["y"] = self.up(x)
        return other[0].get("y", x) * 2


def test_a_container_that_is_given_twice_and_changed_is_refused() -> None:
    program, shared = fxshard.parallelize(Remembers(), tensor_parallel(2)), dict[str, Any]()
    for _ in range(2):
        with pytest.raises(InputError, match=r"one and other\[0\] are one dict"):
            fxshard.simulate(program, X, shared, [shared])
        fxshard.simulate(program, X, {}, [{}])


# --- what the model reads --------------------------------------------------------------------------------------------


def set_number(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.inner.scale = 3.0


def set_entry(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.inner.options["shift"] = 2.0


def set_in_object(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.act = "tanh"


def set_in_list(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.steps[0] = 5.0


def set_on_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Inner, "kind", "negative")


def set_instead_of_the_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.inner.kind = "negative"


def set_global(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(FLAGS, "square", True)


def set_number_of_the_file(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(f"{__name__}.GAIN", 4.0)


def set_function(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(f"{__name__}.grown", lambda x: x * 7)


def set_method(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Inner, "forward", lambda self, x: x * 9)


def set_module(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.inner = nn.Tanh()


CHANGES = (
    set_number, set_entry, set_in_object, set_in_list, set_on_class, set_instead_of_the_class, set_global,
    set_number_of_the_file, set_function, set_method, set_module,
)  # fmt: skip


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_behind_the_capture_counts(
    change: Callable[[Any, pytest.MonkeyPatch], None], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,) if fixed else ())
    agree(program, model, X)
    before = model(X)
    change(model, monkeypatch)
    assert not torch.allclose(model(X), before)
    agree(program, model, X)
    agree(program, model, X)
    monkeypatch.undo()


def test_what_is_read_no_more_often_than_it_changes() -> None:
    """A value that is another one at each call is no constant: refused, and not captured for ever."""
    model = model_of()
    program = fxshard.parallelize(model, data_parallel(2), (X,))

    def anneal() -> None:
        for step in range(20):
            model.inner.scale = 1.0 + step
            agree(program, model, X)

    with pytest.raises(CaptureError, match=r"inner.scale was .*, and is"):
        anneal()


def test_attributes_of_the_program_are_its_own() -> None:
    model = model_of()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    program.inner.scale = 2.0
    assert model.inner.scale == 1.0
    want = model_of()
    want.inner.scale = 2.0
    agree(program, want, X)
    agree(fxshard.parallelize(model, tensor_parallel(2), (X,)), model, X)


# --- modes -----------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.up(x)))


def test_the_mode_of_a_part() -> None:
    model = model_of(Dropping)
    program = fxshard.parallelize(copy.deepcopy(model), data_parallel(2), (X,))
    for each in (program, model):
        each.drop.eval()
        each.norm.eval()
    agree(program, model, X)
    for each in (program, model):
        each.train()
        each.drop.eval()
    agree(program, model, X)
    assert program.norm.training
    assert not program.drop.training


def test_the_models_modes_stay() -> None:
    model = model_of(Dropping)
    model.norm.eval()
    program = fxshard.parallelize(model, data_parallel(2), (X,))
    program.eval()
    fxshard.simulate(program, X)
    assert [m.training for m in model.modules()] == [True, True, False, True]


# --- gradients -------------------------------------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.teacher = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(Reverse.apply(self.first(x)))
        with torch.no_grad():
            target = self.teacher(x)
        return (y - target).square()


@pytest.mark.parametrize("plan", [data_parallel(2), tensor_parallel(2), fxshard.zero(2)], ids=["dp", "tp", "zero"])
def test_frozen_at_capture_and_thawed_later(plan: fxshard.Plan) -> None:
    model = model_of(Frozen)
    model.requires_grad_(False)
    program = fxshard.parallelize(model, plan, (X,))
    model.requires_grad_(True)
    program.requires_grad_(True)
    x = X.clone().requires_grad_()
    y = X.clone().requires_grad_()
    model(x).sum().backward()
    run = fxshard.simulate(program, y)
    run.backward(torch.sum)
    torch.testing.assert_close(y.grad, x.grad)
    grads = run.full_grads()
    assert grads.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if torch.is_grad_enabled():
            y = y * 2
        return y * 3 if x.requires_grad else y


def test_a_model_that_asks() -> None:
    model = model_of(Asks)
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    for x in (X, X.clone().requires_grad_(), X):
        agree(program, model, x)
        with torch.no_grad():
            agree(program, model, x)


class AsksInference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x) * (2 if torch.is_inference_mode_enabled() else 3)
        with torch.inference_mode():
            factor = 5 if torch.is_inference_mode_enabled() else 7
        return y * factor * (1 if torch.is_inference_mode_enabled() else 11)


def test_a_model_that_asks_for_inference_mode() -> None:
    model = model_of(AsksInference)
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    for _ in range(2):
        agree(program, model, X)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                agree(program, model, X)
    with torch.inference_mode():
        lazy = fxshard.parallelize(model, tensor_parallel(2))
        agree(lazy, model, X)
    agree(lazy, model, X)


def test_a_model_that_asks_which_tensors_are_of_inference_mode() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) * (2 if x.is_inference() else 3)

    model = model_of(Asks)
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    agree(program, model, X)
    with torch.inference_mode(), pytest.raises(CaptureError, match="which tensors are of inference mode"):
        fxshard.simulate(program, X)


@pytest.mark.parametrize("asks", ["requires_grad", "is_leaf", "grad_fn"])
def test_a_model_that_asks_a_result(asks: str) -> None:
    """Whether a result requires a gradient depends on what surrounds the call, too."""

    class Result(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.up(x)
            needs = {"requires_grad": y.requires_grad, "is_leaf": not y.is_leaf, "grad_fn": y.grad_fn is not None}
            return y * 2 if needs[asks] else y

    model = model_of(Result)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            program = fxshard.parallelize(model, tensor_parallel(2), (X,))
        agree(program, model, X)
        with torch.no_grad():
            agree(program, model, X)
        agree(program, model, X)


# --- what the caller gives, and other threads ------------------------------------------------------------------------


class Keeps(nn.Module):
    """Changes what it is given: a dict, a list in it, and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        state["seen"].append(y)
        state["last"], state["count"] = y * 2, state["count"] + 1
        state["sum"].add_(y)
        return y + state["sum"]


@pytest.mark.parametrize("plan", ["tp2", "dp2", "zero2_tp2"])
def test_containers_change_for_the_caller(plan: str) -> None:
    model = model_of(Keeps)
    program = fxshard.parallelize(model, preset(plan))
    mine, theirs = ({"seen": [], "count": 0, "sum": torch.zeros(4, 8)} for _ in range(2))
    kept = mine["seen"], mine["sum"]
    with torch.no_grad():
        for step in range(3):
            want = model(X + step, theirs)
            got = fxshard.simulate(program, X + step, mine).outputs
            torch.testing.assert_close(got[1], want)
            assert mine.keys() == theirs.keys()
            torch.testing.assert_close(mine, theirs)
    assert mine["seen"] is kept[0]
    assert mine["sum"] is kept[1]


def test_inputs_that_share_memory_with_one_that_is_written() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * y

    program = fxshard.parallelize(Adds(), tensor_parallel(2))
    x = torch.zeros(4, 8)
    with pytest.raises(InputError, match="the model writes to x, which shares memory with y"):
        fxshard.simulate(program, x, x[:, :])


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.calls, self.last = nn.Linear(8, 8), 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = min(self.calls + 1, 2)
        y: torch.Tensor = self.up(x) * self.calls
        self.last = y
        return y


def test_attributes_that_forward_assigns(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(Counts)
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    assert "what forward assigns to last is lost" in caplog.text
    assert (model.calls, model.last) == (0, None), "the user's model is as it was"
    for count in (1, 2, 2):
        want = model_of(Counts)
        want.calls = count - 1
        agree(program, want, X)
        assert program.calls == count


def test_threads_that_call_first() -> None:
    program = fxshard.parallelize(model_of(), tensor_parallel(2))
    problems: list[BaseException] = []

    def call() -> None:
        try:
            fxshard.simulate(program, X)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(program._captures.all) == 1
