"""A group of the runtime's protocol that issues its collectives through ``spmd_types``, under its type checker.

What fxshard calls a placement, the other system calls a type, along each mesh axis:

    Replicate    I, invariant    equal on all ranks, and so is the gradient
    Varying      R, replicate    equal on all ranks; the gradient is a sum that is pending
    Shard(d)     V, varying      another part on every rank, and of the gradient too
    Partial      P, partial      a sum that is pending; the gradient is equal on all ranks

A collective of the runtime is a pair of names, its own and that of its gradient, and each pair converts from one type
to another: :data:`CONVERSIONS`. The checker infers the types of values, operator by operator; a conversion is refused
where what it is given is of another type than its source. In the backward pass it sees the collectives of gradients:
what reaches one is stamped with the type that is dual to that of the value, and what the collective makes of it must be
of the type that is dual to that of the value which the forward pass converted.

Types are local ones: a part is V, whatever dim is cut, and so is a product over a cut dim; it is taken for P where a
sum is asked for. The types of values are held against what fxshard declares of them in ``tests.judge.program``. With
global types (``dims``) a part is of S(d), and the checker follows d by the rules of ``DTensor``: small programs only.

What the checker is told, because it cannot infer it:

- a number that differs by rank is of V (``Place``): so a masked lookup in a table whose rows are split, and what
  ``chunk`` cuts of a value without gradient, are typed step by step;
- ``ring_attention``, which all ranks compute together (``Group.joint``), is typed as one call, from V to V. How keys
  and values go round is not looked into, nor is its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import _engine_run_backward
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fxshard.mesh import Mesh
from fxshard.runtime.collectives import Axis
from fxshard.runtime.regather import Gathering
from fxshard.runtime.rounds import Arrival, Joint, OnRank, Rotation
from tests.judge.operators import tell

spmd = pytest.importorskip("spmd_types")
checker = pytest.importorskip("spmd_types.checker")
partition_spec_to_shard_types = pytest.importorskip("spmd_types.types").partition_spec_to_shard_types
I, P, R, S, V = spmd.I, spmd.P, spmd.R, spmd.S, spmd.V  # noqa: E741

Type = Any
"""R, I, V or P."""
Types = dict[Any, Type]
"""One for each axis of the checker's."""


@dataclass(frozen=True)
class Conversion:
    """From one type to another.

    Attributes:
        function: of ``spmd_types``.
        source: the type of what is given; ``S`` where it is a part, of the dim at hand.
        target: that of the result, likewise.
    """

    function: Callable[..., torch.Tensor]
    source: Type
    target: Type

    def __call__(self, x: torch.Tensor, axis: Any, dim: int) -> torch.Tensor:
        """Runs it; ``SpmdTypeError`` where ``x`` is not of the source's type."""
        if self.source is P and spmd.get_local_type(x).get(axis) is V:
            x = spmd.reinterpret(x, axis, src=V, dst=P)
        src, dst = (S(dim) if kind is S else kind for kind in (self.source, self.target))
        return self.function(x, axis, src=src, dst=dst)


CONVERSIONS = {
    ("identity", "all_reduce"): Conversion(spmd.convert, I, R),
    ("all_reduce", "identity"): Conversion(spmd.all_reduce, P, I),
    ("all_gather", "own_part"): Conversion(spmd.all_gather, S, I),
    ("all_gather", "reduce_scatter"): Conversion(spmd.all_gather, S, R),
    ("reduce_scatter", "all_gather"): Conversion(spmd.reduce_scatter, P, S),
    ("own_part", "all_gather"): Conversion(spmd.convert, I, S),
    ("all_to_all", "all_to_all"): Conversion(spmd.all_to_all, V, V),
}
"""A collective and that of its gradient -> what it converts."""


