"""Plans at random, as text: presets, combinations of them, and placements of single tensors, uneven ones among them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from fxshard import Plan, Replicate, Shard
from fxshard.placement import BlockShard
from tests.presets import preset

PRESETS = (
    "dp2", "dp2", "dp3", "dp4", "tp2", "tp2", "tp3", "tp4", "sp2", "sp2", "sp3", "sp4", "zero2", "zero2", "zero3",
    "zero4", "cp2", "cp3", "dp2_tp2", "zero2_tp2", "dp2_sp2", "cp2_tp2", "dp2_zero2", "dp2_cp2", "zero2_cp2",
    "dp3_tp2", "zero2_sp2",
)  # fmt: skip
MESHES = ({"a": 2}, {"a": 3}, {"a": 4}, {"a": 2, "b": 2}, {"a": 3, "b": 2})
OPTIONS = ("bucket_bytes=0", "regather=False", "overlap=1", "overlap=2")
NAMES = {"preset": preset, "Plan": Plan, "Shard": Shard, "BlockShard": BlockShard, "Replicate": Replicate, "dict": dict}


def plans(seed: int, index: int, params: Mapping[str, Any], inputs: Mapping[str, Any], count: int = 2) -> list[str]:
    """Plans for a program whose parameters and inputs have these shapes: ``"a plan; options"``, for ``read``."""
    rng = random.Random(f"plans {seed}-{index}")
    made = []
    presets = PRESETS if params else [name for name in PRESETS if "zero" not in name]  # which asks for weights
    for _ in range(count):
        text = f"preset({rng.choice(presets)!r})" if rng.random() < 0.55 else _explicit(rng, params, inputs)
        made.append(f"{text}; {rng.choice(OPTIONS) if rng.random() < 0.15 else ''}")
    return made


def read(text: str) -> tuple[Plan, dict[str, Any]]:
    """The plan, and the options beside it."""
    plan, _, options = text.partition("; ")
    return eval(plan, dict(NAMES)), eval(f"dict({options})", dict(NAMES))


def _explicit(rng: random.Random, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    mesh = rng.choice(MESHES)
    placed = []
    for shapes, share in ((params, 0.6), (inputs, 0.5)):
        entries = [(name, _entry(rng, shape, mesh)) for name, shape in shapes.items() if rng.random() < share]
        placed.append(", ".join(f"{name!r}: {entry}" for name, entry in entries if entry))
    return f"Plan({mesh}, params={{{placed[0]}}}, inputs={{{placed[1]}}})"


def _entry(rng: random.Random, shape: Any, mesh: Mapping[str, int]) -> str:
    parts, free = [], [d for d, n in enumerate(shape) if n > 0]
    for axis, size in mesh.items():
        if free and rng.random() < 0.7:
            dim = free.pop(rng.randrange(len(free)))
            parts.append(f"{axis!r}: {_shard(rng, dim, shape[dim], size)}")
    return f"{{{', '.join(parts)}}}" if parts else ""


def _shard(rng: random.Random, dim: int, length: int, size: int) -> str:
    kind = rng.random()
    if kind < 0.1 and length % 2 == 0:
        return f"BlockShard({dim}, (1, 1))"
    if kind < 0.3:
        borders = [0, *sorted(rng.randint(0, length) for _ in range(size - 1)), length]
        return f"BlockShard({dim}, shares={[end - start for start, end in itertools.pairwise(borders)]})"
    return f"Shard({dim})"
