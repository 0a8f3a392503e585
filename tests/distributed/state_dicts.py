"""What the spawned processes of the state dict tests run: two or four ranks of small programs."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fxshard
from fxshard.errors import CheckpointError, DistributedError, InputError
from fxshard.placement import BlockShard
from fxshard.weights.checkpoint_parts import BlockTensor
from tests.models.zoo import build, ids

PLAN = {
    "packed": {"dp": BlockShard(0, (2, 1, 1)), "tp": Shard(0)},
    "both": {"dp": Shard(1), "tp": Shard(1)},
    "odd": {"tp": BlockShard(0, shares=(2, 1))},
    "heads": {"tp": BlockShard(0, shares=(3, 1))},
}


class Several(nn.Module):
    """Weights that are cut in every way: two axes on one dim, blocks, as torch.chunk cuts, and not so."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.packed = nn.Parameter(torch.randn(32, 3))
        self.both = nn.Parameter(torch.randn(3, 8))
        self.odd = nn.Parameter(torch.randn(3, 3))
        self.heads = nn.Parameter(torch.randn(8, 3))
        self.whole = nn.Parameter(torch.randn(3))
        self.tied = self.whole
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = (self.packed.sum(0), self.both.sum(1), self.odd.sum(0), self.heads.sum(0), self.whole * self.tied)
        return x * torch.stack(used).sum(0) + self.count


def several(seed: int = 0) -> tuple[Several, fxshard.ParallelModule]:
    model = Several(seed)
    return model, fxshard.parallelize(model, PLAN, (torch.ones(2, 3),), mesh={"dp": 2, "tp": 2})


def assert_equal(program: fxshard.ParallelModule, model: nn.Module) -> None:
    state = program.full_state_dict()
    assert list(state) == list(model.state_dict())
    assert [n for n, t in model.state_dict().items() if not torch.equal(state[n], t)] == []


def every_kind(folder: str) -> None:
    """Four ranks: sharded state dicts, all that load_state_dict takes and refuses, and optimizers."""
    model, program = several()
    sharded_tensors(model, program, folder)
    loads(program)
    refusals(program)
    streams(Several(), program)
    different_seeds()
    optimizers(folder)


def sharded_tensors(model: nn.Module, program: fxshard.ParallelModule, folder: str) -> None:
    state = program.sharded_state_dict()
    assert list(state) == list(model.state_dict())
    kinds = {name: type(tensor) for name, tensor in state.items()}
    blocks = {"packed", "heads"}
    assert kinds == {name: BlockTensor if name in blocks else DTensor for name in state}
    assert state["both"].placements == (Shard(1), Shard(1))
    assert state["odd"].placements == (Replicate(), Shard(0))
    for name, tensor in state.items():
        assert torch.equal(tensor.full_tensor(), model.state_dict()[name]), name
        assert tensor.to_local().data_ptr() == program.rank_module(dist.get_rank()).state_dict()[name].data_ptr()
    save(state, checkpoint_id=folder)
    other, another = several(1)
    load(another.sharded_state_dict(), checkpoint_id=folder)
    assert_equal(another, model)
    plain = {name: torch.empty_like(tensor) for name, tensor in other.state_dict().items()}
    load(plain, checkpoint_id=folder)
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
    tensor = state["packed"]
    assert isinstance(copy.deepcopy(tensor), BlockTensor)
    assert torch.equal(tensor.clone().full_tensor(), tensor.full_tensor())
    with pytest.raises(CheckpointError, match="parts that no DTensor expresses"):
        tensor + 1


def loads(program: fxshard.ParallelModule) -> None:
    first, second = Several(2), Several(3)
    assert str(program.load_state_dict(first.state_dict())) == "<All keys matched successfully>"
    assert_equal(program, first)
    kept = copy.deepcopy(program.state_dict())
    program.load_state_dict(second.state_dict())
    program.load_state_dict(kept)
    assert_equal(program, first)
    with torch.no_grad():
        program.load_state_dict(program.sharded_state_dict())  # onto itself
    assert_equal(program, first)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    elsewhere = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in second.state_dict().items()}
    program.load_state_dict(elsewhere)
    assert_equal(program, second)
    partly = {"odd": first.odd, "strange": torch.ones(1)}
    found = program.load_state_dict(partly, strict=False)
    assert found.unexpected_keys == ["strange"]
    assert found.missing_keys == ["packed", "both", "heads", "whole", "tied", "count"]
    second.odd = first.odd
    assert_equal(program, second)