class JudgeGroup:
    """One mesh axis's group over a fake process group: see ``collectives.Group``.

    Attributes:
        issued: each collective of the forward pass, with that of its gradient, and the types before and after.
        returned: the types of what the collectives of gradients gave, in the order of the backward pass.
    """

    def __init__(self, axis: Any, index: int, dims: bool) -> None:
        self.axis, self.index, self.dims = axis, index, dims
        self.deferred: dict[tuple[int, tuple[str, ...]], Callable[[torch.Tensor], torch.Tensor]] = {}
        self.regather: Gathering | None = None
        self.packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.issued: list[tuple[str, str, Type, Type]] = []
        self.returned: list[Type] = []

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """See ``Group.run``; nothing is in place."""
        conversion = CONVERSIONS.get((name, backward))
        if conversion is None:
            raise spmd.SpmdTypeError(f"{name} whose gradient is {backward} converts no type to another")
        given = x.contiguous()
        if name == "all_to_all":  # of parts stacked along dim 0; in the checker's form they have a dim of their own
            given = given.reshape(self.axis.size(), -1, *x.shape[1:])
        given = self._watched(given)
        out = conversion(given, self.axis, dim)
        before, after = (spmd.get_local_type(value)[self.axis] for value in (given, out))
        self.issued.append((name, backward, before, after))
        if out.requires_grad:
            _hook(out, _stamp(dual(types_of_value(out))))
        return out.reshape(x.shape) if name == "all_to_all" else out

    def _watched(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, for one reader alone: what reaches it in the backward pass is what that made of a gradient."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        wanted = dual(types_of_value(x))
        with spmd.no_typecheck():
            given = x.view_as(x)
        spmd.assert_type_like(given, x)

        def check(grad: torch.Tensor) -> None:
            found = types_of_value(grad)
            self.returned.append(found.get(self.axis))
            if found != wanted:
                raise spmd.SpmdTypeError(f"a gradient that must be {wanted} is {found}")

        _hook(given, check)
        return given

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """See ``Group.joint``; typed as one call."""
        spmd.register_no_typecheck(OnRank.backward)
        for part in inputs[:3]:
            spmd.assert_type(part, {self.axis: V})

        @spmd.no_typecheck(out_types=dict(spmd.get_local_type(inputs[0])))  # type: ignore[untyped-decorator]
        def run(*given: torch.Tensor) -> torch.Tensor:
            return OnRank.apply(function, self.index, self.axis.size(), _rotated, *given)  # type: ignore[no-any-return,no-untyped-call]

        return run(*inputs)


def types_of_value(value: torch.Tensor) -> Types:
    """What the checker found; of a part S(d), where it follows dims."""
    spec = spmd.get_partition_spec(value)
    return {**spmd.get_local_type(value), **({} if spec is None else partition_spec_to_shard_types(spec))}


def dual(types: Types) -> Types:
    """The types of the gradient of a value with these types."""
    return {axis: kind.backward_type() for axis, kind in types.items()}


def _hook(x: torch.Tensor, hook: Callable[[torch.Tensor], Any]) -> None:
    with spmd.no_typecheck():  # for the checker, to register it is an operator
        x.register_hook(hook)


def _stamp(types: Types) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that gives a gradient its types, on a tensor of its own: what gave it may have given it elsewhere, too."""

    def hook(grad: torch.Tensor) -> torch.Tensor:
        with spmd.no_typecheck():
            own = grad.contiguous().view_as(grad)
        return spmd.assert_type(own, types)

    return hook


def back_propagate(value: torch.Tensor) -> None:
    """From the sum of a value's elements. ``backward()`` would leave the checker for as long as it runs."""
    ones = torch.ones_like(value)
    _engine_run_backward((value,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _rotated(rotation: Rotation) -> Arrival:
    came = [x.new_zeros(shape) for x, shape in zip(rotation.tensors, rotation.shapes, strict=True)]
    return lambda: came


class Place(spmd.Scalar):  # type: ignore[misc]
    """A rank's place along an axis, and what is computed of it: a number that differs by rank.

    As an index of a list, or a bound within square brackets, it is a plain number, whose type is not seen.
    """

    def __index__(self) -> int:
        return int(self.value)

    def _binop(self, other: object, op: Any) -> Any:
        return self._placed(super()._binop(other, op))

    def _rbinop(self, other: object, op: Any) -> Any:
        return self._placed(super()._rbinop(other, op))

    def _placed(self, made: Any) -> Any:
        return Place(made.value, made.local_type) if isinstance(made, spmd.Scalar) else made


@contextmanager
def judging(mesh: Mesh, rank: int, dims: bool = False) -> Iterator[dict[str, Axis]]:
    """Under the type checker, which is strict: the axes of one rank, whose others are not there.

    Args:
        mesh: the mesh.
        rank: which rank.
        dims: whether types are global.
    """
    tell()
    dist.init_process_group("fake", rank=rank, world_size=mesh.world_size, store=FakeStore())
    try:
        device_mesh = init_device_mesh("cpu", mesh.sizes, mesh_dim_names=mesh.names)
        every = {name: spmd.MeshAxis.of(device_mesh.get_group(name)) for name in mesh.names}
        axes: dict[str, Any] = {}
        for name, size, index in zip(mesh.names, mesh.sizes, mesh.coordinate(rank), strict=True):
            place = Place(index, {each: V if other == name else R for other, each in every.items()})
            axes[name] = Axis(name, size, place, JudgeGroup(every[name], index, dims))  # type: ignore[arg-type]
        with spmd.set_current_mesh(device_mesh), checker.typecheck("strict", local=not dims):
            yield axes
    finally:
        dist.destroy_process_group()
