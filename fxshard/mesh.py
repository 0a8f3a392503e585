"""The mesh: named axes of devices, described without any process group.

Ranks are numbered row-major, as ``torch.distributed.device_mesh.init_device_mesh`` numbers them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxshard.errors import MeshError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """Named mesh axes and their sizes.

    Args:
        names: one name an axis, outermost first.
        sizes: the number of ranks along each axis.

    Raises:
        MeshError: when names repeat, or a size is not a positive integer.

    >>> mesh = Mesh(("dp", "tp"), (2, 4))
    >>> mesh.world_size, mesh.coordinate(6), mesh.rank((1, 2))
    (8, (1, 2), 6)
    >>> mesh.ranks_along("tp", 6)
    (4, 5, 6, 7)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names:
            raise MeshError(
                f"a mesh needs one size for each of its axes, got names {self.names} and sizes {self.sizes}"
            )
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"mesh axis names repeat: {self.names}", fix="give each axis its own name")
        for name, size in zip(self.names, self.sizes, strict=True):
            if not isinstance(name, str) or not name.isidentifier():
                raise MeshError(f"mesh axis name {name!r} is no identifier", fix="use letters, digits and _: 'tp'")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise MeshError(f"mesh axis {name!r} has size {size!r}", fix="a size is a positive integer")

    @staticmethod
    def of(mesh: Mesh | DeviceMesh | Mapping[str, int] | int) -> Mesh:
        """Makes a mesh of what users write: a dict, a torch ``DeviceMesh``, or a number of ranks.

        >>> Mesh.of({"dp": 2, "tp": 2})
        Mesh(names=('dp', 'tp'), sizes=(2, 2))
        """
        if isinstance(mesh, Mesh):
            return mesh
        if isinstance(mesh, int):
            return Mesh(("tp",), (mesh,))
        if isinstance(mesh, Mapping):
            return Mesh(tuple(mesh), tuple(mesh.values()))
        names = getattr(mesh, "mesh_dim_names", None)
        if hasattr(mesh, "mesh"):
            if not names:
                raise MeshError("the DeviceMesh has no axis names", fix="make it with mesh_dim_names=(...)")
            if mesh.mesh.flatten().tolist() != list(range(mesh.mesh.numel())):
                raise MeshError(
                    f"the DeviceMesh holds the ranks {mesh.mesh.tolist()}, not 0, 1, 2, ... in order",
                    fix="give the whole mesh that init_device_mesh made",
                )
            return Mesh(tuple(names), tuple(mesh.mesh.shape))
        raise MeshError(f"cannot make a mesh of {mesh!r}", fix="give a dict such as {'dp': 2, 'tp': 2}")

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.names)

    def index(self, name: str) -> int:
        """The position of the axis ``name``; ``MeshError`` where there is none."""
        if name not in self.names:
            raise MeshError(
                f"there is no mesh axis {name!r}; the axes are {', '.join(map(repr, self.names))}",
                fix=f"use one of them, or add {name!r} to the plan's mesh",
            )
        return self.names.index(name)

    def size(self, name: str) -> int:
        """The number of ranks along the axis ``name``."""
        return self.sizes[self.index(name)]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where ``rank`` stands on every axis."""
        if not 0 <= rank < self.world_size:
            raise MeshError(f"rank {rank} is outside of the mesh {self}, which has {self.world_size} ranks")
        out = []
        for size in reversed(self.sizes):
            rank, position = divmod(rank, size)
            out.append(position)
        return tuple(reversed(out))

    def rank(self, coordinate: tuple[int, ...]) -> int:
        """The rank that stands at ``coordinate``."""
        out = 0
        if len(coordinate) != self.ndim or not all(0 <= p < s for p, s in zip(coordinate, self.sizes, strict=True)):
            raise MeshError(f"there is no coordinate {coordinate} in the mesh {self}")
        for position, size in zip(coordinate, self.sizes, strict=True):
            out = out * size + position
        return out

    def ranks_along(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on the axis ``name`` only, in order, itself included."""
        axis = self.index(name)
        at = self.coordinate(rank)
        return tuple(self.rank((*at[:axis], i, *at[axis + 1 :])) for i in range(self.sizes[axis]))

    def groups_along(self, name: str) -> Iterator[tuple[int, ...]]:
        """Every group of ranks that communicates along the axis ``name``."""
        axis = self.index(name)
        ranges = [range(size) if i != axis else range(1) for i, size in enumerate(self.sizes)]
        for at in itertools.product(*ranges):
            yield self.ranks_along(name, self.rank(at))

    def __or__(self, other: Mesh) -> Mesh:
        """The axes of both; an axis that both have must have one size."""
        sizes = dict(zip(self.names, self.sizes, strict=True))
        for name, size in zip(other.names, other.sizes, strict=True):
            if sizes.setdefault(name, size) != size:
                raise MeshError(f"mesh axis {name!r} has size {sizes[name]} in one plan and {size} in the other")
        return Mesh(tuple(sizes), tuple(sizes.values()))

    def seen_by(self, rank: int) -> RankMesh:
        """The mesh as ``rank`` sees it."""
        return RankMesh(self.names, self.sizes, self.coordinate(rank))

    def __str__(self) -> str:
        return "{" + ", ".join(f"{n}: {s}" for n, s in zip(self.names, self.sizes, strict=True)) + "}"


@dataclass(frozen=True)
class RankMesh(Mesh):
    """A mesh as one rank sees it.

    Attributes:
        at: the rank's coordinate.
    """

    at: tuple[int, ...] = ()
