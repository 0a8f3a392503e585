"""The device that this process computes on, and the random state there."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist

RandomState = tuple[torch.Tensor, ...]
"""Of the CPU's generator; and of the device's, if it has one of its own."""


def backends() -> dict[str, str]:
    """What the default process group communicates through, for each type of device.

    ``dist.get_backend()`` does not tell, where ``init_process_group`` was left to choose.
    """
    return dict(pair.split(":") for pair in dist.get_backend_config().split(","))


def process_device() -> torch.device:
    """This process's device: an accelerator for which the process group has a backend of its own, or else the CPU."""
    known = backends()
    for kind, backend in known.items():
        if kind != "cpu" and backend != known.get("cpu") and (count := torch.get_device_module(kind).device_count()):
            local = int(os.environ.get("LOCAL_RANK", count))
            return torch.device(kind, local if local < count else torch.get_device_module(kind).current_device())
    return torch.device("cpu")


def target_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Where the parts of a model belong: on this process's device, or, where that is the CPU or no processes run, where
    its tensors are.
    """
    if dist.is_available() and dist.is_initialized():
        if (own := process_device()).type != "cpu":
            return own
        otherwise = own
    else:
        default = torch.get_default_device()
        otherwise = torch.device("cpu") if default.type == "meta" else default
    return next((tensor.device for tensor in tensors if not tensor.is_meta), otherwise)


def random_state(device: torch.device) -> RandomState:
    """The state of the generators that a program on ``device`` draws from."""
    if device.type in ("cpu", "meta"):
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Sets what ``random_state`` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)
