"""What tests of other libraries' loops run: on one device the model, on real ranks a program of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState

import fxshard
from fxshard.errors import CheckpointError, FxshardError
from fxshard.integrations.transformers import Trainer
from tests.presets import preset

VOCABULARY = 64
METRICS = ("eval_loss", "eval_accuracy", "eval_rows")


def rows(count: int, seed: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sentences of noise, whose first tokens are no targets: of each row another number."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i, ids in enumerate(torch.randint(5, VOCABULARY, (count, length), generator=generator)):
        labels = ids.clone()
        labels[: i % 5 + 1] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


def llama(seed: int = 0, dropout: float = 0.0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False, attention_dropout=dropout,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """22 rows in batches of 4, two a step: the last step of an epoch has a batch of 4 and one of 2."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6,
        "per_device_eval_batch_size": 4, "max_grad_norm": 0.5, "learning_rate": 1e-2, "warmup_steps": 2,
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "seed": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "log_level": "error",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**chosen, **changes})


def accuracy(found: transformers.EvalPrediction) -> dict[str, float]:
    """Of the next token, and the number of rows, which must not grow with the number of ranks."""
    labels, best = found.label_ids[:, 1:], np.argmax(found.predictions[:, :-1], -1)
    return {"accuracy": float((labels == best)[labels != -100].mean()), "rows": len(labels)}


def make_trainer(
    plan: str | None, folder: Path, seed: int = 0, dropout: float = 0.0, **changes: Any
) -> transformers.Trainer:
    """The trainer of transformers over the model where there is no plan, else fxshard's over a program."""
    model: Any = llama(seed, dropout)
    cls = transformers.Trainer
    if plan is not None:
        model, cls = fxshard.parallelize(model, preset(plan)), Trainer
    callbacks = changes.pop("callbacks", None)
    args = arguments(folder, **changes)
    return cls(model, args, train_dataset=rows(22, 0), eval_dataset=rows(10, 1), compute_metrics=accuracy,
               callbacks=callbacks)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    steps: dict[int, tuple[float, float, float]]
    """By step: the loss, the norm of the gradient, the learning rate."""
    flos: float
    metrics: dict[str, float]
    predictions: np.ndarray[Any, Any]
    weights: dict[str, torch.Tensor]


def run(trainer: transformers.Trainer, resume: str | None = None) -> Outcome:
    """Trains, evaluates and predicts."""
    trainer.train(resume_from_checkpoint=resume)
    steps = {
        each["step"]: (each["loss"], each["grad_norm"], each["learning_rate"])
        for each in trainer.state.log_history
        if "loss" in each
    }
    if resume:  # the history begins with what was loaded
        steps = {step: found for step, found in steps.items() if step > trainer._initial_global_step}
    metrics = {name: value for name, value in trainer.evaluate().items() if name in METRICS}
    predicted = trainer.predict(rows(7, 2))
    model: Any = trainer.model
    weights = model.full_state_dict() if isinstance(model, fxshard.ParallelModule) else model.state_dict()
    flos = trainer.state.total_flos
    return Outcome(steps, flos, metrics, predicted.predictions, {k: v.detach().clone() for k, v in weights.items()})


def compare(found: Outcome, expected: Outcome) -> None:
    """Raises where two trainings differ by more than rounding."""
    steps = [step for step in expected.steps if step in found.steps]
    assert steps
    for step in steps:
        np.testing.assert_allclose(found.steps[step], expected.steps[step], rtol=2e-5, err_msg=f"step {step}")
    assert found.flos == expected.flos
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(found.predictions, expected.predictions, atol=2e-4)
    assert list(found.weights) == list(expected.weights)
    for name, value in expected.weights.items():
        error = (found.weights[name] - value).abs().max().item()
        assert error < 1e-4, f"{name} differs by {error}"


@contextmanager
def under_torchrun() -> Iterator[None]:
    """What torchrun says in the environment, for a rank that ``launch`` started."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update(names, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# --- what ranks run --------------------------------------------------------------------------------------------------


def follows_one_device(plans: list[str], folder: Path, expected: Outcome, **changes: Any) -> None:
    """Losses, norms, rates, metrics, predictions and weights are those of one device."""
    with under_torchrun():
        for plan in plans:
            found = run(make_trainer(plan, folder / plan, **changes))
            assert list(found.steps) == list(expected.steps)
            compare(found, expected)


def is_interrupted(plan: str, folder: Path, expected: Outcome, **changes: Any) -> None:
    """Trains to the end, and saves on the way."""
    with under_torchrun():
        compare(run(make_trainer(plan, folder, save_strategy="steps", save_steps=2, **changes)), expected)


def goes_on(plan: str, folder: Path, checkpoint: Path, expected: Outcome, **changes: Any) -> None:
    """Goes on from a checkpoint as if nothing had happened, over a model that began otherwise."""
    with under_torchrun():
        found = run(make_trainer(plan, folder, seed=5, **changes), str(checkpoint))
        assert list(found.steps) == list(expected.steps)[int(checkpoint.name.split("-")[1]) :]
        compare(found, expected)


def refuses(folder: Path) -> None:
    """Optimizers that look at whole weights, and checkpoints without the state of an optimizer."""
    with under_torchrun():
        with pytest.raises(
            FxshardError, match=r"optim='adafactor' .* and \d+ weights lie in parts, first model\.embed"
        ):
            make_trainer("tp2", folder, optim="adafactor").train()
        trainer = make_trainer(
            "tp2", folder / "only", save_strategy="steps", save_steps=2, save_only_model=True, max_steps=2
        )
        trainer.train()
        dist.barrier()
        assert not (folder / "only" / "checkpoint-2" / "fxshard").exists()
        with pytest.raises(CheckpointError, match="has weights, and no state of an optimizer") as caught:
            make_trainer("tp2", folder / "only").train(resume_from_checkpoint=True)
        assert "fxshard.load_pretrained" in str(caught.value.fix)


def best_is_loaded(folder: Path) -> None:
    """The best checkpoint's weights are loaded at the end; of the others, rank 0 keeps as many as it should."""
    each = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    with under_torchrun():
        trainer = make_trainer("zero2", folder, **each, **best)
        trainer.train()
        logged = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
        assert logged[-1] > min(logged), "the last is the best"
        np.testing.assert_allclose(trainer.evaluate()["eval_loss"], min(logged), rtol=1e-5)
        dist.barrier()
        assert len([path for path in folder.iterdir() if path.name.startswith("checkpoint-")]) == 1


def draws_alike(folder: Path) -> None:
    """Rows that are drawn anew each time are the same on all ranks, whatever a rank drew; so are workers' seeds."""
    with under_torchrun():
        trainer = make_trainer("dp2", folder, max_steps=3)
        trainer.train_dataset = Noise()
        trainer.model.options = dataclasses.replace(trainer.model.options, compare="every_call")
        trainer.add_callback(Draws())
        trainer.train()
        loader = make_trainer("dp2", folder, dataloader_num_workers=1).get_train_dataloader()
        assert loader.base_dataloader.worker_init_fn.keywords == {"num_workers": 1, "rank": 0}


class Noise(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, VOCABULARY, (12,))
        return {"input_ids": ids, "labels": ids}


class Draws(transformers.TrainerCallback):
    """Other ranks draw more than rank 0."""

    def on_step_end(self, *args: Any, **options: Any) -> None:
        torch.rand(dist.get_rank())
