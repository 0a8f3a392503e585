"""Which calls are one class: those that compute alike.

In: the tree of calls.   Out: classes, inner ones first, each with the calls that it serves.

Two calls are alike where their operators are equal, on arguments of equal types, in equal order; weights are compared
by their names within the module, other values by the order in which they are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.codegen.regions import Region, is_empty, walk
from fxshard.codegen.types import describe_local
from fxshard.ir.info import has_info, info_of
from fxshard.mesh import Mesh


@dataclass(eq=False)
class Class:
    """One generated class: all the calls that compute alike.

    Attributes:
        region: the call that the class is written from.
        number: its place in the file.
        needs_weights: whether it, or a class inside, reads weights of its module.
        name: its name in the file.
        paths: the modules whose calls it serves.
    """

    region: Region
    number: int
    needs_weights: bool
    name: str = ""
    paths: list[str] = field(default_factory=list)


class Classes:
    """All classes of a file.

    Attributes:
        all: the classes, inner ones first.
    """

    def __init__(self, root: Region, mesh: Mesh, taken: Set[str]) -> None:
        self.all: list[Class] = []
        self._of: dict[int, Class] = {}
        known: dict[Any, Class] = {}
        for region in walk(root):
            key = _Key(self, region, mesh).value
            found = known.get(key)
            if found is None:
                found = known[key] = Class(region, len(self.all), self._needs_weights(region))
                self.all.append(found)
            elif len(found.paths) == 1:
                found.region = region  # the second layer reads what a layer gives: better names than the first one's
            found.paths.append(region.path)
            self._of[id(region)] = found
        self._name(set(taken))

    def of(self, region: Region) -> Class:
        """The class of a call."""
        return self._of[id(region)]

    def _needs_weights(self, region: Region) -> bool:
        return any(self.of(child).needs_weights for child in region.children()) or any(
            True for _ in own_weights(region)
        )

    def _name(self, taken: set[str]) -> None:
        for each in self.all:
            each.name, count = each.region.class_name, 1
            while each.name in taken:
                count += 1
                each.name = f"{each.region.class_name}{count}"
            taken.add(each.name)


def own_weights(region: Region) -> Iterator[str]:
    """The names of the tensors that a call reads from its own module, for itself or for a call inside, or returns."""
    reads = [item.inputs if isinstance(item, Region) else item.all_input_nodes for item in region.items]
    for nodes in (*reads, region.outputs):
        for node in nodes:
            if node.op == "get_attr" and node not in region.inputs and not is_empty(node):
                yield str(node.target)


class _Key:
    """What two calls must share to be one class."""

    def __init__(self, classes: Classes, region: Region, mesh: Mesh) -> None:
        self.index: dict[fx.Node, int] = {}
        self.prefix = len(region.path) + 1 if region.path else 0
        for node in region.inputs:
            self._new(node)
        inputs = tuple(describe_local(n, mesh) for n in region.inputs)
        items: list[tuple[Any, ...]] = []
        for item in region.items:
            if isinstance(item, Region):
                items.append(
                    (
                        classes.of(item).number,
                        item.path[self.prefix :],
                        item.checkpoint,
                        item.function,
                        item.way and (item.way[1], self._encode(item.decision)),
                        tuple(self._encode(n) for n in item.inputs),
                    )
                )
                for node in item.outputs:
                    self._new(node)
            else:
                placed = info_of(item).outputs if has_info(item) else None
                kwargs = tuple((k, self._encode(v)) for k, v in item.kwargs.items())
                items.append((item.target, self._encode(item.args), kwargs, placed))
                self._new(item)
        outputs = tuple(self._encode(n) for n in region.outputs)
        self.value = (region.class_name, inputs, tuple(items), outputs, region.parent is None)

    def _new(self, node: fx.Node) -> None:
        self.index[node] = len(self.index)

    def _encode(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            found = self.index.get(value)
            if found is not None:
                return ("%", found)
            if value.op != "get_attr":
                return ("outer", value.name)
            tensor = value.meta.get("val")
            shape = str(tuple(tensor.shape)) + str(tensor.dtype) if isinstance(tensor, torch.Tensor) else ""
            return ("w", "" if is_empty(value) else str(value.target)[self.prefix :], shape)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._encode, value))
        if isinstance(value, slice):
            return ("slice", self._encode(value.start), self._encode(value.stop), self._encode(value.step))
        if isinstance(value, dict):
            return tuple((k, self._encode(v)) for k, v in value.items())
        if value is None or isinstance(value, str):
            return value
        return type(value), str(value)
