"""Runs one architecture under one plan, in simulation, and compares it with the original."""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxshard
from fxshard import Plan, data_parallel, tensor_parallel
from fxshard.errors import CaptureError, FxshardError
from fxshard.placement import is_shard
from tests.helpers import Result, problems_of, run_original, run_simulated
from tests.presets import presets
from tests.zoo.models import ISLANDS, Entry, Inputs

PLANS = presets("tp2", "tp4", "dp2", "sp2")
TRAINED = ("tp2", "sp2")
"""The plans under which architectures are trained."""
TWO_AXES = {"dp2_tp2": data_parallel(2) | tensor_parallel(2)}


@dataclass(frozen=True)
class Row:
    """What became of one architecture under one plan.

    Attributes:
        name: the architecture.
        mode: ``eval`` or ``train``.
        problems: how it differs from the original; empty where it does not.
        error: the error that fxshard ended with, or that it crashed with.
        refused: whether that error is one of fxshard's own, which says what is the matter.
        weights: kind of weight -> how it is split.
        share: the bytes of the weights that are split, of all.
        layer_share: the same of the matrices of attention and MLP only; None where there are none.
        collectives: phase and kind -> how many.
        num_bytes: what they move.
        fallbacks: operators without a rule.
    """

    name: str
    family: str
    plan: str
    mode: str = "eval"
    problems: tuple[str, ...] = ()
    error: str = ""
    refused: bool = False
    weights: Mapping[str, str] | None = None
    share: float = 0.0
    layer_share: float | None = None
    collectives: Mapping[str, int] | None = None
    num_bytes: int = 0
    fallbacks: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One word."""
        if self.error:
            return "refused" if self.refused else "CRASH"
        return "WRONG" if self.problems else "right"


class Specimen:
    """A model of the zoo in one mode, its inputs, what it computes on one device, and its capture for all plans."""

    def __init__(self, entry: Entry, training: bool = False) -> None:
        self.entry = entry
        torch.manual_seed(0)
        self.model: nn.Module = entry.build().to(entry.dtype).train(training)
        with torch.no_grad():  # so that no weight is 0 or 1, and no bias is missed
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.inputs: Inputs = {
            key: value.to(entry.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in entry.inputs().items()
        }
        self.expected: Result = run_original(self.model, (), self.inputs)
        outputs = self.expected.outputs[0].values()
        assert not any(x.isnan().any() for x in outputs), "what is fed to it makes no numbers"
        self._refused: FxshardError | None = None
        self._captured: Any = None

    def parallelize(self, plan: Plan) -> fxshard.ParallelModule:
        """``fxshard.parallelize`` on the inputs; the model is captured, or refused, only once."""
        if self._refused is not None:
            raise self._refused
        try:
            made = fxshard.parallelize(self.model, plan, (), self.inputs, cache=captures())
        except CaptureError as error:
            self._refused = error
            raise
        self._captured = made.compiled.captured
        return made

    @property
    def tolerance(self) -> float:
        """The entry's; wider where the model computes a part in float32, though its weights are float64."""
        values = [node.meta.get("val") for node in self._captured.root.graph.nodes]
        narrow = any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)
        return max(self.entry.tolerance, ISLANDS) if narrow else self.entry.tolerance


def captures() -> str:
    """Where captures are kept: capturing takes most of the time, and knows nothing of plans."""
    return os.environ.get("FXSHARD_CACHE") or _folder().name


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fxshard-captures-")


def check(specimen: Specimen, plan: str) -> Row:
    """Outputs, gradients and buffers against the original; whatever happens is in the row."""
    entry, started = specimen.entry, time.perf_counter()
    given: dict[str, Any] = {"name": entry.name, "family": entry.family, "plan": plan}
    given["mode"] = "train" if specimen.model.training else "eval"
    try:
        made = specimen.parallelize((PLANS | TWO_AXES)[plan])
        actual = run_simulated(made, (), specimen.inputs)
    except FxshardError as error:
        text = f"{type(error).__name__}: {error.what}"
        return Row(**given, error=text, refused=bool(error.fix), seconds=time.perf_counter() - started)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Row(**given, error=text, seconds=time.perf_counter() - started)
    every = made.collectives()
    return Row(
        **given,
        problems=tuple(problems_of(actual, specimen.expected, specimen.tolerance)),
        weights=split_weights(made),
        share=split_share(made, dict(specimen.model.named_parameters())),
        layer_share=split_share(made, layer_matrices(specimen.model, specimen.expected.grads)),
        collectives=Counter(f"{c.phase} {c.kind}" for c in every),
        num_bytes=sum(c.num_bytes for c in every),
        fallbacks=tuple(sorted({f.operator for f in made.fallbacks()})),
        seconds=time.perf_counter() - started,
    )


# --- what is split ---------------------------------------------------------------------------------------------------


def split_weights(made: fxshard.ParallelModule) -> dict[str, str]:
    """Kind of weight -> how it is split, for matrices; a layer's number is no part of the kind."""
    out: dict[str, str] = {}
    for name, parameter in made._original.get().named_parameters():
        placed = [p for p in made.placements_of(name) if is_shard(p)]
        if placed and parameter.dim() > 1:
            out[kind_of(name)] = ", ".join(map(str, placed))
    return out


def kind_of(name: str) -> str:
    """``layers.3.attn.q_proj.weight`` -> ``q_proj``; ``h.0.mlp.experts.gate_up_proj`` -> ``gate_up_proj``."""
    words = [w for w in name.split(".") if w != "weight" and not w.isdigit()]
    return words[-1]


def split_share(made: fxshard.ParallelModule, parameters: Mapping[str, torch.Tensor]) -> Any:
    """The bytes of those parameters that are split, of all of them."""
    num_bytes = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    split = sum(size for name, size in num_bytes.items() if any(map(is_shard, made.placements_of(name))))
    return split / sum(num_bytes.values()) if num_bytes else None


NOT_OF_LAYERS = re.compile(
    r"embed|norm|head$|classifier|score|pooler|position|bias|downsample|reduction", re.IGNORECASE
)
"""Names of modules that are no attention and no MLP of a layer, wherever they stand."""


def layer_matrices(model: nn.Module, used: Container[str]) -> dict[str, nn.Parameter]:
    """The matrices of attention and MLP: parameters of two dims or more in a numbered layer.

    Embeddings, norms, heads, convolutions and the merging of patches are none; nor is what the model does not use.
    """
    modules = dict(model.named_modules())
    out = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = modules[path]
        numbered = re.search(r"\.\d+\.", f".{name}")
        named = any(NOT_OF_LAYERS.search(word) for word in path.split(".")) or NOT_OF_LAYERS.search(leaf)
        other = isinstance(owner, nn.Embedding | nn.modules.conv._ConvNd)
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        if is_matrix and numbered and not named and not other and name in used:
            out[name] = parameter
    return out
