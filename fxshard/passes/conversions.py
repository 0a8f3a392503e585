"""conversions: from one placement of a value to another, a row each; all that the compiler says of one stands here.

    all_reduce         Partial -> Replicate         its gradient: as it comes
    reduce_scatter     Partial -> Shard             all_gather
    all_gather         Shard -> Replicate           this rank's part; reduce_scatter where ranks read it differently
    all_to_all         Shard -> Shard               all_to_all
    chunk              Replicate -> Shard           all_gather
    vary               Replicate -> Varying         all_reduce

``gather_weight`` and ``vary_weight`` are ``all_gather`` and ``vary`` of stored weights. What a conversion may be given,
``passes.check`` says for itself: it checks these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxshard.runtime import collectives as run
from fxshard.runtime import overlap as beside
from fxshard.runtime import under_way


@dataclass(frozen=True)
class Conversion:
    """One row.

    Attributes:
        function: what runs it, of ``runtime.collectives``.
        result: what its result is called behind the name of the value; empty where it keeps that.
        forward: the collective of the forward pass; empty where there is none.
        backward: that of its gradient.
        summed: that of its gradient where ranks read the result differently (``summed=True``).
        begin: begins it; ``under_way.wait`` waits for it.
        before: computes linears that read the result, together with it.
        behind: computes the linear whose result it converts, together with it.
        of_weights: whether it may run early, of weights alone.
    """

    function: Any
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
        run.all_reduce, "sum", "all_reduce", begin=under_way.begin_all_reduce, behind=beside.linear_all_reduce,
    ),
    Conversion(
        run.reduce_scatter, "part", "reduce_scatter", "all_gather", begin=under_way.begin_reduce_scatter,
        behind=beside.linear_reduce_scatter,
    ),
    Conversion(
        run.all_gather, "whole", "all_gather", summed="reduce_scatter", begin=under_way.begin_all_gather,
        before=beside.gather_linears, of_weights=True,
    ),
    Conversion(run.all_to_all, "moved", "all_to_all", "all_to_all", begin=under_way.begin_all_to_all),
    Conversion(run.chunk, "part", backward="all_gather"),
    Conversion(run.vary, "vary", backward="all_reduce", before=beside.vary_linears, of_weights=True),
    Conversion(run.gather_weight, forward="all_gather", summed="reduce_scatter", of_weights=True),
    Conversion(run.vary_weight, backward="all_reduce", of_weights=True),
)  # fmt: skip

CONVERSIONS = {row.function: row for row in TABLE}
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
PASSED_ON = frozenset((*CONVERSIONS, *BEGIN.values(), under_way.wait))
"""Calls whose result is the value that they are given, in another form."""


def backward_kind(node: fx.Node) -> str | None:
    """The collective in the gradient of a conversion; None where there is none."""
    row = CONVERSIONS.get(node.target)
    if row is None:
        return None
    summed = node.kwargs.get("summed", len(node.args) > 2 and node.target is run.all_gather)
    return (row.summed if summed and row.summed else row.backward) or None
