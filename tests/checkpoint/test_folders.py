"""Folders of checkpoints: whatever call fails or is the last one, a complete checkpoint stays complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.checkpoint.folders import begin, complete_folders, finish
from fxshard.errors import CheckpointError


def filled(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert fxshard.latest_checkpoint(tmp_path / "run") is None
    for step in (10, 20, 15, 30):  # 15: gone back by hand
        path = fxshard.save_checkpoint(tmp_path / "run", filled(step), step=step)
        assert fxshard.latest_checkpoint(tmp_path / "run") == path
    assert names(tmp_path / "run") == ["000003-step-15", "000004-step-30"]
    fxshard.save_checkpoint(tmp_path / "run", filled(1), step=30, keep=None)
    assert names(tmp_path / "run") == ["000003-step-15", "000004-step-30", "000005-step-30"]
    model = nn.Linear(3, 2)
    assert fxshard.load_checkpoint(tmp_path / "run", model).step == 30
    assert model.weight[0, 0] == 1
    assert fxshard.load_checkpoint(tmp_path / "run" / "000003-step-15", model).step == 15
    assert model.weight[0, 0] == 15
    fxshard.save_checkpoint(tmp_path / "run", filled(1), keep=1)
    assert names(tmp_path / "run") == ["000006-step-0"]
    with pytest.raises(CheckpointError, match="keep is 0, so nothing would be left"):
        fxshard.save_checkpoint(tmp_path / "run", filled(1), keep=0)


def test_leftovers_go_and_other_files_stay(tmp_path: Path) -> None:
    for name in ("000001-step-1.partial", "000007-step-7", "notes", "mine.partial"):
        (tmp_path / name).mkdir()
    partial = begin(tmp_path, 8)
    assert names(tmp_path) == ["000007-step-7", "000008-step-8.partial", "mine.partial", "notes"]
    assert finish(partial, None) == tmp_path / "000008-step-8"
    assert [path.name for path in complete_folders(tmp_path)] == ["000007-step-7", "000008-step-8"]


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        fxshard.load_checkpoint(tmp_path, nn.Linear(3, 2))
    (tmp_path / "000001-step-1.partial").mkdir()
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        fxshard.load_checkpoint(tmp_path, nn.Linear(3, 2))


class Killed(BaseException):
    """What no handler in between catches."""


CALLS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "unlink"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_save_that_ends_at_any_call_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Every call that changes the disk is in turn the last one."""
    calls = 0
    last: int | None = None

    def ending(module: Any, name: str) -> Any:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last and where == "before":
                raise Killed
            out = real(*args, **kwargs)
            if calls == last:
                raise Killed
            return out

        return call

    folder = tmp_path / "run"
    for step in (1, 2):
        fxshard.save_checkpoint(folder, filled(step), step=step)
    saved = 2
    for module, name in CALLS:
        monkeypatch.setattr(module, name, ending(module, name))
    for stop in range(1, 100):
        calls, last = 0, stop
        try:
            fxshard.save_checkpoint(folder, filled(saved + 1), step=saved + 1)
        except Killed:
            pass
        except CheckpointError as error:  # DCP catches what it can
            assert "Killed" in str(error)  # noqa: PT017
        if calls < stop:
            break
        last = None
        model = nn.Linear(3, 2)
        found = [fxshard.load_checkpoint(path, model) for path in complete_folders(folder)]
        assert all((parameter == found[-1].step).all() for parameter in model.parameters())
        assert len(found) >= 2
        assert found[-1].step in (saved, saved + 1)
        saved = found[-1].step
    assert stop > 12, "it was stopped at every call"
    assert len(names(folder)) == 2
