"""What ranks run to show what they hold under ``zero``: by the tensors, and by the memory of the process."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist

import fxshard
from fxshard.runtime.regather import Regather
from tests.models.zoo import transformers

MIB = 2**20
STEPS = 3


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def give_back() -> None:
    """Has the C library give back memory when it is freed: else the process keeps what it may need again."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)


M_MMAP_THRESHOLD = -3


def reset_peak() -> int:
    """Forgets the peak so far; the memory that the process has now."""
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")
    return peak_bytes()


def llama() -> tuple[torch.nn.Module, dict[str, Any]]:
    """52 million parameters in 8 layers; little of it in one matrix."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = torch.randint(0, 1024, (4, 16), generator=torch.Generator().manual_seed(1))
    return transformers.LlamaForCausalLM(config), {"input_ids": batch, "labels": batch, "use_cache": False}


def step(module: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> None:
    module(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def held_by(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters and optimizer states."""
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.nbytes for t in [*module.parameters(), *states])


def of_one_device() -> tuple[int, int]:
    """Bytes of parameters and optimizer states of one device, and by how much its memory grew at the most."""
    give_back()
    model, inputs = llama()
    size = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    before = reset_peak() - size
    for _ in range(STEPS):
        step(model, optimizer, inputs)
    return held_by(model, optimizer), peak_bytes() - before


def under_zero(results: Any) -> None:
    """The same of a rank; what it holds includes the weights that are gathered at a time."""
    give_back()
    model, inputs = llama()
    program = fxshard.parallelize(model, fxshard.zero(dist.get_world_size()), (), inputs)
    del model  # a rank needs its parts only
    optimizer = torch.optim.AdamW(program.parameters())
    size = sum(p.nbytes for p in program.parameters())
    alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
    most = 0
    note = Regather.note

    def noting(self: Regather, whole: torch.Tensor, *args: Any) -> None:
        nonlocal most
        alive[id(whole)] = weakref.ref(whole)  # type: ignore[assignment]
        living = [ref() for ref in alive.values()]
        most = max(most, sum(t.nbytes for t in living if t is not None))  # type: ignore[attr-defined]
        note(self, whole, *args)

    Regather.note = noting  # type: ignore[method-assign]
    program(**inputs)  # groups and buffers of the backend exist
    before = reset_peak() - size
    for _ in range(STEPS):
        step(program, optimizer, inputs)
    held, grown = held_by(program, optimizer) + most, peak_bytes() - before
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (held, most, grown))
    if dist.get_rank() == 0:
        results.put(every)
