"""How slow this machine is at the moment: limits in seconds are for a quiet one, and are as many times longer."""

from __future__ import annotations

import os
import time

LOOPS = 2_000_000
QUIET_S = 0.1
"""How long so many steps of a loop take on the machine that the limits were written for."""


def slowness() -> float:
    """How many times longer things take than on a quiet machine; at least 1."""
    start, total = time.perf_counter(), 0
    for i in range(LOOPS):
        total += i
    took = (time.perf_counter() - start) / QUIET_S
    return max(1.0, took, os.getloadavg()[0] / (os.cpu_count() or 1))
