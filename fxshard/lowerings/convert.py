"""Writes one conversion of a value as a node, with all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxshard.ir.conversions import CONVERSIONS
from fxshard.ir.info import Info, info_of, set_info
from fxshard.ir.origins import source_meta
from fxshard.ir.paths import Step, how, inside
from fxshard.lowerings.split_experts import rows_node
from fxshard.mesh import Mesh
from fxshard.placement import Placement, Shard, Varying, cut_of, is_grouped, is_shard
from fxshard.runtime import collectives as run


def emit(new: fx.Graph, node: fx.Node, step: Step, mesh: Mesh, reader: fx.Node) -> fx.Node:
    """Writes one conversion of ``node``, which ``reader`` asks for."""
    axis = mesh.names[step.axis]
    after = step.after[step.axis]
    known = info_of(node)
    info = Info((step.after,), differentiable=known.differentiable)
    within = inside(step.after, step.axis, mesh.sizes)

    def make(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        name = f"{args[0].name}_{CONVERSIONS[function].result}"
        made = new.create_node("call_function", function, args, kwargs, name=name)
        made.meta = {k: v for k, v in node.meta.items() if k not in ("fxshard", "split_bias")}
        if "nn_module_stack" not in made.meta:  # a weight's conversion belongs to the module that reads it
            made.meta |= source_meta(reader)
        made.meta["fxshard_reader"] = source_meta(reader)
        set_info(made, info)
        return made

    if step.function is run.all_gather:
        assert is_shard(step.source)
        said = {"dim": step.source.dim} if step.source.dim else {}
        args = (node, axis, True) if isinstance(after, Varying) else (node, axis)
        return make(run.all_gather, *args, **said, **_told(new, axis, step.source, within))
    if step.function is run.all_to_all:
        lengths = cut_of(step.source).shares, cut_of(after).shares
        dims = step.source.dim, after.dim  # type: ignore[attr-defined]
        return make(run.all_to_all, node, axis, *dims, **({"lengths": lengths} if any(lengths) else {}))
    if step.function in (run.chunk, run.reduce_scatter):
        assert is_shard(after)
        return make(step.function, node, axis, after.dim, **_told(new, axis, after, within))
    return make(step.function, node, axis)


def _told(new: fx.Graph, axis: str, placement: Shard, within: Sequence[tuple[Placement, int]]) -> dict[str, Any]:
    return {"lengths": rows_node(new, axis, placement)} if is_grouped(placement) else how(placement, within)
