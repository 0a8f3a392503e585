"""Saving a run and going on with it, on the same mesh, on another, or on one device.

A checkpoint is what ``torch.distributed.checkpoint`` writes for

    {"model": sharded_state_dict, "optimizer": sharded_optimizer_state_dict, "fxshard": {...}}

so its own tools read it too. Every rank writes the parts that it holds, each part once; every rank reads what its own
parts need. Nothing in it knows of the mesh.
"""

from __future__ import annotations

import json
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
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fxshard.checkpoint.contents import allocated, pickled, set_random_state, tree_of, unpickled
from fxshard.checkpoint.folders import begin, finish, latest_checkpoint
from fxshard.checkpoint.reading import CHECKSUMS, FOREIGN, METADATA, REPLACED, Planner, Reader, stored
from fxshard.errors import CheckpointError, DistributedError
from fxshard.program import ParallelModule
from fxshard.ranks.agreement import is_spread, on_every_rank, on_first_rank, refuse
from fxshard.ranks.faults import guarded, told_to_others
from fxshard.ranks.session import said
from fxshard.training.optimizer_state import (
    load_optimizer_state_dict,
    matching_groups,
    refuse_simulation,
    sharded_optimizer_state_dict,
    template,
)
from fxshard.weights.checkpoint_parts import local_of, same
from fxshard.weights.files import checksums_of, keep_from_others
from fxshard.weights.loading import load_state_dict
from fxshard.weights.staging import Staging
from fxshard.weights.weights import Weights

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


@told_to_others
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
        extra: plain data, as rank 0 has it: numbers, strings, lists, dicts, tensors and arrays; the state of a
            scheduler, of a data loader. Other classes must be named in ``torch.serialization.add_safe_globals``, here
            and where it is loaded.
        keep: how many complete checkpoints to keep, this one included; None for all.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: on all ranks, where the optimizer keeps state that no other mesh could take, ``extra`` is no
            plain data, or nothing could be written.

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
        for name, value in state.get("optimizer", {}).items():
            _check_plain(value, f"the optimizer's {name}")
        return begin(Path(folder), step)

    partial = on_first_rank(start, f"cannot write a checkpoint into {folder}", WRITABLE)
    if own:  # of rank 0 alone
        state[OWN] = {"run": own[0]}
    with _errors("save", f"cannot write the checkpoint {partial}", WRITABLE):
        save(state, storage_writer=FileSystemWriter(partial, single_file_per_rank=True))
    return on_first_rank(lambda: _finish(partial, keep), f"cannot complete the checkpoint {partial}", WRITABLE)


WRITABLE = "give a folder that every rank can write to, on a disk with room"


def _check_plain(value: Any, what: str) -> None:
    """Raises ``CheckpointError`` where something could not be loaded again without running what stands in it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_plain(each, f"{what}, {key}")
    elif isinstance(value, list | tuple):
        for each in value:
            _check_plain(each, what)
    elif not isinstance(value, torch.Tensor | int | float | str | bool | None):
        stored(value, what)


@told_to_others
def load_checkpoint(
    folder: str | os.PathLike[str],
    program: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    random_state: bool = True,
    verify: bool = True,
) -> Checkpoint:
    """Loads the newest complete checkpoint, whatever mesh and plan it was saved on.

    Every rank must call it, and reads what its own parts need, beside what it has: the weights change, in place, when
    all ranks have read all of theirs, and not at all where one fails. The state of the optimizer is allocated as the
    checkpoint has it: it need not have stepped. Nothing that stands in the files is run.

    Args:
        folder: what ``save_checkpoint`` was given, or one of the checkpoints in it.
        program: what ``parallelize`` returned, or a plain module.
        optimizer: a torch optimizer over its parameters, in the groups that it had.
        random_state: whether to go on with the random numbers of the run, too.
        verify: whether to hold what is read against the checksums that were written with it, and to refuse files that
            other users could have written.

    Raises:
        CheckpointError: on all ranks, where there is none, it is damaged, or it does not fit; everything that does not
            fit is listed. The weights are then as they were.
    """
    weights = weights_of(program)
    path = on_first_rank(lambda: _newest(Path(folder)), f"cannot read {folder}", "give a folder that all ranks see")
    reader = Reader(path, verify)
    refuse(reader.problems(), f"the checkpoint {path} may hold what another user wrote:", FOREIGN)
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
    own = on_every_rank(lambda: _of_run(small), f"cannot read the checkpoint {path}:", REPLACED)
    state: dict[str, Any] = {}
    if optimizer is not None:
        matching_groups(weights, optimizer, small["optimizer"]["param_groups"])
        state["optimizer"] = {"state": template(weights, optimizer, saved["optimizer"].get("state", {}))}
    staging = Staging(weights, list(saved["model"]))
    state["model"] = _targets(weights, staging, saved["model"])
    _load(state, reader)
    _check_tied(weights, state["model"])  # and from here on nothing fails
    _install(weights, staging, program, state["model"])
    if optimizer is not None:
        load_optimizer_state_dict(weights, optimizer, small["optimizer"] | state["optimizer"])
    if random_state and "random" in own:
        set_random_state(own["random"])
    return Checkpoint(path, own["step"], own["extra"])


def _of_run(small: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the run: the step, what was added, the random state."""
    return unpickled(small[OWN]["run"]) if OWN in small else {"step": 0, "extra": None}


