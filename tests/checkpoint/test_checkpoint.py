"""Checkpoints in one process: plain modules, simulated meshes, the meta device, and PyTorch's own tools."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import fxshard
from fxshard.errors import CheckpointError, DistributedError
from tests.models.zoo import build, ids

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
X = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)


class Net(nn.Module):
    """A packed weight, a tied one, a buffer, an extra state."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.again = self.out
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.note: Any = seed
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.again(torch.tanh(self.out(q * k + v))) * self.scale + self.shift

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


PLAN = {"qkv.weight": fxshard.Shard(0), "out.weight": fxshard.Shard(1)}


def program_of(model: nn.Module, world: int = 2) -> fxshard.ParallelModule:
    return fxshard.parallelize(model, fxshard.tensor_parallel(world) | fxshard.Plan({"tp": world}), (X,))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
    )


def test_a_simulated_mesh_saves_and_loads_weights(tmp_path: Path) -> None:
    model = Net()
    program = program_of(model)
    fxshard.save_checkpoint(tmp_path, program, extra="hello")
    for other in (Net(1), program_of(Net(1)), program_of(Net(1), 4), fxshard.parallelize(Net(1), PLAN, mesh={"tp": 2})):
        assert fxshard.load_checkpoint(tmp_path, other).extra == "hello"
        state = other.full_state_dict() if isinstance(other, fxshard.ParallelModule) else other.state_dict()
        assert same(state, model.state_dict())
    loaded = program_of(Net(1))
    fxshard.load_checkpoint(tmp_path, loaded)
    loaded._original.get().shift.copy_(model.shift)
    for rank in range(2):
        loaded.rank_module(rank).shift.copy_(model.shift)
    for output in fxshard.simulate(loaded, X).outputs:
        torch.testing.assert_close(output, model(X))
    with pytest.raises(CheckpointError, match="the optimizer has the parameters of one rank only"):
        fxshard.save_checkpoint(tmp_path, program, torch.optim.SGD(program.parameters()))
    with pytest.raises(DistributedError, match="which are all in this process"):
        program.sharded_state_dict()


def test_a_mesh_of_one_rank_is_plain(tmp_path: Path) -> None:
    program = fxshard.parallelize(Net(), {"out.weight": fxshard.Shard(0)}, (X,), mesh={"tp": 1})
    optimizer = torch.optim.AdamW(program.parameters(), 0.1)
    trained(program, optimizer)
    fxshard.save_checkpoint(tmp_path, program, optimizer, step=3)
    model = Net()
    other = torch.optim.AdamW(model.parameters(), 0.2)
    assert fxshard.load_checkpoint(tmp_path, model, other).step == 3
    assert other.param_groups[0]["lr"] == 0.1
    assert trained(model, other) == trained(program, optimizer)


def test_any_optimizer_of_a_plain_module(tmp_path: Path) -> None:
    """Where nothing is cut, state of any shape is kept, nested too."""
    kinds: list[Any] = [
        lambda p: torch.optim.LBFGS(p, max_iter=3),
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.ASGD,
    ]
    for kind in kinds:
        model, other = Net(), Net(1)
        optimizer, loaded = kind(model.parameters()), kind(other.parameters())

        def closure(model: nn.Module = model) -> torch.Tensor:
            model.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        fxshard.save_checkpoint(tmp_path, model, optimizer)
        fxshard.load_checkpoint(tmp_path, other, loaded)
        want, got = optimizer.state_dict(), loaded.state_dict()
        torch.testing.assert_close(got["state"], want["state"], rtol=0, atol=0)
        assert got["param_groups"] == want["param_groups"]


