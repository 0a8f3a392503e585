"""Checkpoints and safetensors that were damaged, or that somebody else wrote: errors, and every weight as it was."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict_saver import save

import fxshard
from fxshard.checkpoint import checkpoint
from fxshard.checkpoint.reading import Reader
from fxshard.errors import CheckpointError
from tests.distributed import integrity
from tests.distributed.launch import launch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x).relu()) * self.scale
        return out


X = torch.linspace(-1, 1, 32).view(2, 16)


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1 * (1 + seed))
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    fxshard.load_checkpoint(folder, model, optimizer, **options)


def load_safetensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    fxshard.load_pretrained(model, folder, **options)


Load = Callable[..., None]


def written(folder: Path, kind: Load) -> tuple[nn.Module, torch.optim.Optimizer, list[Path]]:
    """What was saved, and the files that it was saved in."""
    model, optimizer = trained(0)
    if kind is load:
        folder = fxshard.save_checkpoint(folder, model, optimizer, extra={"data": numpy.arange(3), "words": ("a", 1.5)})
    else:
        fxshard.save_pretrained(model, folder)
    return model, optimizer, sorted(folder.iterdir())


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("kind", [load, load_safetensors])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, kind: Load) -> None:
    """Anywhere in any file: what is loaded is what was saved, or nothing is loaded."""
    model, _, files = written(tmp_path, kind)
    other, beside = trained(1)
    kind(tmp_path, other, beside)
    want = state_of(other, beside)[:2]
    assert same(want[0], model.state_dict())
    draw, refused = random.Random(0), 0
    for path in files:
        whole = path.read_bytes()
        for _ in range(60 if path.suffix in (".distcp", ".safetensors") else 25):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(data))
            other, beside = trained(1)
            before = state_of(other, beside)
            try:
                kind(tmp_path, other, beside)
            except CheckpointError as error:
                refused += 1
                assert error.fix  # noqa: PT017
                assert same(state_of(other, beside), before), "an error, and something was changed"
            else:
                assert same(state_of(other, beside)[:2], want), "a flipped bit was loaded"
        path.write_bytes(whole)
    assert refused > 60
    kind(tmp_path, *trained(1))


@pytest.mark.parametrize("kind", [load, load_safetensors])
def test_a_file_that_ends_early_or_is_gone(tmp_path: Path, kind: Load) -> None:
    _, _, files = written(tmp_path, kind)
    for path in files:
        whole = path.read_bytes()
        for length in (len(whole) // 2, len(whole) - 1, 0, None):
            path.write_bytes(whole[:length]) if length is not None else path.unlink()
            other, beside = trained(1)
            before = state_of(other, beside)
            if path.name == "checksums.json" and length is None:
                kind(tmp_path, other, beside)  # written by others, say: what it holds cannot be compared
            else:
                with pytest.raises(CheckpointError):
                    kind(tmp_path, other, beside)
                assert same(state_of(other, beside), before)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", [load, load_safetensors])
def test_what_is_damaged_can_be_loaded_by_those_who_ask(tmp_path: Path, kind: Load) -> None:
    model, _, files = written(tmp_path, kind)
    path = max(files, key=lambda each: each.stat().st_size)
    data = bytearray(path.read_bytes())
    data[data.find(model.down.weight.detach().numpy().tobytes()) + 9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is not as it was written") as caught:
        kind(tmp_path, *trained(1))
    assert path.name in str(caught.value)
    other, beside = trained(1)
    kind(tmp_path, other, beside, verify=False)
    assert (other.down.weight != model.down.weight).sum() == 1


@pytest.mark.parametrize("at", range(6))
def test_a_load_that_fails_anywhere_leaves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Not only damage: the disk may fail at any time."""
    written(tmp_path, load)
    read, count = filesystem.FileSystem.create_stream, [0]

    def failing(self: Any, path: Any, mode: str) -> Any:
        count[0] += 1
        if count[0] == at + 1:
            raise OSError("Input/output error")
        return read(self, path, mode)

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", failing)
    for program in (fxshard.parallelize(Net(1), fxshard.tensor_parallel(2), (X,)), Net(1)):
        count[0] = 0
        before = copy.deepcopy(
            program.full_state_dict() if isinstance(program, fxshard.ParallelModule) else program.state_dict()
        )
        try:
            fxshard.load_checkpoint(tmp_path, program)
        except CheckpointError as error:
            assert "OSError: Input/output error" in str(error)  # noqa: PT017
            now = program.full_state_dict() if isinstance(program, fxshard.ParallelModule) else program.state_dict()
            assert same(now, before)
        else:
            assert count[0] <= at


