"""What a checkpoint holds beside tensors: its tree, read from the metadata, and the state of the run."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fxshard.checkpoint.reading import REPLACED, loaded, stored
from fxshard.errors import CheckpointError
from fxshard.torch_internals import pytree


def tree_of(metadata: Metadata) -> dict[str, Any]:
    """The nested dicts and lists that were saved: tensors on the meta device, and None for everything else."""
    out: dict[str, Any] = {}
    for key, each in metadata.state_dict_metadata.items():
        value = None
        if isinstance(each, TensorStorageMetadata):
            value = torch.empty(each.size, dtype=each.properties.dtype, device="meta")
        put(out, (metadata.planner_data or {}).get(key, (key,)), value)
    return out


def put(tree: Any, path: Sequence[str | int], value: Any) -> None:
    """Sets what stands at a path, making the dicts and lists on the way to it.

    >>> tree = {}
    >>> put(tree, ("a", 1, "b"), 5)
    >>> tree
    {'a': [None, {'b': 5}]}
    """
    for key, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(key, int):
            tree.extend([None] * (key + 1 - len(tree)))
        if following is None:
            tree[key] = value
        elif (tree[key] if isinstance(key, int) else tree.get(key)) is None:
            tree[key] = [] if isinstance(following, int) else {}
        tree = tree[key]


def allocated(tree: Any) -> Any:
    """The same tree, its tensors on the CPU, to load into."""
    return pytree.tree_map(lambda x: torch.zeros_like(x, device="cpu") if isinstance(x, torch.Tensor) else x, tree)


def pickled(step: int, extra: Any) -> bytes:
    """The state of the run, this process's random state included.

    Raises:
        CheckpointError: where ``extra`` holds something else than plain data.
    """
    return stored({"step": step, "extra": extra, "random": _random_state()}, "extra")


def unpickled(run: bytes) -> dict[str, Any]:
    """What ``pickled`` was given, and the random state.

    Raises:
        CheckpointError: where it is not that.
    """
    out = loaded(io.BytesIO(run))
    if not isinstance(out, dict) or not {"step", "extra"} <= out.keys():
        raise CheckpointError("the state of the run is not what save_checkpoint writes", fix=REPLACED)
    return out


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on with the random numbers of torch, of its current GPU, and of Python."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
