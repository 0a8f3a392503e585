"""A rank's part of a tensor, as ``torch.distributed.checkpoint`` takes it: a ``DTensor``, or where none fits our own.

A ``DTensor`` cuts a dim into as many pieces as there are ranks, the way ``torch.chunk`` does. The packed weight of
GPT-2's attention, of which every rank has its slice of q, of k and of v, is not such a cut, and neither are heads that
do not divide. ``BlockTensor`` is the part of those: a tensor of the whole shape that knows which boxes of it this rank
holds, and writes and reads each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fxshard.errors import CheckpointError
from fxshard.mesh import Mesh
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.torch_internals import make_wrapper, pytree
from fxshard.weights.gathering import gather_whole
from fxshard.weights.layout import Layout, dtensor_placements

_LOCAL = ("detach", "clone", "_to_copy", "empty_like", "zeros_like", "copy_")


class BlockTensor(torch.Tensor):
    """A part that no ``DTensor`` expresses: its shape is that of the whole, its memory that of the part.

    It takes part in saving and loading. To compute with it, take ``to_local()`` or ``full_tensor()``.

    Args:
        part: what this rank holds; the memory is shared.
        layout: how it lies.
        axes: gives this rank's axes, for ``full_tensor``.
    """

    part: torch.Tensor
    part_layout: Layout
    axes: Callable[[], Mapping[str, Axis]]

    @staticmethod
    def __new__(cls, part: torch.Tensor, layout: Layout, axes: Callable[[], Mapping[str, Axis]]) -> BlockTensor:
        """A tensor of the whole shape, without memory of its own."""
        made: BlockTensor = make_wrapper(cls, layout.shape, dtype=part.dtype, device=part.device, requires_grad=False)
        made.part, made.part_layout, made.axes = part.detach(), layout, axes
        return made

    def to_local(self) -> torch.Tensor:
        """This rank's part."""
        return self.part

    def full_tensor(self) -> torch.Tensor:
        """The whole tensor; collective."""
        return gather_whole(self.part, self.part_layout.placements, self.part_layout.mesh, self.axes())

    def like(self, part: torch.Tensor) -> BlockTensor:
        """Another tensor that lies as this one does."""
        return BlockTensor(part, self.part_layout, self.axes)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BlockTensor({self.part_layout}, part={list(self.part.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, BlockTensor)), None)
        every = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        alike = first is not None and all(
            isinstance(x, BlockTensor) and x.part_layout == first.part_layout for x in every
        )
        if first is None or not alike or func.overloadpacket.__name__ not in _LOCAL:
            raise CheckpointError(
                f"{func} was called on a BlockTensor, which holds parts that no DTensor expresses",
                fix="compute with to_local(), this rank's part, or full_tensor(), the whole",
            )
        local = pytree.tree_map(lambda x: x.part if isinstance(x, BlockTensor) else x, (args, kwargs or {}))
        out = func(*local[0], **local[1])
        return args[0] if out is local[0][0] else first.like(out)

    # --- the protocol of torch.distributed.checkpoint: see torch.distributed._checkpointable -----------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(self.shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.sizes)) for box in self.part_layout.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        box = next(box for box in self.part_layout.boxes if index.offset is None or tuple(index.offset) == box.start)
        return self.part[box.of_part]


def device_mesh_of(mesh: Mesh, axes: Mapping[str, Axis], device_type: str) -> DeviceMesh:
    """A torch ``DeviceMesh`` over the process groups of this process's axes."""
    groups = []
    for name in mesh.names:
        group = axes[name].group
        assert isinstance(group, ProcessAxisGroup)
        groups.append(group.group)
    ranks = torch.arange(mesh.world_size).reshape(mesh.sizes)
    given: Any = groups if len(groups) > 1 else groups[0]
    return DeviceMesh.from_group(given, device_type, mesh=ranks, mesh_dim_names=mesh.names)


def sharded(
    part: torch.Tensor,
    layout: Layout,
    axes: Callable[[], Mapping[str, Axis]],
    device_mesh: Callable[[], DeviceMesh],
) -> DTensor | BlockTensor:
    """A part as a tensor of the whole shape, sharing its memory: a ``DTensor`` where one says the same.

    Args:
        part: what this rank holds.
        layout: how it lies.
        axes: gives this rank's axes.
        device_mesh: gives the torch ``DeviceMesh`` of the same axes.
    """
    plain = dtensor_placements(layout.shape, layout.placements, layout.mesh.sizes)
    if plain is None:
        return BlockTensor(part, layout, axes)
    whole = torch.empty(layout.shape, device="meta")
    return DTensor.from_local(
        part.detach(), device_mesh(), plain, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def local_of(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a ``DTensor`` or a ``BlockTensor``; a plain tensor itself."""
    found: torch.Tensor = value.to_local() if isinstance(value, DTensor | BlockTensor) else value
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, those that are not a number included.

    >>> same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
