"""Resolves a plan against a captured graph: presets and globs become explicit names, checked before anything runs.

A plan fails closed. All its offending entries are listed in one error: a glob that matches nothing (with the nearest
names), an axis that is not in the mesh, a dim that is out of range, a size that does not divide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxshard.errors import MeshError
from fxshard.mesh import Mesh
from fxshard.placement import (
    Placement,
)
from fxshard.plan.graph import Graph
from fxshard.plan.plan import Plan
from fxshard.plan.presets import PRESETS
from fxshard.plan.work import Names, Work


@dataclass(frozen=True)
class Resolved:
    """A plan made explicit, and the same in terms of the graph's nodes.

    Attributes:
        plan: the explicit plan.
        nodes: what it says of the graph's nodes.
        uses: as what parameters are read, where that is not how they are stored.
        outputs: what it says of the outputs.
        notes: what the presets could not do.
        without_rule: the names of calls at which tensor parallelism ends, since their operator has no rule.
    """

    plan: Plan
    nodes: Mapping[fx.Node, Mapping[str, Placement]]
    uses: Mapping[fx.Node, Mapping[str, Placement]]
    outputs: Sequence[Mapping[str, Placement]]
    notes: tuple[str, ...] = ()
    without_rule: tuple[str, ...] = ()


def resolve(plan: Plan, graph: fx.Graph, names: Names, settled: bool = False) -> Resolved:
    """Makes ``plan`` explicit for ``graph``.

    Args:
        plan: the plan.
        graph: the normalized graph.
        names: what the plan can name in it.
        settled: its parameters lie as ``plan.params`` says, to the letter.

    Raises:
        PlanError: listing all entries that cannot be applied.
    """
    mesh: Mesh = plan.mesh
    if mesh is None:
        raise MeshError("the plan has no mesh", fix="pass mesh={'tp': 2} to parallelize, or Plan(mesh=...)")
    work = Work(mesh, names, Graph.of(graph), plan.ring, settled)
    for part in ("params", "inputs", "activations"):
        for glob, entry in getattr(plan, part).items():
            work.apply(part, glob, entry)
    for axis in plan.ring:
        work.has_axis(axis, "ring")
    uses: Mapping[str, Any] = plan.uses
    for glob, entry in uses.items():
        work.use(glob, entry)
    if not settled:
        work.match_blocks()
    for preset, axis in sorted(plan.presets, key=lambda each: list(PRESETS).index(each[0])):
        PRESETS[preset](work, axis)
    outputs = work.outputs(plan.outputs)
    work.raise_problems()
    explicit = replace(
        plan,
        params=work.explicit["params"],
        uses=work.uses,
        inputs=work.explicit["inputs"],
        activations=work.explicit["activations"],
        outputs={str(i): dict(o) for i, o in enumerate(outputs) if o},
        presets=(),
    )
    return Resolved(explicit, work.nodes, work.used, outputs, tuple(work.notes), tuple(work.without_rule))
