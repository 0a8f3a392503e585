"""The presets under short names, alone and on two axes, as tests of many models name them."""

from __future__ import annotations

from fxshard import Plan, data_parallel, sequence_parallel, tensor_parallel

PRESETS = {"tp": tensor_parallel, "sp": sequence_parallel, "dp": data_parallel}


def preset(name: str) -> Plan:
    """``dp2_tp4``: two ranks of data parallelism, outermost, each of four of tensor parallelism."""
    first, *others = (PRESETS[part[:2]](int(part[2:])) for part in name.split("_"))
    for other in others:
        first = first | other
    return first


def presets(*names: str) -> dict[str, Plan]:
    """Name -> plan."""
    return {name: preset(name) for name in names}
