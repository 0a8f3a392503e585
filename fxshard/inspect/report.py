"""What a compiled program holds, for people: the table, the list of collectives, the explanation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import fx

from fxshard.codegen.emit import describe_value
from fxshard.passes.capture import module_of, source_of
from fxshard.passes.insert_collectives import CONVERSIONS
from fxshard.passes.pipeline import Compiled
from fxshard.passes.typing import info_of
from fxshard.placement import describe_all, is_shard
from fxshard.runtime import collectives as run


@dataclass(frozen=True)
class Collective:
    """One collective of one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter or all_to_all.
        axis: the mesh axis.
        phase: forward or backward.
        num_bytes: the payload: the bytes of one rank's full-size tensor along the axis.
        module: the module whose value is communicated.
        source: the line of the user's source.
        reason: why it is there, in a sentence.
    """

    kind: str
    axis: str
    phase: str
    num_bytes: int
    module: str
    source: str
    reason: str


FORWARD = {
    run.all_reduce: "all_reduce",
    run.all_gather: "all_gather",
    run.reduce_scatter: "reduce_scatter",
    run.all_to_all: "all_to_all",
}


def backward_kind(node: fx.Node) -> str | None:
    """The collective in the gradient of a conversion; None where there is none."""
    if node.target is run.all_gather:
        return "reduce_scatter" if len(node.args) > 2 else None
    return {
        run.vary: "all_reduce",
        run.reduce_scatter: "all_gather",
        run.chunk: "all_gather",
        run.all_to_all: "all_to_all",
    }.get(node.target)  # type: ignore[arg-type]


def needs_grad(compiled: Compiled) -> dict[fx.Node, bool]:
    """Through which nodes a gradient really flows: from parameters that require one, and such inputs."""
    examples = dict(zip(compiled.captured.placeholders, compiled.captured.example_inputs, strict=True))
    out: dict[fx.Node, bool] = {}
    for node in compiled.graph.nodes:
        if node.op == "placeholder":
            leaf = examples.get(str(node.name))
            out[node] = bool(leaf and leaf.requires_grad)
        elif node.op == "get_attr":
            out[node] = bool(node.meta.get("requires_grad"))
        else:
            flows = node.target is not torch.ops.aten.detach.default
            out[node] = flows and any(out.get(n, False) for n in node.all_input_nodes) and _is_float(node)
    return out


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in values)


def full_bytes(node: fx.Node, compiled: Compiled) -> int:
    """The bytes of the value that a conversion gives, whole along its own axis, local along the others."""
    value = node.meta["val"]
    axis = compiled.mesh.index(str(node.args[1]))
    size = value.element_size()
    for dim in value.shape:
        size *= int(dim) if isinstance(dim, int) else int(dim.node.hint)
    for a, placement in enumerate(info_of(node).placements):
        if a != axis and is_shard(placement):
            size //= compiled.mesh.sizes[a]
    return size


def _conversions(compiled: Compiled) -> Iterator[fx.Node]:
    return (n for n in compiled.graph.nodes if n.target in CONVERSIONS and n.target is not run.concat)


def collectives_of(compiled: Compiled) -> list[Collective]:
    """Every collective of one step: forward in order, then backward in the order in which gradients flow."""
    flows = needs_grad(compiled)
    nodes = list(_conversions(compiled))
    out = [_record(n, FORWARD[n.target], "forward", compiled) for n in nodes if n.target in FORWARD]  # type: ignore[index]
    for node in reversed(nodes):
        kind = backward_kind(node)
        if kind is not None and flows[node]:
            out.append(_record(node, kind, "backward", compiled))
    return out


def _record(node: fx.Node, kind: str, phase: str, compiled: Compiled) -> Collective:
    return Collective(
        kind, str(node.args[1]), phase, full_bytes(node, compiled), module_of(node), source_of(node), reason(node, phase)
    )


def reason(node: fx.Node, phase: str) -> str:
    """Why a conversion is there."""
    axis = node.args[1]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    why = node.meta.get("fxshard_reason", {})
    reader = why.get("reader", "its reader")
    if phase == "forward":
        return f"%{source.name} is {why.get('from')} on axis {axis}; {reader} needs it {why.get('to')}"
    if node.target is run.vary or node.target is run.all_gather:
        return f"every rank of axis {axis} computes a part of the gradient of %{source.name}: {reader} is split"
    return f"every rank of axis {axis} holds a part of the gradient of %{source.name}, which needs it whole"


def table(compiled: Compiled) -> str:
    """The program as a table, an operator a line."""
    rows = []
    for node in compiled.graph.nodes:
        if node.op != "call_function":
            continue
        sources = [n for n in node.all_input_nodes if n.op != "get_attr" or True]
        placed_in = ", ".join(describe_all(info_of(n).placements, compiled.mesh.names) for n in sources if _typed(n))
        kind = FORWARD.get(node.target, "") if node.target in CONVERSIONS else ""  # type: ignore[arg-type]
        back = backward_kind(node) if node.target in CONVERSIONS else None
        both = " / ".join(x for x in (kind, f"backward {back}" if back else "") if x)
        placed = describe_all(info_of(node).placements, compiled.mesh.names) if _typed(node) else ""
        size = f"{full_bytes(node, compiled):,}" if both else ""
        rows.append((_op_name(node), module_of(node), placed_in, placed, describe_value(node, compiled.mesh), both, size))
    headers = ("op", "module", "in", "out", "local shape", "collective", "bytes")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _typed(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _op_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return str(getattr(node.target, "__name__", node.target))


def explain(compiled: Compiled) -> str:
    """Every collective in a sentence."""
    records = collectives_of(compiled)
    if not records:
        return "No collectives: every rank computes the whole model."
    lines = [*compiled.resolved.notes]
    for record in records:
        where = f"  {record.module or 'the model'}" + (f"  {record.source}" if record.source else "")
        lines.append(f"{record.phase:<8} {record.kind} of {record.num_bytes:,} bytes on {record.axis}: {record.reason}")
        lines.append(where)
    return "\n".join(lines)