def different_seeds() -> None:
    """Ranks that started from different weights are refused, unless they load the same ones."""
    _, program = several(dist.get_rank())
    program.load_state_dict(Several(dist.get_rank()).state_dict())
    with pytest.raises(DistributedError, match="different weights: 6 tensors differ"):
        program(torch.ones(2, 3))
    program.load_state_dict(Several(5).state_dict())
    program(torch.ones(2, 3))
    assert_equal(program, Several(5))


def refusals(program: fxshard.ParallelModule) -> None:
    """All that is wrong, on all ranks, and nothing is loaded."""
    before = copy.deepcopy(program.state_dict())
    rank = dist.get_rank()
    state: dict[str, Any] = dict(Several(4).state_dict())
    del state["odd"]
    state |= {"strange": torch.ones(1), "both": torch.ones(8, 3), "whole": 3.0}
    with pytest.raises(CheckpointError) as caught:
        program.load_state_dict(state)
    assert (
        str(caught.value)
        == """\
cannot load the state dict into Several:
  - both has shape [8, 3], and must have [3, 8]
  - whole is a float, not a tensor
  - odd is missing
  - strange is not in the model
  fix     give a state dict of this model: whole tensors, DTensors, or what this rank's program.state_dict() returned"""
    )
    state = dict(Several(4).state_dict())
    if rank == 1:
        state["both"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"both has shape \[1\]"):  # of one rank is of all
        program.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"packed has the shape \[8, 3\] of a part, and does not say of what"):
        program.load_state_dict(dict(program.state_dict()))
    with pytest.raises(CheckpointError, match="whole and tied are one tensor of the model, and differ"):
        program.load_state_dict(Several(4).state_dict() | {"tied": torch.ones(3)})
    with pytest.raises(CheckpointError, match="the ranks give DTensors under different names"):
        program.load_state_dict({"both": program.sharded_state_dict()["both"]} if rank else {}, strict=False)
    with pytest.raises(CheckpointError, match="cannot be assigned"):
        program.load_state_dict(state, assign=True)
    for other in (several_as({"packed": {"dp": Shard(0), "tp": Shard(0)}}), several_as(PLAN)):
        given = other.state_dict()
        if other.plan == program.plan:
            every: list[Any] = [None] * 4
            dist.all_gather_object(every, (given, given._metadata))
            given = OrderedDict(every[(rank + 1) % 4][0])
            given._metadata = every[(rank + 1) % 4][1]
        with pytest.raises(CheckpointError, match=r"packed is the part of rank .*; here it is the part of rank"):
            program.load_state_dict(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def several_as(plan: Any) -> fxshard.ParallelModule:
    return fxshard.parallelize(Several(), plan, (torch.ones(2, 3),), mesh={"dp": 2, "tp": 2})


class Largest(TorchDispatchMode):
    """The most elements that any tensor had for which memory was taken inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and not out.is_meta and out.untyped_storage().data_ptr() not in given:
            self.numel = max(self.numel, out.numel())
        return out


def streams(model: nn.Module, program: fxshard.ParallelModule) -> None:
    """The whole state dict on rank 0 alone; the others hold their parts and nothing larger."""
    program.load_state_dict(model.state_dict())
    with Largest() as made:
        state = program.full_state_dict(rank0_only=True)
    if dist.get_rank() == 0:
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert state["whole"] is state["tied"]
        assert made.numel == model.packed.numel()
    else:
        assert state == {}
        assert made.numel <= max(p.numel() for p in program.parameters()) < model.packed.numel()


class Counting(torch.optim.SGD):
    """A number of its own on every rank."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rank"] = dist.get_rank()
        return super().step(closure)


