"""Which values a function lets go before it ends: large ones that nothing reads any more.

Most values are let go by themselves: their name is given to the next value, or the function returns. What is left, and
is large, gets a ``del``. A view shares the memory of its base, so memory is free only when all its values are dead.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from fxshard.codegen.regions import Region
from fxshard.ir.info import local_bytes
from fxshard.mesh import Mesh
from fxshard.rules.recipe import is_tensor
from fxshard.runtime import collectives
from fxshard.torch_internals import OpOverload

LARGE = 2**20
"""Bytes from which on a dead value is worth a line."""


def deaths(region: Region, last_use: Mapping[object, int], mesh: Mesh) -> dict[int, list[fx.Node]]:
    """Statement -> the values, made in this call, whose memory nothing reads after it."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    base: dict[fx.Node, fx.Node] = {}
    for item in region.items:
        for node in item.outputs if isinstance(item, Region) else [item]:
            source = node.args[0] if isinstance(item, fx.Node) and node.args and _is_view(node) else None
            if source is None or not isinstance(source, fx.Node):
                base[node] = node
            elif source in base:
                base[node] = base[source]
            else:
                continue  # a view of what the caller, or the module, holds
            groups.setdefault(base[node], []).append(node)
    out: dict[int, list[fx.Node]] = {}
    for nodes in groups.values():
        if any(is_tensor(node) and local_bytes(node, mesh) >= LARGE for node in nodes):
            out.setdefault(max(last_use.get(n, -1) for n in nodes), []).extend(nodes)
    return out


def _is_view(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns) or not is_tensor(node)
    return node.target in (operator.getitem, collectives.vary, collectives.vary_weight, collectives.chunk)
