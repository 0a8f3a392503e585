"""conversions: from one placement of a value to another, a row each; all that the compiler says of one stands here.

    all_reduce         Partial -> Replicate         its gradient: as it comes
    reduce_scatter     Partial -> Shard             all_gather
    all_gather         Shard -> Replicate           this rank's part; reduce_scatter where ranks read it differently
    all_to_all         Shard -> Shard               all_to_all
    chunk              Replicate -> Shard           all_gather
    vary               Replicate -> Varying         all_reduce

``gather_weight`` and ``vary_weight`` are ``all_gather`` and ``vary`` of stored weights.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import fx

from fxshard.placement import Placement, Varying, is_partial, is_shard
from fxshard.runtime import async_collectives, collective_matmul
from fxshard.runtime import collectives as run

PARTIAL, SHARD, REPLICATE, VARYING = "Partial", "Shard", "Replicate", "Varying"


def kind_of(placement: Placement) -> str:
    """The kind of a placement, as the table names it."""
    if is_shard(placement):
        return SHARD
    return PARTIAL if is_partial(placement) else VARYING if isinstance(placement, Varying) else REPLICATE


@dataclass(frozen=True)
class Conversion:
    """One row.

    Attributes:
        function: what runs it, of ``runtime.collectives``.
        source: the kind of placement that it is given.
        targets: the kinds of placement that it may give.
        source_dim: its argument that says which dim was cut; empty where none was.
        target_dim: its argument that says which dim it cuts; empty where it cuts none.
        result: what its result is called behind the name of the value; empty where it keeps that.
        forward: the collective of the forward pass; empty where there is none.
        backward: that of its gradient.
        summed: that of its gradient where ranks read the result differently (``summed=True``).
        begin: begins it; ``async_collectives.wait`` waits for it.
        before: computes linears that read the result, together with it.
        behind: computes the linear whose result it converts, together with it.
        of_weights: whether it may run early, of weights alone.
    """

    function: Any
    source: str
    targets: tuple[str, ...]
    source_dim: str = ""
    target_dim: str = ""
    result: str = ""
    forward: str = ""
    backward: str = ""
    summed: str = ""
    begin: Any = None
    before: Any = None
    behind: Any = None
    of_weights: bool = False


TABLE = (
    Conversion(
        run.all_reduce, PARTIAL, (REPLICATE,), result="sum", forward="all_reduce",
        begin=async_collectives.begin_all_reduce, behind=collective_matmul.linear_all_reduce,
    ),
    Conversion(
        run.reduce_scatter, PARTIAL, (SHARD,), target_dim="dim", result="part", forward="reduce_scatter",
        backward="all_gather",
        begin=async_collectives.begin_reduce_scatter, behind=collective_matmul.linear_reduce_scatter,
    ),
    Conversion(
        run.all_gather, SHARD, (REPLICATE, VARYING), source_dim="dim", result="whole", forward="all_gather",
        summed="reduce_scatter",
        begin=async_collectives.begin_all_gather, before=collective_matmul.gather_linears, of_weights=True,
    ),
    Conversion(
        run.all_to_all, SHARD, (SHARD,), source_dim="source", target_dim="target", result="moved", forward="all_to_all",
        backward="all_to_all", begin=async_collectives.begin_all_to_all,
    ),
    Conversion(run.chunk, REPLICATE, (SHARD,), target_dim="dim", result="part", backward="all_gather"),
    Conversion(
        run.vary, REPLICATE, (VARYING,), result="vary", backward="all_reduce", before=collective_matmul.vary_linears,
        of_weights=True,
    ),
    Conversion(
        run.gather_weight, SHARD, (REPLICATE, VARYING), source_dim="dim", forward="all_gather",
        summed="reduce_scatter", of_weights=True,
    ),
    Conversion(run.vary_weight, REPLICATE, (VARYING,), backward="all_reduce", of_weights=True),
)  # fmt: skip

CONVERSIONS = {row.function: row for row in TABLE}
BETWEEN = {(row.source, target): row.function for row in TABLE if row.result for target in row.targets}
"""The conversion from one kind of placement to another."""
SUMMED = frozenset(row.function for row in TABLE if row.summed or row.backward == "all_reduce")
"""Those whose gradient sums what the ranks bring."""
BEGIN = {row.function: row.begin for row in TABLE if row.begin is not None}
"""Those that can be begun, and waited for later."""
BEFORE = {row.function: row.before for row in TABLE if row.before is not None}
"""Those that may go together with the linears that read them."""
BEHIND = {row.function: row.behind for row in TABLE if row.behind is not None}
"""Those that may go together with the linear that they read."""
FORWARD = {row.function: row.forward for row in TABLE if row.forward}
"""The collective that each communicates with in the forward pass."""
PASSED_ON = frozenset((*CONVERSIONS, *BEGIN.values(), async_collectives.wait))
"""Calls whose result is the value that they are given, in another form."""


def backward_kind(node: fx.Node) -> str | None:
    """The collective in the gradient of a conversion; None where there is none."""
    row = CONVERSIONS.get(node.target)
    if row is None:
        return None
    return (row.summed if row.summed and options_of(node)["summed"] else row.backward) or None


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def options_of(node: fx.Node) -> dict[str, Any]:
    """What a conversion is told beside the value and the axes, by name."""
    bound = _signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in ("x", "weight", "axis", "axes")}