def test_parts_on_the_meta_device_stay_there_where_a_load_fails(tmp_path: Path) -> None:
    _, _, files = written(tmp_path, load)
    path = next(each for each in files if each.suffix == ".distcp")
    path.write_bytes(path.read_bytes()[:-2000])
    with torch.device("meta"):
        program = fxshard.parallelize(Net(0), fxshard.tensor_parallel(2), (X,))
    with pytest.raises(CheckpointError):
        fxshard.load_checkpoint(tmp_path, program)
    assert all(p.is_meta for p in program.parameters())


# --- what others wrote -----------------------------------------------------------------------------------------------


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(RAN),)


RAN = Path("/tmp/fxshard-test-evil")


@pytest.fixture
def nothing_runs() -> Any:
    shutil.rmtree(RAN, ignore_errors=True)
    yield
    assert not RAN.exists(), "what stood in the checkpoint was run"


@pytest.mark.usefixtures("nothing_runs")
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    model, _ = trained(0)
    state = {"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": [{"params": [], "lr": Evil()}]}}
    save(state, checkpoint_id=tmp_path / "a")
    with pytest.raises(CheckpointError, match="no plain data"):
        fxshard.load_checkpoint(tmp_path / "a", *trained(1))
    with pytest.raises(CheckpointError, match="no plain data"):
        fxshard.load_checkpoint(tmp_path / "a", *trained(1), verify=False)
    stream = io.BytesIO()
    torch.save({"step": 1, "extra": Evil()}, stream)
    save({"model": model.state_dict(), "fxshard": {"run": stream.getvalue()}}, checkpoint_id=tmp_path / "b")
    with pytest.raises(CheckpointError, match="no plain data"):
        fxshard.load_checkpoint(tmp_path / "b", trained(1)[0])
    save({"model": model.state_dict()}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"ask for posix\.mkdir, which is no part of metadata"):
        fxshard.load_checkpoint(tmp_path / "c", trained(1)[0], verify=False)


@pytest.mark.parametrize("extra", [Evil(), {"a": [1, Evil()]}, print, nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(CheckpointError, match="extra holds what could not be loaded without running it"):
        fxshard.save_checkpoint(tmp_path, Net(0), extra=extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
def test_files_that_others_could_have_written_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    model, _, files = written(tmp_path / "run", load)
    for path in (*files, files[0].parent, files[0].parent.parent):
        mode = path.stat().st_mode & 0o777
        path.chmod(mode | 0o002)
        with pytest.raises(CheckpointError, match=f"{path} may be written by everybody"):
            fxshard.load_checkpoint(tmp_path / "run", Net(1))
        fxshard.load_checkpoint(tmp_path / "run", Net(1), verify=False)
        path.chmod(mode)
    fxshard.load_checkpoint(tmp_path / "run", model)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
def test_what_is_written_is_ones_own(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = fxshard.save_checkpoint(tmp_path / "run", Net(0))
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o022 == 0 for path in (folder, folder.parent, *folder.iterdir()))
    fxshard.load_checkpoint(tmp_path / "run", Net(1))


# --- on ranks --------------------------------------------------------------------------------------------------------


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    launch(2, integrity.errors_of_one_rank, str(tmp_path))


def test_the_metadata_of_torch_are_read() -> None:
    """Every class that they are made of is known."""
    assert {"Metadata", "MetadataIndex", "TensorStorageMetadata"} <= set(dir(torch.distributed.checkpoint.metadata))
    assert issubclass(Reader, torch.distributed.checkpoint.FileSystemReader)
    assert checkpoint.Planner is not None
