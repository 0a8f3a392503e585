"""Captures on disk: found again by the next process, and never where anything changed that they depend on."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.cache import key
from fxshard.cache.stored import NotStorable, dump, restore
from fxshard.capture.capture import capture
from fxshard.capture.captured import Captured
from fxshard.capture.fidelity import check_fidelity
from fxshard.normal.normalize import normalize
from tests.models.zoo import MODELS, build

CPU = torch.device("cpu")
PLAN = fxshard.tensor_parallel(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.shift = 2.0, torch.zeros(8)
        self.options = {"act": "relu"}

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return self.down(getattr(torch, self.options["act"])(self.up(x))) * self.scale * gain + moved(self.shift)


def moved(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("it was captured again")

        monkeypatch.setattr(torch.export, "export", refuse)

    return forbid


@pytest.mark.parametrize("name", MODELS)
def test_a_capture_is_read_back_as_it_was(name: str) -> None:
    model, inputs = build(name, torch.float32)
    made = capture(model, (), inputs)
    read = restore(dump(made, model), model)
    assert str(read.root.graph) == str(made.root.graph)
    assert dict(read.root.named_parameters()).keys() == dict(made.root.named_parameters()).keys()
    for was, now in zip(made.root.graph.nodes, read.root.graph.nodes, strict=True):
        assert now.meta.keys() == was.meta.keys()
        assert [now.meta[k] for k in was.meta if k != "val"] == [was.meta[k] for k in was.meta if k != "val"]
        assert repr(now.meta.get("val")) == repr(was.meta.get("val"))
    for field in Captured.__dataclass_fields__.keys() - {"root"}:
        assert getattr(read, field) == getattr(made, field), field
    check_fidelity(model, read, (), inputs)


def test_the_second_start_does_not_capture(tmp_path: Path, no_export: Callable[[], None]) -> None:
    model, x = Net(), torch.randn(4, 8)
    first = fxshard.parallelize(model, PLAN, (x,), cache=tmp_path)
    no_export()
    again = Net()
    again.load_state_dict(model.state_dict())
    second = fxshard.parallelize(again, fxshard.sequence_parallel(2), (x,), cache=tmp_path)  # of any plan
    assert first.compiled.captured.placeholders == second.compiled.captured.placeholders
    third = fxshard.parallelize(again, PLAN, (x,), cache=tmp_path)
    assert third.code() == first.code()
    torch.testing.assert_close(fxshard.simulate(third, x).outputs[0], model(x))


def test_the_environment_may_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSHARD_CACHE", str(tmp_path / "a" / "b"))
    fxshard.parallelize(Net(), PLAN, (torch.randn(4, 8),))
    assert len(list((tmp_path / "a" / "b").glob("*.capture"))) == 1


def keys_in_a_process(seed: str) -> list[str]:
    code = (
        "import torch\nfrom fxshard.cache.key import key_of\nfrom tests.cache.test_cache import Net\n"
        "from tests.models.zoo import MODELS, build\ncpu = torch.device('cpu')\n"
        "print(key_of(Net(), (torch.ones(4, 8),), {}, cpu))\n"
        "for name in MODELS:\n    model, inputs = build(name, torch.float32)\n"
        "    print(key_of(model, (), inputs, cpu))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_keys_are_the_same_in_every_process() -> None:
    first, second = keys_in_a_process("1"), keys_in_a_process("2")
    assert first == second
    assert len(set(first)) == len(first) == 1 + len(MODELS)


# --- what must not be taken for the same --------------------------------------------------------------------------


def patch_the_class(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Net, "forward", lambda self, x, gain=1.0: self.down(self.up(x)))


def patch_a_layer(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)


def patch_a_function(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules[__name__], "moved", lambda x: x + 2)


def patch_functional(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.functional, "softmax", lambda x, dim: x)


def change_a_number(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.scale = 3.0


def change_an_option(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.options["act"] = "tanh"


def change_a_constant(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.shift[0] = 1.0


def change_the_mode(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.eval()


def add_a_hook(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.up.register_forward_hook(lambda module, args, out: out * 2)


def wrap_forward(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.forward = functools.partial(model.forward, gain=2.0)  # type: ignore[method-assign]


def freeze(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.up.weight.requires_grad_(False)


def tie(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.down.weight = nn.Parameter(model.up.weight.detach().T)


def widen(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.double()


def swap_an_instance(model: Net, patch: pytest.MonkeyPatch) -> None:
    model.up = nn.Linear(8, 16, bias=False)


def another_default(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_default_dtype", lambda: torch.float64)


CHANGES = [
    patch_the_class, patch_a_layer, patch_a_function, patch_functional, change_a_number, change_an_option,
    change_a_constant, change_the_mode, add_a_hook, wrap_forward, freeze, tie, widen, swap_an_instance, another_default,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_tells_what_changed(
    change: Callable[[Net, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 8)
    before = key.key_of(Net(), (x,), {}, CPU)
    model = Net()
    change(model, monkeypatch)
    assert key.key_of(model, (x,), {}, CPU) != before


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.randn(5, 8),), {}),
        ((torch.randn(4, 8, dtype=torch.float64),), {}),
        ((torch.randn(4, 8, requires_grad=True),), {}),
        ((torch.randn(8, 4).T,), {}),
        ((torch.randn(4, 8), 2.0), {}),
        ((torch.randn(4, 8),), {"gain": 3.0}),
    ],
)
def test_the_key_tells_other_inputs(args: Any, kwargs: Any) -> None:
    assert key.key_of(Net(), args, kwargs, CPU) != key.key_of(Net(), (torch.randn(4, 8),), {}, CPU)


def test_the_key_tells_the_device() -> None:
    args = (torch.randn(4, 8),)
    assert key.key_of(Net(), args, {}, torch.device("cuda", 0)) != key.key_of(Net(), args, {}, CPU)


def test_weights_of_other_values_are_the_same() -> None:
    x = torch.randn(4, 8)
    assert key.key_of(Net(), (x,), {}, CPU) == key.key_of(Net(), (x + 1,), {}, CPU)


def test_an_edited_file_is_captured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in a file of its own, which no class of the model stands in."""
    file = tmp_path / "helper_of_a_net.py"
    file.write_text("def helped(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    helper = importlib.import_module("helper_of_a_net")

    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8, device="meta")  # on meta nothing is compared by values

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sys.modules["helper_of_a_net"].helped(self.up(x))  # type: ignore[no-any-return]

    def operators() -> list[str]:
        program = fxshard.parallelize(Helped(), PLAN, (torch.ones(2, 8, device="meta"),), cache=tmp_path / "cache")
        return [str(n.target) for n in program.compiled.captured.root.graph.nodes if n.op == "call_function"]

    assert operators()[-1] == operators()[-1] == "aten.add.Tensor"
    file.write_text("def helped(x):\n    return x * 22\n")
    importlib.reload(helper)
    assert operators()[-1] == "aten.mul.Tensor"
    del sys.modules["helper_of_a_net"]


