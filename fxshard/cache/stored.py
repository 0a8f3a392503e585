"""A capture as bytes, to be read back in another process, over the tensors of the model there.

Python's pickle, with four kinds of things told apart: operators go by their names, fake tensors by what is known of
them, nodes by their place in the graph, and the model's own tensors, which are not stored, by theirs in the model.
"""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxshard.capture.capture import root_over, tensors_of
from fxshard.capture.captured import Captured
from fxshard.capture.trees import teach
from fxshard.ir.root import Root
from fxshard.runtime.module import find
from fxshard.torch_internals import FakeTensor, FakeTensorMode, Graph, HigherOrderOperator, OpOverload


class NotStorable(Exception):
    """A capture holds something that cannot be given to another process."""


@dataclass(frozen=True)
class _Place:
    """A node as an argument: where it stands in its graph."""

    number: int


class _Node(NamedTuple):
    """A node as an entry of its graph."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class _Graph(NamedTuple):
    """A graph, and those of its attributes that are not the model's own tensors."""

    nodes: list[_Node]
    attributes: dict[str, Any]
    title: str


def dump(captured: Captured, model: nn.Module) -> bytes:
    """A capture of ``model`` as bytes, without the model's own tensors.

    Raises:
        NotStorable: where it holds dynamic sizes, or objects that pickle does not take.
    """
    if captured.ranges:
        raise NotStorable("sizes that may change")
    own, _ = tensors_of(model)
    graph = _as_data(captured.root, set(own))
    if captured.reads.asked:
        raise NotStorable("the values of tensors that are neither inputs nor parameters")
    rest = replace(captured, root=None, signature=None, reads=captured.reads.by_names(model))  # type: ignore[arg-type]
    out = io.BytesIO()
    try:
        _Pickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump((graph, rest))
    except NotStorable:
        raise
    except Exception as error:  # every class refuses in its own way
        raise NotStorable(str(error)) from error
    return out.getvalue()


def restore(data: bytes, model: nn.Module) -> Captured:
    """The capture that ``dump`` wrote, of this model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`")  # torch's own doing, of its specs
        graph, rest = _Unpickler(io.BytesIO(data)).load()
    teach(rest.out_spec)
    nodes, attributes = _from_data(graph)
    own, _ = tensors_of(model)
    for node in nodes.find_nodes(op="get_attr"):
        if node.target not in attributes:
            attributes[node.target] = own[node.target]
    root = root_over(model, attributes, nodes)
    captured: Captured = replace(rest, root=root, signature=inspect.signature(model.forward))
    return captured


def _as_data(root: Root | fx.GraphModule, own: set[str]) -> _Graph:
    places: dict[fx.Node, Any] = {node: _Place(i) for i, node in enumerate(root.graph.nodes)}
    nodes, attributes = [], {}
    for node in root.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: places[each])
        nodes.append(_Node(node.op, node.name, node.target, args, kwargs, node.meta))
        if node.op == "get_attr" and node.target not in own:
            value = find(root, node.target)
            attributes[node.target] = _as_data(value, set()) if isinstance(value, fx.GraphModule) else value
    return _Graph(nodes, attributes, root.title if isinstance(root, Root) else type(root).__name__)


def _from_data(data: _Graph) -> tuple[fx.Graph, dict[str, Any]]:
    graph, made = Graph(), list[fx.Node]()

    def node_at(value: Any) -> Any:
        return made[value.number] if isinstance(value, _Place) else value

    for each in data.nodes:
        args, kwargs = fx.node.map_aggregate((each.args, each.kwargs), node_at)
        made.append(graph.create_node(each.op, each.target, args, kwargs, each.name))
        made[-1].meta = each.meta
    attributes = dict(data.attributes)
    for name, value in attributes.items():
        if isinstance(value, _Graph):
            inner, read = _from_data(value)
            attributes[name] = fx.GraphModule(read, inner, value.title)
    return graph, attributes


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, OpOverload):
            space, _, name = value._schema.name.partition("::")
            return _operator, (space, name, value._overloadname)
        if isinstance(value, HigherOrderOperator):
            return _higher, (value.__name__,)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise NotStorable("a number that is known at run time")
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return None
        if value.layout != torch.strided:
            raise NotStorable(f"a tensor of the layout {value.layout}")
        memory = value.untyped_storage()
        place = memory._cdata, memory.nbytes(), value.storage_offset()
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, place


_WIDEST = torch.complex128.itemsize


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.mode = FakeTensorMode()
        self.memories: dict[int, torch.Tensor] = {}  # what shared memory shares it again

    def persistent_load(self, about: Any) -> torch.Tensor:
        shape, stride, dtype, device, requires_grad, (memory, num_bytes, offset) = about
        with self.mode:
            if memory not in self.memories:
                aligned = -num_bytes // _WIDEST * -_WIDEST
                self.memories[memory] = torch.empty(aligned, dtype=torch.uint8, device=device)
            made = self.memories[memory].view(dtype).as_strided(shape, stride, offset)
        return made.requires_grad_() if requires_grad else made


def _operator(space: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, space), name), overload)


def _higher(name: str) -> Any:
    return getattr(torch.ops.higher_order, name)
