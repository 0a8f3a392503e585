"""Trains a small Llama with the ``Trainer`` of transformers, and goes on from a checkpoint of it.

    python examples/hf_trainer.py                                                       the model, on one device
    torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py                     a program of it, on two ranks
    torchrun --standalone --nproc-per-node 4 examples/hf_trainer.py --plan "dp2 tp2"    on four

Both print the same losses: the trainer accumulates two batches a step, clips the gradient, and counts the targets of
the whole step, which differ from row to row. Then a second trainer goes on from the checkpoint of the middle.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import fxshard
from fxshard.integrations.transformers import Trainer

PRESETS = {
    "dp": fxshard.data_parallel,
    "zero": fxshard.zero,
    "tp": fxshard.tensor_parallel,
    "sp": fxshard.sequence_parallel,
}


def read_plan(text: str) -> fxshard.Plan:
    """The plan of ``"dp2 tp2"``."""
    found = re.findall(r"([a-z]+)(\d+)", text)
    return functools.reduce(lambda a, b: a | b, (PRESETS[name](int(size)) for name, size in found))


def make_model(seed: int) -> LlamaForCausalLM:
    """The same on every rank."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_rows(count: int, seed: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards in steps of their own; the first few tokens of each are no targets."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        first, step, given = torch.randint(1, 8, (3,), generator=generator).tolist()
        ids = (first + step * torch.arange(length)) % 256
        out.append({"input_ids": ids, "labels": ids.where(torch.arange(length) >= given, -100)})
    return out


def make_trainer(plan: str, folder: Path, steps: int, seed: int) -> transformers.Trainer:
    """fxshard's trainer over a program where torchrun started this, else that of transformers over the model."""
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=steps,
        max_grad_norm=1.0, learning_rate=3e-3, warmup_steps=2, lr_scheduler_type="cosine", logging_steps=1,
        save_steps=steps // 2, use_cpu=not torch.cuda.is_available(), dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(), disable_tqdm=True, log_level="error", report_to=[],
    )  # fmt: skip
    data = {"train_dataset": make_rows(64, 0), "eval_dataset": make_rows(16, 1)}
    model = make_model(seed).to(args.device)
    if not dist.is_torchelastic_launched():
        trainer = transformers.Trainer(model, args, **data)
    else:
        trainer = Trainer(fxshard.parallelize(model, read_plan(plan)), args, **data)
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def losses_of(trainer: transformers.Trainer) -> dict[int, Any]:
    """By step, what was logged of it."""
    return {each["step"]: each for each in trainer.state.log_history if "loss" in each}


def main(
    plan: Annotated[str, typer.Option(help="presets and sizes, the outermost axis first")] = "tp2",
    steps: Annotated[int, typer.Option(help="how many; saved in the middle and at the end")] = 8,
    folder: Annotated[Path, typer.Option(help="where checkpoints are")] = Path("run"),
) -> None:
    """Trains, and once more the second half."""
    transformers.utils.logging.disable_progress_bar()
    trainer = make_trainer(plan, folder, steps, seed=0)
    trainer.train()
    held_out = trainer.evaluate()["eval_loss"]
    again = make_trainer(plan, folder, steps, seed=1)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps // 2}"))
    first, second = losses_of(trainer), losses_of(again)
    if trainer.is_world_process_zero():
        for step, logged in first.items():
            resumed = f"  resumed {second[step]['loss']:.6f}" if step > steps // 2 else ""
            print(f"step {step}  loss {logged['loss']:.6f}  norm {logged['grad_norm']:.6f}{resumed}")
        where = f"{plan}, {dist.get_world_size()} processes" if dist.is_initialized() else "one device"
        print(f"loss on rows that it has not seen: {held_out:.6f} ({where})")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
