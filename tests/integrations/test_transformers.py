"""The trainer of transformers trains programs as it trains their models on one device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import fxshard
from fxshard.errors import DistributedError, FxshardError
from fxshard.integrations.transformers import Trainer
from tests.distributed.launch import launch
from tests.integrations import training

PLANS = ("tp2", "dp2", "sp2", "zero2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> training.Outcome:
    """What one device makes of it."""
    return training.run(training.make_trainer(None, tmp_path_factory.mktemp("one")))


@pytest.mark.slow
def test_training_on_two_ranks(tmp_path: Path, expected: training.Outcome) -> None:
    assert expected.steps[6][0] < expected.steps[1][0] - 0.1, "it learns nothing"
    assert all(norm > 0.5 for _, norm, _ in expected.steps.values()), "nothing is clipped"
    launch(2, training.follows_one_device, list(PLANS), tmp_path, expected)


@pytest.mark.slow
def test_training_goes_on_under_another_plan(tmp_path: Path) -> None:
    """With dropout, so that the random state counts; from the middle of an epoch, and on one device too."""
    dropout: dict[str, Any] = {"dropout": 0.2}
    single = training.run(training.make_trainer(None, tmp_path / "one", **dropout))
    launch(2, _saves_and_goes_on, tmp_path, single, dropout)
    check_files(tmp_path / "tp2" / "checkpoint-4")
    last = tmp_path / "tp2" / "checkpoint-4"
    found = training.run(training.make_trainer("dp1", tmp_path / "again", seed=5, **dropout), str(last))
    assert list(found.steps) == [5, 6]
    training.compare(found, single)


def _saves_and_goes_on(folder: Path, single: training.Outcome, dropout: dict[str, Any]) -> None:
    training.is_interrupted("tp2", folder / "tp2", single, **dropout)
    training.goes_on("tp2", folder / "same", folder / "tp2" / "checkpoint-2", single, **dropout)
    training.goes_on("zero2", folder / "other", folder / "tp2" / "checkpoint-4", single, **dropout)


def check_files(folder: Path) -> None:
    """Whole weights, that transformers opens; one state of the trainer and of the random numbers; no rank's parts."""
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "checksums.json", "training_args.bin",
        "trainer_state.json", "rng_state_0.pth", "fxshard",
    }  # fmt: skip
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    opened = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert {name: value.shape for name, value in opened.items()} == {
        name: value.shape for name, value in training.llama().state_dict().items()
    }


@pytest.mark.slow
def test_what_else_ranks_must_do_alike(tmp_path: Path) -> None:
    launch(2, _alike, tmp_path)


def _alike(folder: Path) -> None:
    training.refuses(folder / "refused")
    training.best_is_loaded(folder / "best")
    training.draws_alike(folder / "drawn")


def make(folder: Path, model: Any = None, **changes: Any) -> Any:
    program = fxshard.parallelize(training.llama(), fxshard.zero(1))
    return Trainer(model or program, training.arguments(folder, **changes), train_dataset=training.rows(8, 0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp": True}, "fsdp, deepspeed and parallelism_config would split what is split already"),
        ({"torch_compile": True}, "torch_compile would compile the program while it is prepared"),
        ({"auto_find_batch_size": True}, "would shrink the batch of the one rank that runs out of memory"),
        ({"activation_checkpointing": True}, "give parallelize(..., checkpoint='model.layers.*')"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha needs a hook on a module"),
        ({"use_liger_kernel": True}, "use_liger_kernel replaces modules"),
        ({"bf16_full_eval": True}, "would change the dtype of the weights"),
        ({"train_sampling_strategy": "batch_rebalance"}, "gives each rank other rows"),
        ({"save_on_each_node": True}, "a checkpoint is one folder that all ranks see"),
    ],
)
def test_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with (
        mock.patch.dict(os.environ),
        pytest.raises(FxshardError, match=r"^these TrainingArguments cannot train a program:\n  - ") as caught,
    ):
        make(tmp_path, **changes)
    assert said in str(caught.value)


def test_other_trainers_go_behind(tmp_path: Path) -> None:
    class Mine(Trainer, transformers.Seq2SeqTrainer):
        pass

    plain = training.arguments(tmp_path).to_dict()
    shared = {
        name: plain[name] for name in ("output_dir", "report_to", "use_cpu", "disable_tqdm", "dataloader_pin_memory")
    }
    for generate in (False, True):
        args = transformers.Seq2SeqTrainingArguments(**shared, max_steps=1, predict_with_generate=generate)
        program = fxshard.parallelize(training.llama(), fxshard.zero(1))
        if generate:
            with pytest.raises(FxshardError, match="predict_with_generate calls parts of a program"):
                Mine(program, args, train_dataset=training.rows(8, 0))
        else:
            assert Mine(program, args, train_dataset=training.rows(8, 0)).train().global_step == 1


def test_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FxshardError, match=r"model is a LlamaForCausalLM, and not a program") as caught:
        make(tmp_path, training.llama())
    assert "take transformers.Trainer" in str(caught.value.fix)
    with pytest.raises(DistributedError, match="for 2 ranks, and 1 run"):
        make(tmp_path, fxshard.parallelize(training.llama(), fxshard.zero(2)))


def test_labels_are_found_by_the_class_of_the_model(tmp_path: Path) -> None:
    """Questions are answered by positions, and causal models shift the labels that are smoothed."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    program = fxshard.parallelize(transformers.BertForQuestionAnswering(config), fxshard.zero(1))
    assert make(tmp_path, program).label_names == ["start_positions", "end_positions"]
    plain = transformers.Trainer(training.llama(), training.arguments(tmp_path, label_smoothing_factor=0.1))
    found = make(tmp_path, label_smoothing_factor=0.1)
    batch = {name: value[None] for name, value in training.rows(1, 0)[0].items()}
    want = plain.compute_loss(plain.model, dict(batch), num_items_in_batch=torch.tensor(3.0))
    torch.testing.assert_close(found.compute_loss(found.model, batch, num_items_in_batch=torch.tensor(3.0)), want)
