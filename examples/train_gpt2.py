"""Trains a small GPT-2 with its weights split over two ranks, beside the same training on one device.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt2.py

The model is the unmodified ``GPT2LMHeadModel`` of transformers, and what it reads is this file, byte by byte. The
optimizer is torch's AdamW: what the program shows it are plain local tensors. Dropout is on: the ranks draw what one
device would draw.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxshard

STEPS, BATCH, LENGTH = 20, 8, 32
TOLERANCE = 1e-4


def start_process() -> torch.device:
    """Joins the process group that torchrun prepared; returns this process's device."""
    if not dist.is_torchelastic_launched():
        sys.exit("start this with: torchrun --standalone --nproc-per-node 2 examples/train_gpt2.py")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < local_size:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def batches(device: torch.device) -> list[Tensor]:
    """Pieces of this file, each byte a token. STEPS x i64[BATCH, LENGTH], the same on every rank."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - LENGTH, (STEPS, BATCH), generator=generator)
    return [torch.stack([text[s : s + LENGTH] for s in step]).to(device) for step in starts.tolist()]


def train(model: Callable[..., Any], parameters: list[nn.Parameter], data: list[Tensor]) -> list[float]:
    """The training loop; it does not know whether ``model`` is sharded."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for ids in data:
        logits = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    device = start_process()
    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4},
        **{"bos_token_id": 0, "eos_token_id": 0},
        use_cache=False,  # a cache would be one more output, gathered for nobody
    )
    model = GPT2LMHeadModel(config).to(device).train()
    single = copy.deepcopy(model)
    data = batches(device)

    plan = fxshard.tensor_parallel(dist.get_world_size())
    program = fxshard.parallelize(model, plan, kwargs={"input_ids": data[0]})
    sharded_losses = train(program, list(program.parameters()), data)
    single_losses = train(single, list(single.parameters()), data)

    trained = program.full_state_dict()  # collective: every rank calls it
    drift = max((trained[name] - p).abs().max().item() for name, p in single.state_dict().items())
    worst = max(abs(a - b) for a, b in zip(sharded_losses, single_losses, strict=True))
    equal = worst <= TOLERANCE

    if dist.get_rank() == 0:
        whole, local = (sum(p.numel() for p in m.parameters()) for m in (single, program))
        print(f"GPT-2, {whole:,} parameters, {local:,} on each of {dist.get_world_size()} ranks", end="")
        print(f" ({dist.get_backend()}, {device.type}); dropout {config.resid_pdrop}; {STEPS} steps of AdamW\n")
        rows = list(enumerate(zip(single_losses, sharded_losses, strict=True)))
        shown = [(i, a, b, f"{abs(a - b):.0e}") for i, (a, b) in rows if i % 4 == 0 or i == STEPS - 1]
        headers = ("step", "one device", "sharded", "difference")
        print(tabulate(shown, headers=headers, floatfmt=".6f", disable_numparse=[3]))
        print(f"\nlargest difference of a loss    {worst:.0e}   (allowed: {TOLERANCE:.0e})")
        print(f"largest difference of a weight  {drift:.0e}")
        print("the same training" if equal else "DIFFERENT training")
    dist.destroy_process_group()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
