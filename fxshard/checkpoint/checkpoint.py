"""Saving a run and going on with it, on the same mesh, on another, or on one device.

A checkpoint is what ``torch.distributed.checkpoint`` writes for

    {"model": sharded_state_dict, "optimizer": sharded_optimizer_state_dict, "fxshard": {...}}

so its own tools read it too. Every rank writes the parts that it holds, each part once; every rank reads what its own
parts need. Nothing in it knows of the mesh.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fxshard.checkpoint.contents import allocated, pickled, set_random_state, tree_of, unpickled
from fxshard.checkpoint.folders import begin, finish, latest_checkpoint
from fxshard.errors import CheckpointError
from fxshard.program import ParallelModule
from fxshard.runtime.loading import load_state_dict
from fxshard.runtime.materialize import make_real
from fxshard.runtime.optimizer_state import (
    load_optimizer_state_dict,
    matching_groups,
    refuse_simulation,
    sharded_optimizer_state_dict,
    template,
)
from fxshard.runtime.parts import local_of, same
from fxshard.runtime.together import on_first_rank, refuse
from fxshard.runtime.weights import Weights

OWN = "fxshard"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was loaded.

    Attributes:
        folder: where it lies.
        step: what ``save_checkpoint`` was given.
        extra: likewise.
    """

    folder: Path
    step: int
    extra: Any


def save_checkpoint(
    folder: str | os.PathLike[str],
    program: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra: Any = None,
    keep: int | None = 2,
) -> Path:
    """Saves the weights, the optimizer, the random state and what you add, complete or not at all.

    Every rank must call it, and every rank returns when the checkpoint is complete and on disk. A save that is killed,
    at whatever moment, leaves the checkpoints before it as they were.

    Args:
        folder: one that all ranks see; each save makes a folder in it.
        program: what ``parallelize`` returned, or a plain module.
        optimizer: a torch optimizer over its parameters.
        step: a number to find it by, returned by ``load_checkpoint``.
        extra: anything that pickles, as rank 0 has it: the state of a scheduler, of a data loader.
        keep: how many complete checkpoints to keep, this one included; None for all.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: where the optimizer keeps state that no other mesh could take, or nothing could be written.

    >>> import tempfile, fxshard
    >>> model = nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fxshard.save_checkpoint(folder, model, optimizer, step=7, extra={"epoch": 1})
    ...     loaded = fxshard.load_checkpoint(folder, model, optimizer)
    >>> path.name, loaded.step, loaded.extra
    ('000001-step-7', 7, {'epoch': 1})
    """
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep is {keep}, so nothing would be left", fix="keep at least 1, or None for all")
    weights = weights_of(program)
    state: dict[str, Any] = {}
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state_dict(weights, optimizer)
    state["model"] = weights.stream_state_dict() if weights.is_simulated else weights.sharded_state_dict()
    own: list[bytes] = []

    def start() -> Path:
        own.append(pickled(step, extra))
        return begin(Path(folder), step)

    partial = on_first_rank(start)
    if own:  # of rank 0 alone
        state[OWN] = {"run": own[0]}
    with _errors(f"cannot write the checkpoint {partial}"):
        save(state, storage_writer=FileSystemWriter(partial, single_file_per_rank=True))
    return on_first_rank(lambda: _finish(partial, keep))


def load_checkpoint(
    folder: str | os.PathLike[str],
    program: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    random_state: bool = True,
) -> Checkpoint:
    """Loads the newest complete checkpoint, whatever mesh and plan it was saved on.

    Every rank must call it, and reads what its own parts need. The weights are loaded in place. The state of the
    optimizer is allocated as the checkpoint has it: it need not have stepped.

    Args:
        folder: what ``save_checkpoint`` was given, or one of the checkpoints in it.
        program: what ``parallelize`` returned, or a plain module.
        optimizer: a torch optimizer over its parameters, in the groups that it had.
        random_state: whether to go on with the random numbers of the run, too.

    Raises:
        CheckpointError: where there is none, or it does not fit; everything that does not fit is listed.
    """
    weights = weights_of(program)
    path = on_first_rank(lambda: _newest(Path(folder)))
    reader = FileSystemReader(path)
    saved = _saved(reader)
    _check_model(weights, saved.get("model", {}), path)
    if optimizer is not None:
        refuse_simulation(weights)
        none = [] if "optimizer" in saved else ["it was saved without one"]
        refuse(none, f"the checkpoint {path} has no state of an optimizer:", "load it without an optimizer")
    small = {OWN: saved[OWN]} if OWN in saved else {}
    if optimizer is not None:
        small["optimizer"] = {"param_groups": saved["optimizer"]["param_groups"]}
    _load(small, reader)
    state: dict[str, Any] = {}
    if optimizer is not None:  # all that may be refused is looked at before anything changes
        matching_groups(weights, optimizer, small["optimizer"]["param_groups"])
        state["optimizer"] = {"state": template(weights, optimizer, saved["optimizer"].get("state", {}))}
    make_real(weights, saved["model"])
    state["model"] = _targets(weights, saved["model"])
    _load(state, reader)
    _install(weights, program, state["model"])
    if optimizer is not None:
        load_optimizer_state_dict(weights, optimizer, small["optimizer"] | state["optimizer"])
    own: dict[str, Any] = unpickled(small[OWN]["run"]) if OWN in small else {"step": 0, "extra": None}
    if random_state and "random" in own:
        set_random_state(own["random"])
    return Checkpoint(path, own["step"], own["extra"])


