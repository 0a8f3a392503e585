"""Trains a small GPT-2 on real text, on any mesh, and goes on where it was stopped.

    python examples/train.py                                                     one process
    torchrun --nproc-per-node 4 examples/train.py --plan "zero2 tp2"             four ranks
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 4 --max-restarts 3 examples/train.py --plan dp4

The text is the help that comes with Python, byte by byte. A checkpoint of one plan may be resumed under another: the
losses go on as if nothing had happened. (The variable above has torchrun make a new store for every restart; with the
old one ranks may meet those of the last start.)
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxshard

PRESETS = {
    "dp": fxshard.data_parallel,
    "zero": fxshard.zero,
    "tp": fxshard.tensor_parallel,
    "sp": fxshard.sequence_parallel,
    "cp": fxshard.context_parallel,
    "ring": functools.partial(fxshard.context_parallel, method="ring"),
}
BYTES = 256


class LanguageModel(nn.Module):
    """A GPT-2 that gives its loss: so no rank needs the scores of all bytes."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=BYTES, n_positions=length, n_embd=width, n_layer=layers, n_head=8, bos_token_id=0,
            eos_token_id=0, use_cache=False,
        )  # fmt: skip
        self.gpt2 = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets: i64[batch, length]; the mean loss of a byte."""
        logits = self.gpt2(ids).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def read_plan(text: str) -> fxshard.Plan:
    """The plan of ``"zero2 tp2"``: presets and their sizes, the outermost axis first."""
    found = [re.fullmatch(r"([a-z]+)(\d+)", word) for word in text.split()]
    if not found or any(match is None or match[1] not in PRESETS for match in found):
        raise typer.BadParameter(f"cannot read the plan {text!r}: give presets and sizes, of {', '.join(PRESETS)}")
    return functools.reduce(lambda a, b: a | b, (PRESETS[match[1]](int(match[2])) for match in found if match))


def start_process() -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's device."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return device


def batches(count: int, length: int, step: int, device: torch.device, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same on every rank: i64[count, length], and what follows each byte."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    part = text[cut:] if held_out else text[:cut]
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(part) - length, (count,), generator=generator).tolist()
    rows = torch.stack([part[start : start + length + 1] for start in starts])
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def rate(step: int, steps: int, warmup: int = 20) -> float:
    """The part of the learning rate at a step: rising, then falling along a cosine."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


def show(first: int, steps: int, is_first_rank: bool) -> Iterator[Any]:
    """A function that shows the progress of each step, on rank 0: a bar on a terminal, else lines."""
    console = Console()
    if not is_first_rank:
        yield lambda step, text: None
    elif not console.is_terminal:
        yield lambda step, text: print(f"step {step:5}  {text}", flush=True)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=steps, completed=first)
            yield lambda step, text: progress.update(task, completed=step, description=text)


def train(
    plan: Annotated[str, typer.Option(help="presets and sizes, e.g. 'dp2 tp2'; default: dp over all processes")] = "",
    steps: int = 200,
    batch: int = 16,
    accumulate: Annotated[int, typer.Option(help="batches that make a step")] = 1,
    length: int = 128,
    width: int = 128,
    layers: int = 4,
    learning_rate: float = 1e-3,
    clip: float = 1.0,
    folder: Annotated[Path, typer.Option(help="where checkpoints are, and the trained model at the end")] = Path("run"),
    save_every: int = 50,
    bf16: Annotated[bool, typer.Option(help="compute in bfloat16, weights in float32")] = False,
    checkpoint: Annotated[bool, typer.Option(help="compute layers anew in the backward pass")] = False,
    verify: Annotated[bool, typer.Option(help="hold a checkpoint against its checksums when it is loaded")] = True,
) -> None:
    """Trains, saves and resumes."""
    device = start_process()
    world = dist.get_world_size() if dist.is_initialized() else 1
    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    torch.manual_seed(0)  # the same weights on every rank
    model = LanguageModel(width, layers, length).to(device)
    anew = "gpt2.transformer.h.*" if checkpoint else ()
    asked = read_plan(plan or f"dp{world}")
    example = batches(batch, length, 0, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        program = fxshard.parallelize(model, asked, example, checkpoint=anew)
    del model  # this rank needs its parts only
    optimizer = torch.optim.AdamW(program.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    first = 0
    if fxshard.latest_checkpoint(folder):
        found = fxshard.load_checkpoint(folder, program, optimizer, verify=verify)
        first = found.step
        schedule.load_state_dict(found.extra["schedule"])

    def loss_of(step: int, held_out: bool = False) -> Tensor:
        ids, targets = batches(batch, length, step, device, held_out)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss: Tensor = program(ids, targets)
        return loss

    for report in show(first, steps, is_first_rank):
        for step in range(first, steps):
            start, total = time.perf_counter(), 0.0
            with program.no_sync():
                for inner in range(accumulate - 1):
                    part = loss_of(step * accumulate + inner) / accumulate
                    part.backward()
                    total += part.item()
            part = loss_of((step + 1) * accumulate - 1) / accumulate
            part.backward()
            norm = fxshard.clip_grad_norm_(program, clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += part.item()
            speed = batch * accumulate * length / (time.perf_counter() - start)
            report(step + 1, f"loss {total:.6f}  norm {norm.item():.4f}  {speed:,.0f} tokens/s")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                extra = {"schedule": schedule.state_dict()}
                fxshard.save_checkpoint(folder, program, optimizer, step=step + 1, extra=extra)
    program.eval()
    with torch.no_grad():
        held_out = loss_of(0, held_out=True).item()
    fxshard.save_pretrained(program, folder / "trained")
    if is_first_rank:
        print(f"trained for {steps} steps on {world} processes; loss on text that it has not seen: {held_out:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(train)
