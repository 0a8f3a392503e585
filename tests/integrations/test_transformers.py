"""The trainer of transformers trains programs as it trains their models on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

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
    """With dropout, so that the random state counts; from the middle of an epoch and from its end; on one device too."""
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
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with torch.no_grad():
        assert model(**training.rows(1, 0)[0] | {"input_ids": training.rows(1, 0)[0]["input_ids"][None], "labels": None})