def test_pytorch_reads_what_was_saved_and_the_other_way_round(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    trained(model, optimizer)
    path = fxshard.save_checkpoint(tmp_path / "ours", model, optimizer)
    other = Net(1)
    theirs = torch.optim.AdamW(other.parameters())
    weights, state = get_state_dict(other, theirs)
    load(found := {"model": weights, "optimizer": state}, checkpoint_id=path)
    other.load_state_dict(found["model"])
    set_optimizer_state_dict(other, theirs, found["optimizer"])
    torch.testing.assert_close(theirs.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    dcp_to_torch_save(path, tmp_path / "one.pt")
    plain = torch.load(tmp_path / "one.pt", weights_only=False)["model"]
    assert same(plain, model.state_dict())

    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "theirs")
    third = Net(2)
    ours = torch.optim.AdamW(third.parameters())
    loaded = fxshard.load_checkpoint(tmp_path / "theirs", third, ours)
    assert (loaded.step, loaded.extra) == (0, None)
    assert trained(third, ours)[0] == trained(model, optimizer)[0] or not torch.equal(third.shift, model.shift)
    torch.testing.assert_close(ours.state_dict()["state"][0]["step"], torch.tensor(4.0))


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = Net()
    fxshard.save_checkpoint(tmp_path, model)
    other = nn.Module()
    other.out, other.new = nn.Linear(8, 9), nn.Linear(1, 1, bias=False)
    with pytest.raises(CheckpointError) as caught:
        fxshard.load_checkpoint(tmp_path, other)
    assert (
        str(caught.value)
        == f"""\
the checkpoint {tmp_path}/000001-step-0 is not one of this Module:
  - new.weight is missing
  - scale is not in the model
  - _extra_state is not in the model
  - qkv.weight is not in the model
  - qkv.bias is not in the model
  - out.weight has shape [8, 8], the model's [9, 8]
  - out.bias has shape [8], the model's [9]
  - again.weight is not in the model
  - again.bias is not in the model
  fix     build the model as it was saved"""
    )
    with pytest.raises(CheckpointError, match="has no state of an optimizer:\n  - it was saved without one"):
        fxshard.load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    optimizer = torch.optim.SGD([{"params": model.qkv.parameters()}, {"params": model.out.parameters()}], momentum=0.9)
    fxshard.save_checkpoint(tmp_path, model, optimizer)
    model = Net(1)
    with pytest.raises(CheckpointError) as caught:
        fxshard.load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    assert same(model.state_dict(), Net(1).state_dict()), "nothing was loaded"
    assert (
        str(caught.value)
        == """\
the optimizer's parameter groups are not those of the checkpoint:
  - group 0 of 4 parameters: beside the nearest saved one it has ['out.bias', 'out.weight'] and lacks []
  fix     make the optimizer with the groups that it had when it was saved"""
    )


def test_tied_names_must_be_one_value(tmp_path: Path) -> None:
    untied = Net()
    untied.again = nn.Linear(8, 8).double()
    fxshard.save_checkpoint(tmp_path, untied)
    model = Net(1)
    with pytest.raises(CheckpointError, match="one tensor of the model is two in the checkpoint, and they differ:"):
        fxshard.load_checkpoint(tmp_path, model)
    untied.again.load_state_dict(untied.out.state_dict())
    fxshard.save_checkpoint(tmp_path, untied)
    fxshard.load_checkpoint(tmp_path, model)
    assert same(model.state_dict(), untied.state_dict())


@pytest.mark.parametrize("note", [torch.arange(3), {"a": torch.ones(2), "b": [1, 2]}, {}, "words", [1, {"c": 2.0}]])
def test_extra_state_of_modules(tmp_path: Path, note: Any) -> None:
    model, program = Net(), program_of(Net())
    model.note = note
    fxshard.save_checkpoint(tmp_path, model)
    for other in (Net(), program):
        if note != {}:  # nothing to save, nothing to load
            fxshard.load_checkpoint(tmp_path, other)
            found = other.note if isinstance(other, Net) else other._original.get().note
            assert same({"note": found}, {"note": note}) if not isinstance(note, dict) else same(found, note)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    import random

    model = Net()
    torch.manual_seed(5)
    fxshard.save_checkpoint(tmp_path, model)
    expected = torch.rand(3), random.random()
    fxshard.load_checkpoint(tmp_path, model, random_state=False)
    assert not torch.equal(torch.rand(3), expected[0])
    fxshard.load_checkpoint(tmp_path, model)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


# --- state dicts -----------------------------------------------------------------------------------------------------


def test_load_state_dict_reaches_every_simulated_rank() -> None:
    program, other = program_of(Net()), Net(1)
    other.shift.copy_(program._original.get().shift)
    found = program.load_state_dict(other.state_dict())
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert program._original.get().note == 1
    assert same(program.full_state_dict(), other.state_dict())
    assert same(program.full_state_dict(rank0_only=True), other.state_dict())
    for output in fxshard.simulate(program, X).outputs:
        torch.testing.assert_close(output, other(X))
    assert fxshard.verify(program, X).ok
    with pytest.raises(CheckpointError, match="all ranks are in this process, and need the whole"):
        program.load_state_dict(program.state_dict())
    state = program.full_state_dict()
    assert state["out.weight"] is state["again.weight"], "as in the model's own"
    assert list(state) == list(other.state_dict()) == list(program.full_state_dict(rank0_only=True))


def test_before_the_first_capture_the_model_is_loaded() -> None:
    model, other = Net(), Net(1)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2))
    program.load_state_dict(other.state_dict())
    assert same(model.state_dict(), other.state_dict())
    assert same(program.full_state_dict(), other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        program.load_state_dict({})
    other.shift.copy_(model.shift)
    torch.testing.assert_close(fxshard.simulate(program, X).outputs[1], other(X))


def test_a_state_dict_says_what_its_parts_are(tmp_path: Path) -> None:
    program = program_of(Net())
    state = program.state_dict()
    layouts = state._metadata[""]["fxshard"]
    assert layouts["qkv.weight"].startswith("rank 0 of {tp: 2}, [24, 8] under tp: Shard(0")
    assert "scale" not in layouts
    wrapped = nn.ModuleDict({"inner": program}).state_dict()
    assert wrapped._metadata["inner"]["fxshard"] == layouts
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt")._metadata[""]["fxshard"] == layouts, "weights_only takes it"
    assert copy.deepcopy(state)._metadata[""]["fxshard"] == layouts


# --- the meta device -------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Frequencies that no state dict holds."""

    def __init__(self, fills: bool = True) -> None:
        super().__init__()
        self.fills = fills
        self.register_buffer("steps", torch.empty(8), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.fills:
            self.steps.copy_(torch.arange(8.0))
        else:
            self.steps[:3] = 0


class Small(nn.Module):
    def __init__(self, fills: bool = True) -> None:
        super().__init__()
        self.rotary, self.up, self.down = Rotary(fills), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x * self.rotary.steps).relu())


