"""check_local: a rank's program, run without values: every result has the shape and the dtype that its node claims.

Nothing is taken from ``localize``: each call gets what the calls before it gave, on the meta device, collectives those
of a rank alone. Calls that are alike run once: of a model with many layers this is nearly free. What only values can
tell (a number read from a tensor, rows that a mask picks), and what has dynamic sizes, is taken as its node claims it.

In: a rank's graph, as it will run.   Out: nothing; ``SoundnessError`` where a node is not what it claims.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from fxshard.errors import SoundnessError
from fxshard.ir.info import has_info, info_of, values_of
from fxshard.ir.origins import where
from fxshard.mesh import RankMesh
from fxshard.placement import Placements, is_grouped, is_shard, local_shape
from fxshard.rules.recipe import is_list
from fxshard.runtime.collectives import Axis
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.lone_rank import alone_axes
from fxshard.torch_internals import FakeTensor, FakeTensorMode

META = torch.device("meta")
REPORT = "this is a bug of fxshard, or of a rule registered for this operator: please report the model and the plan"


class _Unknown:
    """What only values could tell."""


UNKNOWN = _Unknown()


def check_local(graph: fx.Graph, mesh: RankMesh) -> None:
    """Raises where a call gives another shape or dtype than its node claims: see the module's text.

    Raises:
        SoundnessError: a bug of the compiler.
    """
    run = _Run(mesh)
    with torch.no_grad():
        for node in graph.nodes:
            run.visit(node)


class _Run:
    """A program on the meta device.

    Attributes:
        env: what each node gave; what is alike is one object.
        alike: the tensors, by how they lie in memory.
        called: what calls gave: by operator, operands and literals.
        claims: what nodes claim: by shape, dtype and placements.
    """

    def __init__(self, mesh: RankMesh) -> None:
        self.mesh, self.rank = mesh, mesh.rank(mesh.at)
        self.axes: dict[str, Axis] = alone_axes(mesh, self.rank, None, [])
        self.env: dict[fx.Node, Any] = {}
        self.alike: dict[Hashable, torch.Tensor] = {}
        self.called: dict[Hashable, Any] = {}
        self.claims: dict[Hashable, Any] = {}

    def visit(self, node: fx.Node) -> None:
        """Runs a node, and compares what it gives with what it claims."""
        if node.op == "output":
            return
        claimed = self._claimed(node)
        given = self._given(node) if node.op == "call_function" else claimed
        if isinstance(given, Exception):
            raise self._wrong(node, given, claimed)
        if given is UNKNOWN:
            given = claimed
        elif given is not claimed and claimed is not UNKNOWN and _types(given) != _types(claimed):
            if _types(self._run(node, on_device=True)) != _types(claimed):
                raise self._wrong(node, given, claimed)
            given = claimed  # on its own device it gives other sizes than on meta, as embedding_bag does
        self.env[node] = given

    # What a call gives.

    def _given(self, node: fx.Node) -> Any:
        if node.target is TAKEN:
            return UNKNOWN
        operands = [self.env[operand] for operand in node.all_input_nodes]
        if any(operand is UNKNOWN for operand in operands):
            return UNKNOWN
        key: Hashable = (node.target, self._key(node.args), self._key(node.kwargs) if node.kwargs else ())
        try:
            if key in self.called:
                return self.called[key]
        except TypeError:  # a literal that is no key
            return self._run(node)
        given = self.called[key] = self._run(node)
        return given

    def _key(self, value: Any) -> Hashable:
        """What the result of a call depends on, of an argument: operands are told by which object they are."""
        if isinstance(value, fx.Node):
            value = self.env[value]
        if isinstance(value, torch.Tensor):
            return id(value)
        if isinstance(value, list | tuple):
            return type(value), *map(self._key, value)
        if isinstance(value, dict):
            return tuple((name, self._key(each)) for name, each in value.items())
        if isinstance(value, slice):
            return slice, self._key((value.start, value.stop, value.step))
        return type(value), value

    def _run(self, node: fx.Node, on_device: bool = False) -> Any:
        """The results on the meta device, or as the node's own device gives them; an error where there are none.

        How values lie in memory differs between the two: on the node's own device they lie plainly.
        """
        is_ours = getattr(node.target, "__module__", "").startswith("fxshard.")
        device = _device_of(node) if on_device else META
        mode = FakeTensorMode() if on_device else contextlib.nullcontext()

        def given(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return fx.node.map_aggregate(self.env[value], given)
            if isinstance(value, torch.Tensor) and on_device:
                return FakeTensor(mode, torch.empty_like(value, memory_format=torch.contiguous_format), device)
            if isinstance(value, torch.device):
                return device
            return self.axes.get(value, value) if is_ours and isinstance(value, str) else value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), given)
        try:
            with mode:
                made = node.target(*args, **kwargs)  # type: ignore[operator]
            return self._one_object(made)
        except (NotImplementedError, AssertionError):  # torch's own
            return UNKNOWN
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            if _lacks_values(error):
                return UNKNOWN
            return error if on_device else self._run(node, on_device=True)

    def _one_object(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._one_object(each) for each in value]
        if isinstance(value, FakeTensor):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return value
        storage = value.untyped_storage().nbytes() - value.storage_offset() * value.itemsize
        return self.alike.setdefault((value.shape, value.stride(), value.dtype, storage), value)

    # What a node claims.

    def _claimed(self, node: fx.Node) -> Any:
        """What a node's results are by what is noted of it: of what is no tensor, and of rows in groups, unknown."""
        tensors = values_of(node)
        if not all(isinstance(each, torch.Tensor) for each in tensors):
            return UNKNOWN
        placed = info_of(node).outputs if has_info(node) else ()
        if node.op == "call_function" and not placed:
            return UNKNOWN
        if any(is_shard(p) and is_grouped(p) for output in placed for p in output):
            return UNKNOWN
        made = [self._part(each, placed[i] if i < len(placed) else ()) for i, each in enumerate(tensors)]
        return UNKNOWN if any(each is None for each in made) else made if is_list(node) else made[0]

    def _part(self, value: torch.Tensor, placed: Placements) -> torch.Tensor | None:
        try:
            shape, stride = (tuple(map(_hint, each)) for each in (value.shape, value.stride()))
        except (RuntimeError, NotImplementedError):  # of a sparse tensor, or a size that values decide
            return None
        if any(is_shard(p) for p in placed):
            shape, stride = local_shape(shape, placed, self.mesh.sizes, self.mesh.at), ()
        key = shape, stride, value.dtype
        if key not in self.claims:
            options: Any = {"dtype": value.dtype, "device": META}
            made = torch.empty_strided(shape, stride, **options) if stride else torch.empty(shape, **options)
            self.claims[key] = self._one_object(made)
        found: torch.Tensor = self.claims[key]
        return found

    def _wrong(self, node: fx.Node, given: Any, claimed: Any) -> SoundnessError:
        what = f"gives {_text(given)}, and claims {_text(claimed)}"
        if isinstance(given, Exception):
            what = f"cannot run: {str(given).splitlines()[0]}"
        return SoundnessError(f"%{node.name} of rank {self.rank} {what}", **where(node), fix=REPORT)


def _device_of(node: fx.Node) -> torch.device:
    return next((value.device for value in values_of(node) if isinstance(value, torch.Tensor)), META)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    raise NotImplementedError  # a dynamic one: that of the example need not divide as the program cuts it


def _types(value: Any) -> list[object]:
    return [_type(each) for each in value] if isinstance(value, list | tuple) else [_type(value)]


def _type(value: Any) -> object:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _text(value: Any) -> str:
    each = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"{t.dtype}{list(t.shape)}" if isinstance(t, torch.Tensor) else repr(t) for t in each)


def _lacks_values(error: Exception) -> bool:
    """Whether a call cannot run because there are no values."""
    if type(error).__module__.startswith("torch._subclasses"):  # of fake tensors: sizes that values decide, no kernel
        return True
    text = str(error)
    return "meta" in text or "Meta" in text or "data-dependent" in text
