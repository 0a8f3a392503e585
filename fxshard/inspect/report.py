"""What a compiled program holds, for people: the table, the list of collectives, the explanation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from tabulate import tabulate
from torch import fx

from fxshard.codegen.text import span
from fxshard.codegen.types import describe_local, describe_type, describe_value
from fxshard.inspect.fallbacks import fallbacks_of
from fxshard.inspect.reasons import home_of, op_name, reason, source_of_value, without_layers
from fxshard.inspect.repeats import computed_again, computes_anew, kept_by, notes_on
from fxshard.ir.conversions import CONVERSIONS, FORWARD, backward_kind
from fxshard.ir.info import has_info, info_of, is_float, local_bytes, values_of
from fxshard.ir.origins import module_of, source_of
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placement, Varying, cut_of, is_partial, is_shard
from fxshard.rules.lookup import is_constant
from fxshard.runtime import collectives as run
from fxshard.runtime.collective_matmul import cuts
from fxshard.runtime.draws import draw_in_place
from fxshard.runtime.ring import ring_attention
from fxshard.schedule.stored_weights import Packed
from fxshard.training.buckets import cut_in_buckets, elements


@dataclass(frozen=True)
class Collective:
    """One collective of one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, or rotate.
        axis: the mesh axis; ``dp+cp`` where it goes over two at once.
        phase: forward or backward.
        num_bytes: the payload: the bytes of one rank's full-size tensor along the axis, without the padding of parts
            that differ in size; of a rotation, what a rank passes on to the next one.
        module: the module whose value is communicated.
        source: the line of the user's source.
        reason: why it is there, in a sentence.
        value: the type of that tensor, e.g. ``f32[4, 16, 64]``.
        again: it is one of the forward pass, and communicates again in the backward pass, where its call is computed
            anew, or a weight is needed that was not kept.
    """

    kind: str
    axis: str
    phase: str
    num_bytes: int
    module: str
    source: str
    reason: str
    value: str = ""
    again: bool = False


def needs_grad(compiled: Compiled) -> dict[fx.Node, bool]:
    """Through which nodes a gradient really flows: from the outputs to parameters that require one, and such inputs."""
    examples = dict(zip(compiled.captured.placeholders, compiled.captured.example_inputs, strict=True))
    out: dict[fx.Node, bool] = {}
    for node in compiled.graph.nodes:
        if node.op == "placeholder":
            leaf = examples.get(str(node.name))
            out[node] = bool(leaf and leaf.requires_grad)
        elif node.op == "get_attr":
            out[node] = bool(node.meta.get("requires_grad"))
        else:
            flows = node.target not in (run.dropout_mask, draw_in_place) and not is_constant(node.target)
            out[node] = flows and any(out.get(n, False) for n in node.all_input_nodes) and _is_float(node)
    reached = set(next(iter(reversed(compiled.graph.nodes))).all_input_nodes)
    for node in reversed(compiled.graph.nodes):
        out[node] = out[node] and node in reached
        reached.update(node.all_input_nodes if out[node] else ())
    return out


def _is_float(node: fx.Node) -> bool:
    return "val" not in node.meta or any(map(is_float, values_of(node)))  # of some lowered calls nobody noted the type


def full_bytes(node: fx.Node, compiled: Compiled) -> int:
    """The bytes of the value that a conversion gives, whole along its own axis, local along the others."""
    return local_bytes(node, compiled.mesh, compiled.mesh.index(str(node.args[1])))


def _conversions(compiled: Compiled) -> Iterator[fx.Node]:
    return filter(_communicates, compiled.graph.nodes)


def _communicates(node: fx.Node) -> bool:
    """Whether a node communicates, forward or backward."""
    return node.target in CONVERSIONS or node.target is ring_attention


def collectives_of(compiled: Compiled) -> list[Collective]:
    """Every collective of one step: forward in order, then backward in the order in which gradients flow."""
    flows = needs_grad(compiled)
    again = _repeats(compiled, flows)
    nodes = dict.fromkeys(_conversions(compiled))
    forward: dict[fx.Node, list[Collective]] = {}
    packs = {node: pack.nodes for pack in compiled.packs for node in pack.nodes}
    for node in nodes:
        mine = _records(node, FORWARD[node.target], "forward", compiled) if node.target in FORWARD else []
        if node in packs:
            mine = [_packed(mine[0], packs[node], compiled)] if node is packs[node][0] else []
        forward[node] = mine + _rotations(node, "forward", compiled)
    out = [record for records in forward.values() for record in records]
    buckets = buckets_of(compiled, flows)
    for node in reversed(compiled.graph.nodes):
        out += [_again(record, why) for n, why in again.get(node, ()) for record in forward.get(n, ())]
        if node not in nodes:
            continue
        out += _rotations(node, "backward", compiled) if flows[node] else []
        kind = backward_kind(node)
        if node.target is run.vary_weight:
            out += buckets.get(node, [])
        elif node in packs:
            if kind is not None and node is packs[node][0] and any(flows[each] for each in packs[node]):
                out.append(_packed(_record(node, kind, "backward", compiled), packs[node], compiled))
        elif kind is not None and flows[node]:
            out += _records(node, kind, "backward", compiled)
    return out


ANEW = "its call is computed anew in the backward pass"
REGATHERED = "it was not kept whole for the gradient of what it is multiplied with"


def _repeats(compiled: Compiled, flows: Mapping[fx.Node, bool]) -> dict[fx.Node, list[tuple[fx.Node, str]]]:
    """Which conversions of the forward pass run again where the backward pass reaches a node, and why."""
    anew = computed_again(compiled, flows)
    out = {at: [(node, ANEW) for node in nodes if _communicates(node)] for at, nodes in anew}
    calls = {node: at for at, nodes in anew for node in nodes}
    places = {node: place for place, node in enumerate(compiled.graph.nodes)}
    packs = {node: pack for pack in compiled.packs for node in pack.nodes}
    asked: dict[int, list[tuple[int, Packed]]] = {}  # of each lane: where in the program, for which pack
    for node in compiled.graph.nodes if compiled.regathers else ():
        if node.target is run.gather_weight:
            keepers = kept_by(node, flows, calls, compiled.mesh)
            if node in packs and len(packs[node].nodes) > 1:
                asked.setdefault(packs[node].lane, []).extend((places[keeper], packs[node]) for keeper in keepers)
            else:
                out.setdefault(node, []).extend([(node, REGATHERED)] * len(keepers))
    for times in asked.values():
        turns = groupby(sorted(times, key=lambda each: -each[0]), lambda each: each[1])
        for pack, _ in turns:
            out.setdefault(pack.nodes[-1], []).append((pack.nodes[0], REGATHERED))
    return out


def _again(record: Collective, why: str) -> Collective:
    return replace(record, phase="backward", again=True, reason=f"{why}; there since {record.reason}")


def buckets_of(compiled: Compiled, flows: Mapping[fx.Node, bool]) -> dict[fx.Node, list[Collective]]:
    """The all-reduces of the gradients of whole weights, by the weight that makes each complete."""
    alike: dict[tuple[tuple[str, ...], torch.dtype], list[fx.Node]] = {}
    for node in reversed(compiled.graph.nodes):
        if node.target is run.vary_weight and node.all_input_nodes[0].meta["requires_grad"]:
            alike.setdefault((tuple(map(str, node.args[1:])), values_of(node)[0].dtype), []).append(node)
    out: dict[fx.Node, list[Collective]] = {}
    for (axes, dtype), nodes in alike.items():
        if not any(flows[node] for node in nodes):
            continue
        wide = run.sum_dtype("all_reduce", dtype, compiled.options.reduce_dtype)
        sizes = [local_bytes(node, compiled.mesh) // dtype.itemsize for node in nodes]
        for start, end, members in cut_in_buckets(sizes, elements(compiled.options.bucket_bytes, wide)):
            first, last = nodes[members[0]], nodes[members[-1]]
            bucket = _bucket(first, last, len(members), compiled)
            value = describe_type(dtype, (end - start,))
            size = (end - start) * wide.itemsize
            out.setdefault(last, []).append(replace(bucket, axis="+".join(axes), num_bytes=size, value=value))
    return out


def _packed(one: Collective, nodes: Sequence[fx.Node], compiled: Compiled) -> Collective:
    """The collective of all the weights that are gathered together, from that of the first."""
    if len(nodes) == 1:
        return one
    names = [str(source_of_value(node).target) for node in (nodes[0], nodes[-1])]
    reason = f"{one.reason}; so are {len(nodes)} small weights, from {names[0]} to {names[1]}"
    dtype = values_of(nodes[0])[0].dtype
    itemsize = one.num_bytes // (full_bytes(nodes[0], compiled) // dtype.itemsize)
    elements_of_all = sum(full_bytes(node, compiled) for node in nodes) // dtype.itemsize
    value = describe_type(dtype, (elements_of_all,))
    return replace(one, source="", reason=reason, num_bytes=elements_of_all * itemsize, value=value)


def _bucket(first: fx.Node, last: fx.Node, count: int, compiled: Compiled) -> Collective:
    """The all-reduce of a bucket, but for its size."""
    one = _record(last, "all_reduce", "backward", compiled)
    if count == 1:
        return one
    names = [str(source_of_value(node).target) for node in (first, last)]
    return replace(one, source="", reason=f"{one.reason}; so are {count} weights, from {names[0]} to {names[1]}")


def _records(node: fx.Node, kind: str, phase: str, compiled: Compiled) -> list[Collective]:
    """The collective of a conversion, or its pieces, where it runs beside products."""
    one, pieces = _record(node, kind, phase, compiled), _pieces(node, compiled)
    if len(pieces) < 2:
        return [one]
    length = pieces[-1][1]
    reason = f"{one.reason}; one of {len(pieces)} pieces, beside the products of the others"
    return [replace(one, num_bytes=one.num_bytes * (end - start) // length, reason=reason) for start, end in pieces]


def _pieces(node: fx.Node, compiled: Compiled) -> list[tuple[int, int]]:
    """How a conversion is cut that runs beside products; nothing where it is not."""
    length = compiled.edges.get(node)
    return [] if length is None else cuts(length, compiled.options.overlap)


def _record(node: fx.Node, kind: str, phase: str, compiled: Compiled) -> Collective:
    axis = str(node.args[1])
    source = source_of_value(node)
    index = compiled.mesh.index(axis)
    module = home_of(source) if source.op == "get_attr" else module_of(node)
    why = reason(node, phase, index, axis)
    dtype = values_of(node)[0].dtype
    wide = run.sum_dtype(kind, dtype, compiled.options.reduce_dtype)
    num_bytes = full_bytes(node, compiled) // dtype.itemsize * wide.itemsize
    value = describe_value(node, compiled.mesh, index)
    return Collective(kind, axis, phase, num_bytes, module, source_of(node), why, value)


def _rotations(node: fx.Node, phase: str, compiled: Compiled) -> list[Collective]:
    """What a ring passes on: keys and values once less than there are ranks, their gradients until they are home."""
    if node.target is not ring_attention:
        return []
    _, key, value, axis = node.args
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    size = compiled.mesh.size(str(axis))
    num_bytes = sum(local_bytes(x, compiled.mesh) for x in (key, value))
    dtype = values_of(key)[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    passed = [num_bytes] * (size - 1)
    if phase == "backward":
        passed += [num_bytes // dtype.itemsize * wide.itemsize] * size
    why = f"queries, keys and values lie split along the sequence, and the plan asks for a ring on axis {axis}"
    where = module_of(node), source_of(node), why, describe_value(key, compiled.mesh)
    return [Collective("rotate", str(axis), phase, size_of_one, *where) for size_of_one in passed]


# --- the table -------------------------------------------------------------------------------------------------------

MODULE_WIDTH = 44
SHAPE_WIDTH = 34


def short(placement: Placement) -> str:
    """A placement as PyTorch abbreviates it.

    >>> from fxshard.placement import Partial, Replicate, Shard
    >>> [short(p) for p in (Shard(1), Replicate(), Partial())]
    ['S(1)', 'R', 'P']
    """
    if is_shard(placement):
        blocks, shares, groups = cut_of(placement)
        text = f";{':'.join(map(str, blocks))}" if blocks != (1,) else ""
        return f"S({placement.dim}{text}{'~' if shares or groups else ''})"
    if isinstance(placement, Varying):
        return "V"
    return "P" if is_partial(placement) else "R"


def _short_all(node: fx.Node) -> str:
    return "".join(map(short, info_of(node).placements)) if _typed(node) else ""


def table(compiled: Compiled) -> str:
    """The program as a table, an operator a line, with what it communicates in the forward and the backward pass."""
    flows = needs_grad(compiled)
    again = Counter(node for nodes in _repeats(compiled, flows).values() for node, _ in nodes)
    packed = {node for pack in compiled.packs for node in pack.nodes if len(pack.nodes) > 1}
    rows = []
    used: set[str] = set()
    for node in compiled.graph.nodes:
        if node.op != "call_function":
            continue
        used |= {letter for p in info_of(node).placements for letter in short(p)} if _typed(node) else set()
        forward = back = ""
        if node.target in CONVERSIONS:
            forward = CONVERSIONS[node.target].forward
            back = (backward_kind(node) or "") if flows[node] else ""
            together = back and node.target is run.vary_weight and compiled.options.bucket_bytes
            if node in packed:
                forward, back = f"{forward}, packed", f"{back}, packed" if back else ""
            pieces = len(_pieces(node, compiled))
            if pieces > 1:
                forward, back = (f"{kind}, {pieces} pieces" if kind else "" for kind in (forward, back))
            repeated = [f"{forward} again"] * again[node] if forward else []
            back = ", ".join(filter(None, [*repeated, "in a bucket" if together else back]))
        num_bytes = f"{full_bytes(node, compiled):,}" if forward or back else ""
        if node.target is ring_attention:
            forward, back = "rotate", "rotate" if flows[node] else ""
            num_bytes = f"{sum(c.num_bytes for c in _rotations(node, 'forward', compiled)):,}"
        placed_in = _joined([_short_all(n) for n in node.all_input_nodes if _typed(n)])
        rows.append(
            (
                op_name(node).removeprefix("aten."),
                _shortened(module_of(node), MODULE_WIDTH),
                placed_in,
                _short_all(node),
                describe_value(node, compiled.mesh)[:SHAPE_WIDTH],
                forward,
                back,
                num_bytes,
            )
        )
    headers = ("op", "module", "in", "out", "local shape", "forward", "backward", "bytes")
    aligned = ("left",) * 7 + ("right",)
    text = tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned if rows else None)
    return "\n".join([text, "", _legend(compiled.mesh, used), *_summary(collectives_of(compiled))])


LEGEND = {
    "R": "R: whole on every rank",
    "S": "S(d): split along dim d",
    "~": "S(d~): in parts of different sizes",
    "P": "P: a partial sum",
    "V": "V: whole, its gradient a partial sum",
}


def _legend(mesh: Mesh, used: set[str]) -> str:
    order = f", one an axis ({', '.join(mesh.names)})" if mesh.ndim > 1 else f" on axis {', '.join(mesh.names)}"
    return f"Placements{order}. " + ". ".join(text for letter, text in LEGEND.items() if letter in used) + "."


def _joined(cells: list[str]) -> str:
    text = ", ".join(cells)
    if len(text) <= SHAPE_WIDTH or len(cells) < 3:
        return text
    return ", ".join(cells[:2]) + f", ... {len(cells) - 2} more"


def _shortened(path: str, width: int) -> str:
    return path if len(path) <= width else f"...{path[3 - width :]}"


def _typed(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and has_info(node) and bool(info_of(node).outputs)


def format_graph(graph: fx.Graph, mesh: Mesh) -> str:
    """A graph as text, a node a line: name, operator, operands, local type and placements.

    Made for what ``program.graph_after(stage)`` returns.
    """
    rows = []
    for node in graph.nodes:
        operator = f"{node.op} {node.target}" if node.op in ("placeholder", "get_attr") else node.op
        operator = op_name(node) if node.op == "call_function" else operator
        arguments = ", ".join(f"%{n.name}" for n in node.all_input_nodes)
        rows.append((f"%{node.name}" if node.op != "output" else "", operator, arguments, describe_local(node, mesh)))
    return tabulate(rows, headers=("node", "op", "operands", "local type"), disable_numparse=True)


# --- the explanation -------------------------------------------------------------------------------------------------


def explain(compiled: Compiled) -> str:
    """Every collective in a paragraph: what, how much, where, and why; those of equal layers as one.

    Above them stand the notes on what the plan could not do, and the calls that gather because no rule covers them.
    """
    records = collectives_of(compiled)
    notes = [*notes_of(compiled), *map(str, fallbacks_of(compiled))]
    if not records:
        return "\n".join([*notes, "No collectives: every rank computes the whole model."])
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for record in records:
        what = (record.phase + " again" * record.again, record.kind, record.axis, record.value, str(record.num_bytes))
        where = (record.source, without_layers(record.module)[0], without_layers(record.reason)[0])
        groups.setdefault((*what, *where), []).append(record)
    paragraphs = ["\n".join(_paragraph(group)) for group in groups.values()]
    return "\n\n".join([*(["\n".join(notes)] if notes else []), *paragraphs, "\n".join(_summary(records))])


def notes_of(compiled: Compiled) -> list[str]:
    """What could not be done as the user asked."""
    more = notes_on(compiled, needs_grad(compiled)) if computes_anew(compiled.graph) else ()
    return [*compiled.resolved.notes, *more]


def _paragraph(group: list[Collective]) -> list[str]:
    first = group[0]
    of = first.value if first.phase == "forward" or first.again else f"the gradient of {first.value}"
    times = f", {len(group)} times" if len(group) > 1 else ""
    where = _merged([r.module for r in group]) or "the model"
    lines = [f"{first.phase}: {first.kind} of {of} over {first.axis}, {first.num_bytes:,} bytes{times}"]
    lines.append(f"  at   {where}" + (f"  ({first.source})" if first.source else ""))
    lines.append(f"  why  {_merged([r.reason for r in group])}")
    return lines


def _merged(texts: list[str]) -> str:
    """Texts that differ in the numbers of layers only, as one."""
    shape, _ = without_layers(texts[0])
    for column in zip(*(without_layers(text)[1] for text in texts), strict=True):
        several = len(set(column)) > 1
        shape = shape.replace("{}", f"{{{span(column)}}}" if several else str(column[0]), 1)
    return shape


def _summary(records: list[Collective]) -> list[str]:
    """Count and bytes, by phase, kind and axis."""
    totals: dict[tuple[str, str, str], tuple[int, int]] = {}
    for r in records:
        count, size = totals.get((r.phase, r.kind, r.axis), (0, 0))
        totals[r.phase, r.kind, r.axis] = count + 1, size + r.num_bytes
    out = []
    for phase in ("forward", "backward"):
        parts = [
            f"{count} {kind} over {axis} ({size:,} bytes)"
            for (p, kind, axis), (count, size) in totals.items()
            if p == phase
        ]
        out.append(f"{phase}: {', '.join(parts) or 'no collectives'}")
    return [f"Total, {line}" for line in out]
