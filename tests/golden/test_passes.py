"""What each pass makes of a graph, as text: ``FXSHARD_GOLDEN=write pytest tests/golden`` writes it anew.

A file a pass and model, ``pass/model.txt``: the graph that comes in, and the graph that goes out. Read the diff.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Replicate, Shard
from fxshard.passes.pipeline import STAGES
from fxshard.placement import BlockShard
from tests.golden.text import text_of
from tests.presets import preset

HERE = Path(__file__).parent


class Model(nn.Module):
    """Some parameters, and a function of them."""

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def mlp(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, m.up, m.up_bias)), m.down, m.down_bias)


def block(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + mlp(m, F.layer_norm(x, [8], m.norm))


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.view(2, 4, 2, 4).transpose(1, 2) for part in F.linear(x, m.qkv).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(mixed.transpose(1, 2).reshape(2, 4, 8), m.out)


def language(m: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = F.linear(F.embedding(ids, m.words), m.words)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def counted(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    x = x.clone()
    x[:, 0] = 0.0
    with torch.no_grad():
        scale = m.up.norm()
    return F.linear(x, m.up) / scale


def statistics(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = F.linear(x, m.up)
    return h.mean(-1), h.var(-1), h.softmax(-1).argmax(-1), F.dropout(h, 0.5, True)


MLP = {"up": (16, 8), "up_bias": (16,), "down": (8, 16), "down_bias": (8,)}
X, IDS = torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4))
COLUMNS = Plan({"tp": 2}, params={"up": Shard(0)})
CASES: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], torch.Tensor, Plan]] = {
    "mlp tp": (mlp, MLP, X, preset("tp2")),
    "mlp dp": (mlp, MLP, X, preset("dp2")),
    "mlp zero": (mlp, MLP, X, preset("zero2")),
    "block sp": (block, MLP | {"norm": (8,)}, X, preset("sp2")),
    "block dp_tp": (block, MLP | {"norm": (8,)}, X, preset("dp2_tp2")),
    "attention tp": (attention, {"qkv": (24, 8), "out": (8, 8)}, X, preset("tp2")),
    "attention cp": (attention, {"qkv": (24, 8), "out": (8, 8)}, X, preset("cp2")),
    "language tp": (language, {"words": (12, 8)}, IDS, Plan({"tp": 2}, params={"words": Shard(0)})),
    "counted dp": (counted, {"up": (16, 8)}, X, preset("dp2")),
    "statistics columns": (statistics, {"up": (16, 8)}, X, COLUMNS),
    "uneven": (mlp, MLP, X, Plan({"tp": 3}, params={"up": BlockShard(0, shares=[7, 9, 0]), "down": Shard(1)})),
    "asked": (mlp, MLP, X, COLUMNS | Plan({"tp": 2}, inputs={"inputs_0": Replicate()}, outputs=Shard(2))),
}
# A pass, and the models on which it does something of its own.
SHOWN = {
    "normalize": ("mlp tp", "counted dp", "attention tp", "language tp"),
    "annotate": ("mlp tp", "block sp", "mlp zero", "asked", "uneven"),
    "propagate": (
        "mlp tp",
        "mlp dp",
        "block sp",
        "block dp_tp",
        "attention tp",
        "attention cp",
        "language tp",
        "uneven",
    ),
    "insert_collectives": ("mlp tp", "mlp dp", "mlp zero", "block sp", "block dp_tp", "attention cp", "asked"),
    "localize": ("attention tp", "language tp", "statistics columns", "uneven", "attention cp"),
    "optimize": ("block sp", "mlp zero", "language tp"),
}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another torch captures other names")
@pytest.mark.parametrize(("stage", "case"), [(stage, case) for stage, cases in SHOWN.items() for case in cases])
def test_a_pass(stage: str, case: str) -> None:
    function, shapes, x, plan = CASES[case]
    program = fxshard.parallelize(Model(function, **shapes), plan, (x,))
    before, _ = next(pair for pair in itertools.pairwise(STAGES) if pair[1] == stage)
    came, went = (text_of(program.graph_after(name)) for name in (before, stage))
    text = f"# {case}: after {before}\n{came}\n# after {stage}\n{went}"
    file = HERE / stage / f"{case.replace(' ', '_')}.txt"
    if os.environ.get("FXSHARD_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "if it is meant: FXSHARD_GOLDEN=write pytest tests/golden"


def test_no_text_is_left_over() -> None:
    files = {str(file.relative_to(HERE)) for file in HERE.glob("*/*.txt")}
    assert files == {f"{stage}/{case.replace(' ', '_')}.txt" for stage, cases in SHOWN.items() for case in cases}