def on_meta(fills: bool = True) -> fxshard.ParallelModule:
    with torch.device("meta"):
        model = Small(fills)
    return program_of(model)


def test_parts_of_a_meta_model_get_memory(tmp_path: Path) -> None:
    model = Small()
    fxshard.save_checkpoint(tmp_path, model)
    fxshard.save_pretrained(model, tmp_path)
    loads: list[Any] = [
        lambda program: program.load_state_dict(model.state_dict()),
        lambda program: fxshard.load_checkpoint(tmp_path, program),
        lambda program: fxshard.load_pretrained(program, tmp_path),
    ]
    for each in loads:
        program = on_meta()
        with pytest.raises(CheckpointError, match="3 weights are on the meta device and have no values"):
            fxshard.save_checkpoint(tmp_path / "none", program)
        parameters = list(program.parameters())
        assert fxshard.simulate(program, X.to("meta")).outputs[0].is_meta
        each(program)
        assert all(p is q and not p.is_meta for p, q in zip(parameters, program.parameters(), strict=True))
        for output in fxshard.simulate(program, X).outputs:
            torch.testing.assert_close(output, model(X))
        assert all(tensor.is_meta for tensor in program._original.get().state_dict().values())
        assert same(program.full_state_dict(), model.state_dict())


def test_what_would_have_no_value_is_refused() -> None:
    state = Small().state_dict()
    program = on_meta(fills=False)
    with pytest.raises(CheckpointError) as caught:
        program.load_state_dict(state)
    assert (
        str(caught.value)
        == """\
cannot give the weights of Small memory:
  - rotary.steps, a buffer that no state dict holds, is on the meta device: its value is lost
  fix     load a value for every weight; keep other tensors off the meta device when the model is made, or give \
their module a reset_parameters() that fills them"""
    )
    program.load_state_dict({**state, "rotary.steps": torch.arange(8.0, dtype=torch.float64)})
    reference = Small()
    reference.load_state_dict(state)
    torch.testing.assert_close(fxshard.simulate(program, X).outputs[1], reference(X))
    program = on_meta()
    del state["down.weight"]
    with pytest.raises(CheckpointError, match=r"down\.weight is on the meta device, and is not loaded"):
        program.load_state_dict(state, strict=False)
    assert all(p.is_meta for p in program.parameters()), "nothing was loaded"


def test_a_real_buffer_among_meta_ones_is_kept() -> None:
    model = Small(fills=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.up.to("meta")
    model.down.to("meta")
    program = program_of(model)
    program.load_state_dict(state)
    assert torch.equal(program.rank_module(1).rotary.steps, model.rotary.steps)


class Plain(nn.Module):
    """A tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(8, 8).double(), torch.ones(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.shift


def test_a_lost_constant_is_refused() -> None:
    with torch.device("meta"):
        model = Plain()
    program = program_of(model)
    with pytest.raises(CheckpointError, match="shift, neither a parameter nor a buffer, is on the meta device"):
        program.load_state_dict(Plain().state_dict())


def test_a_llama_on_meta_makes_its_own_frequencies() -> None:
    model, _ = build("llama", torch.float32, num_hidden_layers=1)
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    inputs = {"input_ids": ids(), "use_cache": False}
    program = fxshard.parallelize(empty, fxshard.tensor_parallel(2), (), inputs)
    program.load_state_dict(model.state_dict())
    torch.testing.assert_close(fxshard.simulate(program, **inputs).outputs[0].logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda w: w.to("meta"), "is on the meta device, and has no values"),
        (lambda w: w.to_sparse(), "is torch.sparse_coo, not a tensor of plain numbers"),
        (lambda w: torch.complex(w, w), "is complex, and must be torch.float32"),
    ],
)
def test_tensors_that_no_weight_can_take_change_nothing(made: Any, said: str) -> None:
    program = fxshard.parallelize(nn.Linear(4, 4), fxshard.tensor_parallel(2), (torch.randn(2, 4),))
    before = program.full_state_dict()
    with pytest.raises(CheckpointError, match=said):
        program.load_state_dict({"bias": torch.ones(4), "weight": made(torch.ones(4, 4))})
    after = program.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