def optimizers(folder: str) -> None:
    """What an optimizer may keep, and what no other mesh could take."""
    _, program = several()
    state = program.sharded_optimizer_state_dict(torch.optim.AdamW(program.parameters()))
    assert state["state"] == {}
    assert state["param_groups"][0]["params"] == ["packed", "both", "odd", "heads", "whole"]
    for make in (torch.optim.Adafactor, Counting, lambda p: torch.optim.LBFGS(p, max_iter=2)):
        optimizer = make(program.parameters())

        def closure(optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = program(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        if not isinstance(optimizer, Counting):
            with pytest.raises(InputError, match="whole_matrix"):
                optimizer.step(closure)
            continue
        optimizer.step(closure)
        with pytest.raises(CheckpointError, match="rank of packed is not the same on all ranks"):
            fxshard.save_checkpoint(folder, program, optimizer)
    strange = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(CheckpointError, match=r"not those of the model:\n  - a parameter of shape \[2, 2\]"):
        fxshard.save_checkpoint(folder, program, strange)
    every_optimizer(program, folder)


KINDS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "tensor_lr": lambda p: torch.optim.Adam(p, torch.tensor(0.1), foreach=False),
}


def step(trained: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    trained(torch.arange(6.0).view(2, 3)).square().mean().backward()
    optimizer.step()


def every_optimizer(program: fxshard.ParallelModule, folder: str) -> None:
    """A step, saved, loaded into another optimizer, a step: the weights are one device's after two steps."""
    for kind, make in KINDS.items():
        reference = Several()
        program.load_state_dict(reference.state_dict())
        optimizers = make(reference.parameters()), make(program.parameters())
        for trained, optimizer in zip((reference, program), optimizers, strict=True):
            step(trained, optimizer)
        fxshard.save_checkpoint(f"{folder}/{kind}", program, optimizers[1])
        program.load_state_dict(Several(9).state_dict())
        loaded = make(program.parameters())
        fxshard.load_checkpoint(f"{folder}/{kind}", program, loaded)
        step(program, loaded)
        step(reference, optimizers[0])
        for name, whole in program.full_state_dict().items():
            torch.testing.assert_close(whole, reference.state_dict()[name], msg=lambda m, at=(kind, name): f"{at}: {m}")


class Spy:
    """A file of safetensors that notes how many elements are read of it."""

    def __init__(self, read: list[int], *args: Any, **kwargs: Any) -> None:
        self.read, self.file = read, safe_open(*args, **kwargs)

    def __enter__(self) -> Spy:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> Any:
        return SpySlice(self.read, self.file.get_slice(name))


class SpySlice:
    def __init__(self, read: list[int], stored: Any) -> None:
        self.read, self.stored, self.get_shape = read, stored, stored.get_shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        out: torch.Tensor = self.stored[index]
        self.read.append(out.numel())
        return out


def pretrained(folder: str) -> None:
    """Two ranks: a transformers model out and in, on the meta device too."""
    from transformers import GPT2LMHeadModel

    model, _ = build("gpt2", torch.float32, n_layer=1)
    inputs = {"input_ids": ids(), "use_cache": False}
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxshard.save_pretrained(program, folder)
        opened = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    with torch.device("meta"):
        empty = GPT2LMHeadModel(model.config).eval()
    loaded = fxshard.parallelize(empty, fxshard.tensor_parallel(2), (), inputs)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    largest = max(p.numel() for p in loaded.parameters())
    read: list[int] = []
    with Largest() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxshard.checkpoint.pretrained.safe_open", lambda *args, **kwargs: Spy(read, *args, **kwargs))
        fxshard.load_pretrained(loaded, folder)
    assert 0 < made.numel <= largest
    assert max(read) <= largest
    assert sum(read) == sum(p.numel() for p in loaded.parameters()), "a rank reads its part"
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    loaded(**inputs).logits.square().mean().backward()
    before = loaded.full_state_dict()
    optimizer.step()
    assert any(not torch.equal(before[name], t) for name, t in loaded.full_state_dict().items()), "its own parameters"
    going_on_from_meta(program, folder, inputs)
    for path in Path(folder).glob("*.safetensors"):
        assert path.stat().st_size < 1.1 * sum(p.numel() * 4 for p in model.parameters()), "tied weights once"


def going_on_from_meta(program: fxshard.ParallelModule, folder: str, inputs: dict[str, Any]) -> None:
    """A run goes on in a program whose weights, and whose optimizer, had no memory."""
    with torch.device("meta"):
        empty = type(program._original.get())(program._original.get().config).eval()
    loaded = fxshard.parallelize(empty, fxshard.tensor_parallel(2), (), inputs)
    results = []
    for trained in (program, loaded):
        optimizer = torch.optim.AdamW(trained.parameters(), 0.1)
        if trained is loaded:
            fxshard.load_checkpoint(f"{folder}/run", loaded, optimizer)
        for _ in range(2 if trained is program else 1):
            if trained is program:
                fxshard.save_checkpoint(f"{folder}/run", program, optimizer)
            optimizer.zero_grad()
            trained(**inputs).logits.square().mean().backward()
            optimizer.step()
        results.append(trained.full_state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
