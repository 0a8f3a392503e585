"""The presets under short names, alone and on two axes, as tests of many models name them."""

from __future__ import annotations

import re

from fxshard import Plan, context_parallel, data_parallel, sequence_parallel, tensor_parallel, zero

PRESETS = {"tp": tensor_parallel, "sp": sequence_parallel, "dp": data_parallel, "zero": zero, "cp": context_parallel}


def preset(name: str) -> Plan:
    """``dp2_tp4``: two ranks of data parallelism, outermost, each of four of tensor parallelism."""
    parts = (re.fullmatch(r"([a-z]+)(\d+)", part) for part in name.split("_"))
    first, *others = (PRESETS[part[1]](int(part[2])) for part in parts if part)
    for other in others:
        first = first | other
    return first


def presets(*names: str) -> dict[str, Plan]:
    """Name -> plan."""
    return {name: preset(name) for name in names}
