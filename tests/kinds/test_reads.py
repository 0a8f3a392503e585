"""Whatever forward reads of Python counts: once it has changed, the old value is never used in silence."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import dataclasses
import functools
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fxshard

LEVEL = 1.0
TABLE = {"level": 1.0}
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("level", default=1.0)


class Settings:
    level = 1.0


class Slotted:
    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level = 1.0


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Record:
    level: float = 1.0


class Helper:
    level = 1.0

    def __init__(self) -> None:
        self.levels = {"own": 1.0}

    def by_global(self) -> float:
        return LEVEL

    def by_own(self) -> float:
        return self.levels["own"]


def times(holder: dict[str, float], y: torch.Tensor) -> torch.Tensor:
    return y * holder["level"]


def decorated(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def inner(*args: Any) -> torch.Tensor:
        return function(*args) * LEVEL

    return inner


def closure(holder: dict[str, float]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda y: y * holder["level"]


def counted(y: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = y * counted.level  # type: ignore[attr-defined]
    return out


counted.level = 1.0  # type: ignore[attr-defined]


@functools.singledispatch
def dispatched(y: Any) -> Any:
    return y


class Levels(list[float]):
    level = 1.0


KEPT, OF_THREAD = Record(), threading.local()
WEAK: Any = weakref.ref(KEPT)
PROXY = types.MappingProxyType({"of": KEPT})
ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"act": lambda y: y * LEVEL}


class Reads(nn.Module):
    options: ClassVar[dict[str, float]] = {"level": 1.0}
    kept = 1.0

    def __init__(self, read: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.read, self.holder = nn.Linear(8, 8), read, {"level": 1.0}
        self.slotted, self.record, self.helper = Slotted(), Record(), Helper()
        self.partial, self.bound = functools.partial(times, self.holder), self.helper.by_own
        self.closure, self.array, self.number = closure(self.holder), np.ones(2), torch.ones(())
        self.memory, self.bytes, self.levels = array.array("d", [1.0]), bytearray(b"\x01"), Levels([1.0])
        self.chain = collections.ChainMap(self.holder)

    @decorated
    def through(self, y: torch.Tensor) -> torch.Tensor:
        return y

    @classmethod
    def of_class(cls, y: torch.Tensor) -> torch.Tensor:
        return y * cls.kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.up(x))


def set_global(model: Reads) -> None:
    globals()["LEVEL"] = 3.0


READ: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Callable[[Any], object]]] = {
    "slots": (lambda m, y: y * m.slotted.level, lambda m: setattr(m.slotted, "level", 3.0)),
    "a dataclass with slots": (lambda m, y: y * m.record.level, lambda m: setattr(m.record, "level", 3.0)),
    "a partial's dict": (lambda m, y: m.partial(y), lambda m: m.holder.update(level=3.0)),
    "a bound method": (lambda m, y: y * m.bound(), lambda m: m.helper.levels.update(own=3.0)),
    "a closure": (lambda m, y: m.closure(y), lambda m: m.holder.update(level=3.0)),
    "an array, written in place": (lambda m, y: y * float(m.array[0]), lambda m: m.array.__setitem__(0, 3.0)),
    "a number in a tensor": (lambda m, y: y * m.number.item(), lambda m: m.number.fill_(3.0)),
    "a class-level dict": (lambda m, y: y * m.options["level"], lambda m: Reads.options.update(level=3.0)),
    "type(self)": (lambda m, y: y * type(m).kept, lambda m: setattr(Reads, "kept", 3.0)),
    "cls": (lambda m, y: m.of_class(y), lambda m: setattr(Reads, "kept", 3.0)),
    "a global class": (lambda m, y: y * Settings.level, lambda m: setattr(Settings, "level", 3.0)),
    "an object's class": (lambda m, y: y * m.helper.level, lambda m: setattr(Helper, "level", 3.0)),
    "a method of an object": (lambda m, y: y * m.helper.by_global(), set_global),
    "a lambda in a dict": (lambda m, y: ACTS["act"](y), set_global),
    "another lambda in a dict": (lambda m, y: ACTS["act"](y), lambda m: ACTS.update(act=torch.tanh)),
    "a decorator": (lambda m, y: m.through(y), set_global),
    "an attribute of a function": (lambda m, y: counted(y), lambda m: setattr(counted, "level", 3.0)),
    "a default, and an attribute later": (
        lambda m, y: y * getattr(m, "late", 1.0),
        lambda m: setattr(m, "late", 3.0),
    ),
    "hasattr": (lambda m, y: y.tanh() if hasattr(m, "late") else y, lambda m: setattr(m, "late", 3.0)),
    "the environment": (
        lambda m, y: y * float(os.environ.get("LEVEL_OF_A_TEST", "1")),
        lambda m: os.environ.update(LEVEL_OF_A_TEST="3"),
    ),
    "a context variable": (lambda m, y: y * CONTEXT.get(), lambda m: CONTEXT.set(3.0)),
    "a weak reference": (lambda m, y: y * WEAK().level, lambda m: setattr(KEPT, "level", 3.0)),
    "a proxy of a dict": (lambda m, y: y * PROXY["of"].level, lambda m: setattr(KEPT, "level", 3.0)),
    "an array of Python's": (lambda m, y: y * m.memory[0], lambda m: m.memory.__setitem__(0, 3.0)),
    "bytes that change": (lambda m, y: y * m.bytes[0], lambda m: m.bytes.__setitem__(0, 3)),
    "an attribute of a list": (lambda m, y: y * m.levels.level, lambda m: setattr(m.levels, "level", 3.0)),
    "a chain of dicts": (lambda m, y: y * m.chain["level"], lambda m: m.holder.update(level=3.0)),
    "a thread's own": (lambda m, y: y * OF_THREAD.level, lambda m: setattr(OF_THREAD, "level", 3.0)),
    "a function by types": (
        lambda m, y: dispatched(y),
        lambda m: dispatched.register(torch.Tensor, lambda y: y * 3),
    ),
    "forward, patched on a part": (lambda m, y: y, lambda m: setattr(m.up, "forward", lambda x: x * 3)),
    "a hook on a part": (lambda m, y: y, lambda m: m.up.register_forward_hook(lambda m, a, out: out * 3)),
    "another class of a part": (lambda m, y: y, lambda m: setattr(m.up, "__class__", nn.Identity)),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    def reset() -> None:
        globals()["LEVEL"] = 1.0
        Reads.options["level"] = Reads.kept = Settings.level = Helper.level = counted.level = 1.0  # type: ignore[attr-defined]
        ACTS["act"] = lambda y: y * LEVEL
        os.environ.pop("LEVEL_OF_A_TEST", None)
        CONTEXT.set(1.0)
        KEPT.level = OF_THREAD.level = 1.0
        dispatched.register(torch.Tensor, lambda y: y)

    reset()
    yield
    reset()


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", READ)
def test_a_changed_value_counts(name: str) -> None:
    read, change = READ[name]
    torch.manual_seed(0)
    model, x = Reads(read).double(), torch.randn(4, 8, dtype=torch.float64)
    other = copy.deepcopy(model)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2))
    for _ in range(2):
        torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], other(x))
    assert len(program._captures.all) == 1
    before = other(x)
    change(model)
    if model.slotted.level != other.slotted.level or not torch.equal(model(x), other(x)):
        change(other)
    assert not torch.allclose(other(x), before), "the change changes nothing"
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], other(x))


@pytest.mark.parametrize("how", [torch.Tensor.tolist, float, int, bool])
def test_a_number_in_a_tensor_counts_however_it_is_asked(how: Callable[[torch.Tensor], Any]) -> None:
    model, x = Reads(lambda m, y: y * how(m.number)).double(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, fxshard.data_parallel(2))
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], model(x))
    model.number.zero_()
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], model(x))


ASKED: dict[str, Callable[[torch.Tensor], bool]] = {
    "a getter": lambda x: bool(getattr(x, "_".join(("requires", "grad")))),
    "a function of the module": lambda x: bool(getattr(torch, "_".join(("is", "grad", "enabled")))()),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_of_gradients_counts_however_it_is_spelled(name: str) -> None:
    asks = ASKED[name]
    model = Reads(lambda m, y: y * 3 if asks(y) else y).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, fxshard.data_parallel(2))
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fxshard.simulate(program, x).outputs[1], model(x))


LAYOUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whether it is contiguous": lambda x: x * 3 if x.is_contiguous() else x,
    "strides": lambda x: x * x.stride(-1),
    "strides of a view": lambda x: x * x.T.stride(0),
    "a view by strides": lambda x: x.as_strided((2, 2), (1, 2)).repeat(2, 4),
    "the place in memory": lambda x: x * (1 + x.storage_offset()),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", LAYOUT)
def test_how_an_input_lies_in_memory_counts_where_it_is_asked(name: str) -> None:
    asks = LAYOUT[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(asks(x))

    model = Model().double()
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2))
    x = torch.arange(64, dtype=torch.float64).reshape(8, 8)
    for given in (x[:4], x.T[:4], x[4:], x.T[4:], x[:4].clone()):
        torch.testing.assert_close(fxshard.simulate(program, given).outputs[1], model(given))


def test_how_an_input_lies_in_memory_does_not_count_where_nobody_asks() -> None:
    program = fxshard.parallelize(nn.Linear(8, 8), fxshard.tensor_parallel(2))
    for given in (torch.randn(8, 8), torch.randn(8, 8).T):
        fxshard.simulate(program, given)
    assert len(program._captures.all) == 1


def test_draws_follow_how_an_input_lies_in_memory() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.up(x + torch.rand_like(x)), 0.5)

    model = Model().double()
    program = fxshard.parallelize(model, fxshard.data_parallel(2) | fxshard.tensor_parallel(2))
    x = torch.randn(8, 8, dtype=torch.float64)
    for given in (x, x.T, x[:4], x.T[:4], x):
        torch.manual_seed(3)
        want = model(given)
        torch.manual_seed(3)
        torch.testing.assert_close(fxshard.simulate(program, given).outputs[1], want)


def test_how_an_input_lies_in_memory_where_sizes_are_dynamic() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3 if x.is_contiguous() else x * x.stride(0)

    x = torch.randn(8, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("columns", max=64)},)
    program = fxshard.parallelize(Model(), fxshard.data_parallel(2), (x,), dynamic_shapes=shapes)
    for given in (x, x[:4, :4].clone(), x[:4, :4], x.T):
        torch.testing.assert_close(fxshard.simulate(program, given).outputs[1], Model()(given))
    assert len(program._captures.all) == 3