def weights_of(program: nn.Module) -> Weights:
    """The weights of a program, or of a plain module."""
    return program._weights() if isinstance(program, ParallelModule) else Weights.of_module(program)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """The errors of torch.distributed.checkpoint as ours; without its warning that only one process runs."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _finish(partial: Path, keep: int | None) -> Path:
    """Completes a checkpoint, if every file of it is there."""
    for stored in FileSystemReader(partial).read_metadata().storage_data.values():
        path = partial / stored.relative_path
        if not path.is_file() or path.stat().st_size < stored.offset + stored.length:
            raise CheckpointError(
                f"a rank wrote {path.name}, and rank 0 does not find it in {partial}",
                fix="give a folder that all ranks see",
            )
    return finish(partial, keep)


def _newest(folder: Path) -> Path:
    found = folder if (folder / ".metadata").is_file() else latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder}", fix="ask fxshard.latest_checkpoint(folder) first"
        )
    return found


def _saved(reader: FileSystemReader) -> dict[str, Any]:
    """The tree of a checkpoint."""
    saved: dict[str, Any] = {}
    problems = []
    try:
        saved = tree_of(reader.read_metadata())
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    refuse(problems, f"cannot read the checkpoint {reader.checkpoint_id}:", "give a folder that all ranks see")
    return saved


def _load(state: dict[str, Any], reader: FileSystemReader) -> None:
    with _errors(f"cannot read the checkpoint {reader.checkpoint_id}"):
        load(state, storage_reader=reader)


def _check_model(weights: Weights, saved: Mapping[str, Any], path: Path) -> None:
    """Raises ``CheckpointError`` where the checkpoint's weights are not those of the model."""
    firsts = {weights.first_names[name] for name in saved if name in weights.tensors}
    problems = [f"{name} is missing" for name in weights.names if weights.first_names[name] not in firsts]
    problems += [f"{name} is missing" for name, value in weights.extras.items() if name not in saved and value != {}]
    for name, value in saved.items():
        if name not in weights.names and name not in weights.extras:
            problems.append(f"{name} is not in the model")
        elif name in weights.names and not isinstance(value, torch.Tensor):
            problems.append(f"{name} is not a tensor")
        elif name in weights.names and value.shape != weights.tensors[name].shape:
            problems.append(f"{name} has shape {list(value.shape)}, the model's {list(weights.tensors[name].shape)}")
    refuse(
        problems,
        f"the checkpoint {path} is not one of this {type(weights.model).__name__}:",
        "build the model as it was saved",
    )


def _targets(weights: Weights, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What to load into: the parts in place, and for a second name of one tensor memory of its own, to compare."""
    out: dict[str, Any] = {name: allocated(saved[name]) for name in weights.extras if name in saved}
    seen = set()
    for name in (name for name in weights.names if name in saved):
        part = weights.part(name)
        if weights.is_simulated:
            out[name] = torch.empty(weights.layout(name).shape, dtype=part.dtype)
        else:
            first = weights.first_names[name] not in seen
            out[name] = weights.sharded(name, part if first else torch.empty_like(part))
        seen.add(weights.first_names[name])
    return out


def _install(weights: Weights, program: nn.Module, state: Mapping[str, Any]) -> None:
    """After the parts were loaded in place: second names, extra state, the parts of simulated ranks."""
    problems = []
    if weights.is_simulated:
        load_state_dict(weights, state, strict=False)
    else:
        for name in weights.names:
            again = name in state and weights.first_names[name] != name
            if again and not same(local_of(state[name]), weights.part(name)):
                problems.append(f"{weights.first_names[name]} and {name}")
        extras = {name: state[name] for name in weights.extras if name in state}
        if extras:
            weights.model.load_state_dict(extras, strict=False)
    refuse(problems, "one tensor of the model is two in the checkpoint, and they differ:", "untie them in the model")
    if isinstance(program, ParallelModule):
        program._loaded(weights.names)
