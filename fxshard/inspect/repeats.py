"""What the backward pass computes anew, and communicates again: the calls that ``torch.utils.checkpoint`` surrounds."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import saved_tensors_hooks

from fxshard.codegen.checkpointed import nodes_of
from fxshard.codegen.regions import Region, regions_of, walk
from fxshard.ir.conversions import CONVERSIONS
from fxshard.ir.info import has_info, info_of, is_float
from fxshard.ir.origins import checkpoint_of, module_of
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placements, local_shape
from fxshard.runtime import collectives as run
from fxshard.torch_internals import OpOverload


def _is_marked(node: fx.Node) -> bool:
    return any(checkpoint_of(key) is not None for key in node.meta.get("nn_module_stack") or ())


def computes_anew(graph: fx.Graph) -> bool:
    """Whether there is any checkpointed call."""
    return any(map(_is_marked, graph.nodes))


def _calls(graph: fx.Graph) -> list[Region]:
    if not computes_anew(graph):
        return []
    return [region for region in walk(regions_of(graph)) if region.checkpoint]


Call = tuple[fx.Node, list[fx.Node]]
"""A call that is computed anew: the node at which it is asked for, and its nodes up to the last that runs again."""


def computed_again(compiled: Compiled, flows: Mapping[fx.Node, bool]) -> list[Call]:
    """The calls that the backward pass computes anew.

    What a call kept is asked for by the last of its operators that keep something for their gradient, and is computed
    anew up to there. Where the ranks' programs differ, that is the end of the call (``runtime/recompute.py``).

    Args:
        compiled: the program.
        flows: through which nodes a gradient flows.
    """
    out, mesh = [], compiled.mesh
    for region in _calls(compiled.graph):
        nodes = list(nodes_of(region))
        last = len(nodes)
        while last and not (flows[nodes[last - 1]] and (compiled.is_uneven or _keeps(nodes[last - 1], flows, mesh))):
            last -= 1
        if last:
            out.append((nodes[last - 1], nodes if compiled.is_uneven else nodes[:last]))
    return out


def kept_by(
    weight: fx.Node, flows: Mapping[fx.Node, bool], calls: Mapping[fx.Node, fx.Node], mesh: Mesh
) -> list[fx.Node]:
    """What keeps the memory of a weight: operators, for their gradients, and calls that are computed anew.

    Args:
        weight: it, or a view of it.
        flows: through which nodes a gradient flows.
        calls: the nodes of calls that are computed anew -> which call.
        mesh: over which the weight is split.

    Returns:
        A node for each time that the backward pass asks for it, a call's being the one at which the call is asked for.
    """
    out: list[fx.Node] = []
    entered: set[fx.Node] = set()
    for reader in weight.users:
        if reader in calls:  # of what is within the call nothing is kept, but what it is given
            entered.update({calls[reader]} - {calls.get(weight)})
        elif reader.target in (run.vary, run.vary_weight, operator.getitem):  # the same memory
            out += kept_by(reader, flows, calls, mesh)
        elif reader.op == "call_function" and reader.target not in CONVERSIONS:
            kept, is_view = _tried(reader, flows, mesh)
            if flows[reader]:
                out += [reader] * (1 if kept is None else kept.count(weight))
            out += kept_by(reader, flows, calls, mesh) if is_view else []
    return [*out, *entered]


def _keeps(node: fx.Node, flows: Mapping[fx.Node, bool], mesh: Mesh) -> bool:
    """Whether autograd keeps anything for the gradient of a call."""
    return node.target not in CONVERSIONS and _tried(node, flows, mesh)[0] != []


def _tried(node: fx.Node, flows: Mapping[fx.Node, bool], mesh: Mesh) -> tuple[list[fx.Node | None] | None, bool]:
    """What autograd keeps for the gradient of a call, operands, or None for another value; whether it views an operand.

    It is asked, by a call without data; where that cannot be, nothing is known: None.
    """
    if not isinstance(node.target, OpOverload):
        return None, False
    kept: list[fx.Node | None] = []
    given: dict[int, fx.Node] = {}
    dtypes: dict[int, torch.dtype] = {}

    def pack(x: torch.Tensor) -> None:
        kept.append(given.get(x.untyped_storage()._cdata))

    def empty(operand: fx.Node) -> Any:
        placed = iter(info_of(operand).outputs if has_info(operand) else ())
        made = fx.node.map_aggregate(
            operand.meta["val"], lambda value: _empty(value, next(placed, ()), mesh, flows.get(operand, False))
        )
        if isinstance(made, torch.Tensor):
            given[made.untyped_storage()._cdata] = operand
            dtypes[made.untyped_storage()._cdata] = made.dtype
        return made

    try:
        with torch.enable_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), empty)
            with saved_tensors_hooks(pack, lambda _: torch.zeros(())):
                out = node.target(*args, **kwargs)
    except Exception:
        return None, False
    made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
    return kept, any(dtypes.get(x.untyped_storage()._cdata) == x.dtype for x in made)


def _empty(value: Any, placed: Placements, mesh: Mesh, flows: bool) -> Any:
    """What a rank holds of a value, without data, and with its dims in the same order in memory."""
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, int | float | bool) else getattr(value.node, "hint", value)
    sizes = [_hint(size) for size in (local_shape(value.shape, placed, mesh.sizes) if placed else value.shape)]
    strides = [_hint(stride) for stride in value.stride()]
    order = sorted(range(len(sizes)), key=lambda dim: -strides[dim])
    made = torch.empty([sizes[dim] for dim in order], dtype=value.dtype, device="meta")
    made = made.permute([order.index(dim) for dim in range(len(sizes))])
    return made.requires_grad_() if flows and is_float(value) else made


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def notes_on(compiled: Compiled, flows: Mapping[fx.Node, bool]) -> Iterator[str]:
    """What stands apart from its checkpointed call, and so keeps what it computes."""
    inside = {node for region in _calls(compiled.graph) for node in nodes_of(region)}
    apart = [n for n in compiled.graph.nodes if _is_marked(n) and flows[n] and n not in inside]
    apart = [n for n in apart if _keeps(n, flows, compiled.mesh)]
    if apart:
        where = f"{apart[0].name} in {module_of(apart[0]) or 'the model'}"
        yield f"{len(apart)} operators run apart from the rest of their checkpointed calls, first {where}, and are kept"
