"""Mesh: rank and coordinate arithmetic, what users write for one, and the errors."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxshard.errors import MeshError
from fxshard.mesh import Mesh

AXES = ("pp", "dp", "cp", "tp")


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    names = draw(st.permutations(AXES).flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n])))
    sizes = draw(st.lists(st.integers(1, 5), min_size=len(names), max_size=len(names)))
    return Mesh(tuple(names), tuple(sizes))


@given(meshes())
def test_rank_and_coordinate_are_inverse(mesh: Mesh) -> None:
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(coordinate) for coordinate in coordinates] == list(range(mesh.world_size))
    assert len(set(coordinates)) == mesh.world_size
    assert all(0 <= i < size for at in coordinates for i, size in zip(at, mesh.sizes, strict=True))


@given(meshes())
def test_ranks_are_numbered_as_torch_numbers_them(mesh: Mesh) -> None:
    """``init_device_mesh`` lays ``arange(world_size)`` out over the sizes."""
    layout = torch.arange(mesh.world_size).reshape(mesh.sizes)
    assert all(layout[mesh.coordinate(rank)] == rank for rank in range(mesh.world_size))
    for axis, name in enumerate(mesh.names):
        groups = layout.movedim(axis, -1).reshape(-1, mesh.sizes[axis])
        assert [list(group) for group in mesh.groups_along(name)] == groups.tolist()


@given(meshes(), st.data())
def test_ranks_along_an_axis_differ_on_that_axis_only(mesh: Mesh, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, mesh.world_size - 1))
    name = data.draw(st.sampled_from(mesh.names))
    axis, at = mesh.index(name), mesh.coordinate(rank)
    along = mesh.ranks_along(name, rank)
    assert along[at[axis]] == rank
    assert len(along) == mesh.size(name)
    for position, other in enumerate(along):
        assert mesh.coordinate(other) == (*at[:axis], position, *at[axis + 1 :])


@given(meshes())
def test_groups_along_an_axis_are_a_partition(mesh: Mesh) -> None:
    for name in mesh.names:
        ranks = [rank for group in mesh.groups_along(name) for rank in group]
        assert sorted(ranks) == list(range(mesh.world_size))


@given(meshes())
def test_sizes(mesh: Mesh) -> None:
    assert mesh.world_size == math.prod(mesh.sizes)
    assert mesh.ndim == len(mesh.names) == len(mesh.sizes)
    assert {name: mesh.size(name) for name in mesh.names} == dict(zip(mesh.names, mesh.sizes, strict=True))
    assert Mesh.of({name: mesh.size(name) for name in mesh.names}) == mesh
    assert mesh | mesh == mesh


@given(meshes(), st.data())
def test_union_keeps_the_left_order_and_adds_the_rest(mesh: Mesh, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=mesh.ndim, max_size=mesh.ndim).filter(any))
    part = Mesh.of({name: mesh.size(name) for name, keep in zip(mesh.names, kept, strict=True) if keep})
    assert mesh | part == mesh
    assert set((part | mesh).names) == set(mesh.names)
    assert (part | mesh).names[: part.ndim] == part.names
    assert (part | mesh).world_size == mesh.world_size


def test_union_of_two_meshes() -> None:
    assert Mesh.of({"dp": 2}) | Mesh.of({"tp": 4}) == Mesh(("dp", "tp"), (2, 4))
    assert Mesh.of({"tp": 4}) | Mesh.of({"dp": 2}) == Mesh(("tp", "dp"), (4, 2))


def test_of_what_users_write() -> None:
    mesh = Mesh(("dp", "tp"), (2, 4))
    assert Mesh.of(mesh) is mesh
    assert Mesh.of({"dp": 2, "tp": 4}) == mesh
    assert Mesh.of(4) == Mesh(("tp",), (4,))


def test_of_a_device_mesh() -> None:
    layout = torch.arange(8).reshape(2, 4)
    device_mesh: Any = SimpleNamespace(mesh=layout, mesh_dim_names=("dp", "tp"))
    mesh = Mesh.of(device_mesh)
    assert mesh == Mesh(("dp", "tp"), (2, 4))
    assert all(type(size) is int for size in mesh.sizes)


def test_text() -> None:
    assert str(Mesh.of({"dp": 2, "tp": 4})) == "{dp: 2, tp: 4}"


def test_is_frozen_and_hashable() -> None:
    mesh = Mesh.of({"dp": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        mesh.sizes = (4,)  # type: ignore[misc]
    assert len({mesh, Mesh.of({"dp": 2}), Mesh.of({"dp": 4})}) == 2


def no_names(_: None = None) -> Any:
    return SimpleNamespace(mesh=torch.arange(2), mesh_dim_names=None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mesh((), ()), "a mesh needs one size for each of its axes, got names () and sizes ()"),
        (lambda: Mesh.of({}), "a mesh needs one size for each of its axes, got names () and sizes ()"),
        (
            lambda: Mesh(("dp",), (2, 2)),
            "a mesh needs one size for each of its axes, got names ('dp',) and sizes (2, 2)",
        ),
        (
            lambda: Mesh(("dp", "dp"), (2, 2)),
            "mesh axis names repeat: ('dp', 'dp')\n  fix     give each axis its own name",
        ),
        (lambda: Mesh.of({"dp": 0}), "mesh axis 'dp' has size 0\n  fix     a size is a positive integer"),
        (lambda: Mesh.of({"dp": -2}), "mesh axis 'dp' has size -2\n  fix     a size is a positive integer"),
        (lambda: Mesh.of({"dp": True}), "mesh axis 'dp' has size True\n  fix     a size is a positive integer"),
        (
            lambda: Mesh(("dp",), (2.0,)),  # type: ignore[arg-type]
            "mesh axis 'dp' has size 2.0\n  fix     a size is a positive integer",
        ),
        (lambda: Mesh.of(0), "mesh axis 'tp' has size 0\n  fix     a size is a positive integer"),
        (
            lambda: Mesh.of("dp"),  # type: ignore[arg-type]
            "cannot make a mesh of 'dp'\n  fix     give a dict such as {'dp': 2, 'tp': 2}",
        ),
        (
            lambda: Mesh.of(no_names()),
            "the DeviceMesh has no axis names\n  fix     make it with mesh_dim_names=(...)",
        ),
        (
            lambda: Mesh.of({"dp": 2, "tp": 2}).size("ep"),
            "there is no mesh axis 'ep'; the axes are 'dp', 'tp'"
            "\n  fix     use one of them, or add 'ep' to the plan's mesh",
        ),
        (
            lambda: Mesh.of({"dp": 2}).coordinate(2),
            "rank 2 is outside of the mesh {dp: 2}, which has 2 ranks",
        ),
        (
            lambda: Mesh.of({"dp": 2}).coordinate(-1),
            "rank -1 is outside of the mesh {dp: 2}, which has 2 ranks",
        ),
        (
            lambda: Mesh.of({"dp": 2}) | Mesh.of({"dp": 4}),
            "mesh axis 'dp' has size 2 in one plan and 4 in the other",
        ),
    ],
)
def test_errors_say_what_and_how_to_mend(make: Any, text: str) -> None:
    with pytest.raises(MeshError) as caught:
        make()
    assert str(caught.value) == text
