"""What ranks run to show that an error of one of them, while it saves or loads, is an error of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import filesystem

import fxshard
from fxshard.checkpoint import checkpoint, pretrained
from fxshard.errors import CheckpointError

X = torch.linspace(-1, 1, 16).view(2, 8)


def program_of(seed: int) -> fxshard.ParallelModule:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return fxshard.parallelize(model, fxshard.tensor_parallel(2), (X,))


def errors_of_one_rank(folder: str) -> None:
    """Writing, reading, unpickling: whatever fails, on whichever rank, all say which, and nothing is changed."""
    program, rank = program_of(0), dist.get_rank()
    fxshard.save_checkpoint(folder, program, step=1)
    fxshard.save_pretrained(program, f"{folder}/hub")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError("No space left on device")

    places: list[tuple[Any, str, int, Any, str]] = [
        (
            filesystem.FileSystemWriter,
            "write_data",
            1,
            lambda: fxshard.save_checkpoint(folder, program),
            "rank 1: OSErr",
        ),
        (
            filesystem.FileSystemWriter,
            "finish",
            0,
            lambda: fxshard.save_checkpoint(folder, program),
            "OSError: No space",
        ),
        (checkpoint, "begin", 0, lambda: fxshard.save_checkpoint(folder, program), "OSError: No space"),
        (checkpoint, "finish", 0, lambda: fxshard.save_checkpoint(folder, program), "OSError: No space"),
        (pretrained, "save_file", 0, lambda: fxshard.save_pretrained(program, f"{folder}/b"), "OSError: No space"),
        (checkpoint.Reader, "read_data", 1, lambda: fxshard.load_checkpoint(folder, program), "rank 1: OSError"),
        (checkpoint.Reader, "read_metadata", 1, lambda: fxshard.load_checkpoint(folder, program), "rank 1: OSError"),
        (checkpoint, "unpickled", 1, lambda: fxshard.load_checkpoint(folder, program), "rank 1: OSError"),
        (pretrained._Stored, "read", 1, lambda: fxshard.load_pretrained(program, f"{folder}/hub"), "rank 1: OSError"),
        (pretrained, "_damage", 1, lambda: fxshard.load_pretrained(program, f"{folder}/hub"), "rank 1: OSError"),
    ]
    for owner, name, who, work, said in places:
        program = program_of(1)
        before = {key: value.clone() for key, value in program.state_dict().items()}
        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr(owner, name, fails)
            with pytest.raises(CheckpointError, match=said) as caught:
                work()
        assert caught.value.fix, name
        assert all(torch.equal(value, before[key]) for key, value in program.state_dict().items()), name
        dist.barrier()
    assert fxshard.load_checkpoint(folder, program).step == 1
    if rank == 0:
        save_file({"0.weight": torch.ones(3)}, f"{folder}/hub/model.safetensors")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"0\.weight has shape \[3\]"):
        fxshard.load_pretrained(program, Path(folder) / "hub")
