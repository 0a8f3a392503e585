"""From a mesh to the process groups of torch.distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fxshard.errors import DistributedError, MeshError
from fxshard.mesh import Mesh
from fxshard.ranks.devices import process_device, random_state, set_random_state
from fxshard.ranks.faults import guarded
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.torch_internals import default_timeout_s


def check_world(mesh: Mesh) -> None:
    """Raises ``MeshError`` where the processes that run are not as many as the mesh has ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() != mesh.world_size:
        raise MeshError(
            f"the mesh {mesh} has {mesh.world_size} ranks, but {dist.get_world_size()} processes run",
            fix=f"start it with torchrun --nproc-per-node {mesh.world_size}, or give a mesh of "
            f"{dist.get_world_size()} ranks",
        )


def process_axes(
    mesh: Mesh, device_mesh: Any, device_type: str, reduce_dtype: torch.dtype | None = None
) -> dict[str, Axis]:
    """This process's axes.

    Args:
        mesh: the mesh.
        device_mesh: a torch ``DeviceMesh`` of the same axes, or None to make one.
        device_type: ``cpu`` or ``cuda``.
        reduce_dtype: the least precision in which sums over the ranks are made; None leaves each value's own.

    Raises:
        DistributedError: when no process group was initialised.
        MeshError: when the number of processes is not the mesh's.
    """
    if mesh.world_size == 1:
        return {}
    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            f"the program needs {mesh.world_size} processes, but torch.distributed is not initialised",
            fix="start it with torchrun and call torch.distributed.init_process_group() first, "
            "or run all ranks in this process with fxshard.simulate(program, ...)",
        )
    check_world(mesh)
    if device_mesh is None:
        device_mesh = init_device_mesh(device_type, mesh.sizes, mesh_dim_names=mesh.names)
        timeout = timedelta(seconds=default_timeout_s())
        for name in mesh.names:  # torch gives the groups of an axis half an hour, whatever the default group has
            if dist.get_backend() != "fake":  # which waits for nothing
                device_mesh.get_group(name).set_timeout(timeout)
    out = {}
    for name, size in zip(mesh.names, mesh.sizes, strict=True):
        group = ProcessAxisGroup(device_mesh.get_group(name), reduce_dtype, name)
        out[name] = Axis(name, size, group.index, group)
    return out


def joint_group(mesh: Mesh, names: Sequence[str], axes: Mapping[str, Axis]) -> ProcessAxisGroup:
    """The group of the ranks that differ from this one on the axes ``names`` only; collective where it is new."""
    first = axes[names[0]].group
    assert isinstance(first, ProcessAxisGroup)
    if len(names) == 1:
        return first
    every: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world_size):
        at = mesh.coordinate(rank)
        beside = tuple(i for name, i in zip(mesh.names, at, strict=True) if name not in names)
        every.setdefault(beside, []).append(rank)
    timeout = timedelta(seconds=default_timeout_s())
    group, _ = dist.new_subgroups_by_enumeration(list(every.values()), timeout=timeout)
    return ProcessAxisGroup(group, first.reduce_dtype, "+".join(names))


def checksum(tensor: torch.Tensor) -> int:
    """A number that depends on every bit of a tensor and on where it stands.

    It is a sum of integers modulo 2**64, so devices that add in other orders agree.

    >>> rows = torch.arange(6).view(3, 2)
    >>> checksum(rows) == checksum(rows.clone()), checksum(rows) == checksum(rows.flip(0))
    (True, False)
    """
    if tensor.is_meta or tensor.numel() == 0:
        return 0
    flat = tensor.detach().contiguous().view(-1)
    bits = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    words = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    factors = torch.arange(min(_CHUNK, words.numel()), device=words.device) * _ODD | 1
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        total = (total * 1_000_003 + int((part * factors[: part.numel()]).sum())) % 2**64
    return total


_CHUNK, _ODD = 1 << 18, 0x9E3779B97F4A7C2
"""How much is summed at a time, which bounds the memory it takes; and what spreads the factors of places."""


def share_random_state(mesh: Mesh, device: torch.device) -> None:
    """Gives every rank the random state of rank 0, so that what all draw is equal."""
    if mesh.world_size == 1:
        return
    state = random_state(device)
    shared = torch.cat(state).to(process_device())
    with guarded(None, "broadcast", shared):
        dist.broadcast(shared, 0)
    set_random_state(device, shared.cpu().split([len(each) for each in state]))
