"""schedule: what begins when, and what goes together.

In: a rank's graph.   Out: the same program, as the rank runs it: products at the edge of what is split run together
with the collective before or behind them (``overlap.py``), and other collectives begin where what they move is made
(``latency_hiding.py``).
"""

from __future__ import annotations

from torch import fx

from fxshard.schedule.latency_hiding import hide_latency
from fxshard.schedule.overlap import overlap


def schedule(graph: fx.Graph, pieces: int, is_even: bool) -> fx.Graph:
    """The graph with its collectives set beside what they can run beside.

    Args:
        graph: a rank's program.
        pieces: in how many pieces products are computed beside their collective; 0 for one after the other.
        is_even: all ranks hold parts of one size: else one may have nothing to compute where another has, and the graph
            comes back as it is.
    """
    if not is_even:
        return graph
    return hide_latency(overlap(graph, pieces) if pieces else graph)