def weights_of(program: nn.Module) -> Weights:
    """The weights of a program, or of a plain module."""
    return program.weights_here() if isinstance(program, ParallelModule) else Weights.of_module(program)


@contextmanager
def _errors(name: str, what: str, fix: str) -> Iterator[None]:
    """The errors of torch.distributed.checkpoint as ours; without its warning that only one process runs.

    Where a rank dies or hangs in between, the others say which.
    """
    try:
        with warnings.catch_warnings(), guarded(None, name, torch.empty(0)):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            try:
                yield
            except CheckpointException as error:  # of one rank or more, and all know it
                raise _CannotGoOn(_told(error)) from error
    except _CannotGoOn as error:
        raise CheckpointError(f"{what}: {error}", fix=fix) from error.__cause__
    except (CheckpointError, DistributedError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {said(error)}", fix=fix) from error


class _CannotGoOn(Exception):
    """Why, in words: not an error of the backend."""


def _told(error: CheckpointException) -> str:
    """What went wrong on which rank."""
    found = {rank: failure[0] if isinstance(failure, tuple) else failure for rank, failure in error.failures.items()}
    texts = {rank: each.what if isinstance(each, CheckpointError) else said(each) for rank, each in found.items()}
    if not is_spread():
        return "; ".join(texts.values())
    return "; ".join(f"rank {rank}: {text}" for rank, text in texts.items())


def _finish(partial: Path, keep: int | None) -> Path:
    """Completes a checkpoint, if every file of it is there."""
    for each in Reader(partial, verify=False).read_metadata().storage_data.values():
        path = partial / each.relative_path
        if not path.is_file() or path.stat().st_size < each.offset + each.length:
            raise CheckpointError(
                f"a rank wrote {path.name}, and rank 0 does not find it in {partial}",
                fix="give a folder that all ranks see",
            )
    with open(partial / METADATA, "rb") as file:
        (partial / CHECKSUMS).write_text(json.dumps({METADATA: list(checksums_of(file))}), encoding="utf-8")
    keep_from_others([partial, *partial.iterdir()])
    return finish(partial, keep)


def _newest(folder: Path) -> Path:
    found = folder if (folder / ".metadata").is_file() else latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder}", fix="ask fxshard.latest_checkpoint(folder) first"
        )
    return found


def _saved(reader: Reader) -> dict[str, Any]:
    """The tree of a checkpoint."""
    what = f"cannot read the checkpoint {reader.folder}:"
    return on_every_rank(lambda: tree_of(reader.read_metadata()), what, "give a folder that all ranks see")


def _load(state: dict[str, Any], reader: Reader) -> None:
    with _errors("load", f"cannot read the checkpoint {reader.folder}", REPLACED):
        load(state, storage_reader=reader, planner=Planner())


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


def _targets(weights: Weights, staging: Staging, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What to load into: the new values of the parts, and for a second name of one tensor other memory, to compare."""
    out: dict[str, Any] = {name: allocated(saved[name]) for name in weights.extras if name in saved}
    seen = set()
    for name in (name for name in weights.names if name in saved):
        if weights.is_simulated:
            out[name] = torch.empty(weights.layout(name).shape, dtype=weights.part(name).dtype)
        else:
            new = staging.of(name)
            out[name] = weights.sharded(name, torch.empty_like(new) if weights.first_names[name] in seen else new)
        seen.add(weights.first_names[name])
    return out


def _check_tied(weights: Weights, state: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` where two names of one tensor have two values."""
    found = [(name, weights.first_names[name]) for name in weights.names if name in state]
    pairs = [(first, name) for name, first in found if first != name and first in state]
    problems = [f"{a} and {b}" for a, b in pairs if not same(local_of(state[a]), local_of(state[b]))]
    refuse(problems, "one tensor of the model is two in the checkpoint, and they differ:", "untie them in the model")


def _install(weights: Weights, staging: Staging, program: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts what was loaded in place: the parts, those of simulated ranks, the extra state of modules."""
    extras = {name: state[name] for name in weights.extras if name in state}
    if weights.is_simulated:
        load_state_dict(weights, state, strict=False)
    else:
        if extras:
            weights.model.load_state_dict(extras, strict=False)
        staging.install()
    if isinstance(program, ParallelModule):
        program.note_loaded(weights.names)