SETTINGS = {"factor": 1.0}


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * SETTINGS["factor"]  # type: ignore[no-any-return]


def test_what_code_reads_outside_of_the_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the example shows it neither in results nor in gradients: all of it is zero."""
    x, model = torch.randn(4, 8), Reads()
    nn.init.zeros_(model.up.bias).requires_grad_(False)
    fxshard.parallelize(model, PLAN, (torch.zeros(4, 8),), cache=tmp_path)
    monkeypatch.setitem(SETTINGS, "factor", 3.0)
    program = fxshard.parallelize(model, PLAN, (torch.zeros(4, 8),), cache=tmp_path)
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[0], model(x))


# --- what is not kept -----------------------------------------------------------------------------------------------


def test_what_holds_a_lock_is_captured_every_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.lock = threading.Lock()
    with caplog.at_level(logging.INFO):
        program = fxshard.parallelize(model, PLAN, (torch.randn(4, 8),), cache=tmp_path)
    assert "is not kept" in caplog.text
    assert "lock" in caplog.text
    assert program.collectives()
    assert not list(tmp_path.iterdir())


def test_sizes_that_change_are_not_kept(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}, "gain": None}
    captured = capture(Net(), (torch.randn(4, 8),), dynamic_shapes={"x": shapes["x"]})
    with pytest.raises(NotStorable, match="change"):
        dump(captured, Net())
    fxshard.parallelize(Net(), PLAN, (torch.randn(4, 8),), dynamic_shapes={"x": shapes["x"]}, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", [lambda data: data[:-20], lambda data: b"nothing", lambda data: b"{}\n" + data])
def test_a_broken_file_is_made_anew(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    model, x = Net(), torch.randn(4, 8)
    fxshard.parallelize(model, PLAN, (x,), cache=tmp_path)
    (file,) = tmp_path.glob("*.capture")
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    program = fxshard.parallelize(model, PLAN, (x,), cache=tmp_path)
    torch.testing.assert_close(fxshard.simulate(program, x).outputs[0], model(x))
    assert len(file.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    fxshard.parallelize(Net(), PLAN, (torch.randn(4, 8),), cache=blocked / "folder")


def test_what_others_may_have_written_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, x = tmp_path / "cache", torch.randn(4, 8)
    fxshard.parallelize(Net(), PLAN, (x,), cache=folder)
    (file,) = folder.glob("*.capture")
    assert not folder.stat().st_mode & 0o022
    for path, mode in ((file, 0o666), (folder, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        caplog.clear()
        fxshard.parallelize(Net(), PLAN, (x,), cache=folder)
        assert "may be written by everybody" in caplog.text
        if path is folder:
            path.chmod(before)


def test_what_shares_memory_shares_it_again() -> None:
    """A write through a reshape is one to what it is a view of, as in the capture that was stored."""

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y.reshape(-1).contiguous()[1:].add_(1)
            return y

    model, x = Writes(), torch.randn(4, 2)
    captured = capture(model, (x,))
    again = restore(dump(captured, model), model)
    places = []
    for each in (captured, again):
        torch.testing.assert_close(normalize(each.root)(x)[0], model(x))
        places.append([node.meta["val"].storage_offset() for node in each.root.graph.nodes if "val" in node.meta])
    assert places[0] == places[1]
