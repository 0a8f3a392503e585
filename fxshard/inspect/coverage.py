"""What of a model's weights a plan splits, and why the rest lies whole on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import fx

from fxshard.ir.origins import source_of
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placements, describe_all, is_shard
from fxshard.plan.detect import ALONE
from fxshard.plan.graph import Graph, contraction
from fxshard.rules.table import find_rule, name_of
from fxshard.torch_internals import OperatorBase


@dataclass(frozen=True)
class Weight:
    """One parameter under a plan, or one buffer from which a weight is unpacked.

    Attributes:
        name: its name.
        shape: of the whole.
        num_bytes: of the whole.
        placed: how it lies, as a plan writes it.
        parts: among how many ranks it is divided; 1 where each holds all of it.
        reason: why it is whole; empty where it is not.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    placed: str
    parts: int
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """All parameters under a plan.

    Attributes:
        weights: in the order of the model.
    """

    weights: tuple[Weight, ...]

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """Those of two dims or more: what fills memory."""
        return tuple(each for each in self.weights if len(each.shape) > 1)

    @property
    def share(self) -> float:
        """Of the bytes of the matrices, how many lie in parts; 1 where there are none."""
        total = sum(each.num_bytes for each in self.matrices)
        return sum(each.num_bytes for each in self.matrices if each.parts > 1) / total if total else 1.0

    @property
    def whole(self) -> tuple[Weight, ...]:
        """The matrices that every rank holds whole, the largest first."""
        return tuple(sorted((w for w in self.matrices if w.parts == 1), key=lambda each: -each.num_bytes))

    def __str__(self) -> str:
        split = sum(each.num_bytes for each in self.matrices if each.parts > 1)
        total = sum(each.num_bytes for each in self.matrices)
        head = f"{self.share:.1%} of the bytes of matrices are split ({split:,} of {total:,})"
        rows = [(w.name, "x".join(map(str, w.shape)), f"{w.num_bytes:,}", w.reason) for w in self.whole]
        if not rows:
            return f"{head}; none is whole on every rank"
        titles = ("whole on every rank", "shape", "bytes", "why")
        aligned = ("left", "right", "right", "left")
        return f"{head}\n\n" + tabulate(rows, headers=titles, disable_numparse=True, colalign=aligned)


def coverage_of(
    compiled: Compiled,
    tensors: Mapping[str, torch.Tensor],
    placed: Mapping[str, Placements],
    presets: Sequence[tuple[str, str]],
) -> Coverage:
    """The coverage of a compiled capture.

    Args:
        compiled: the capture.
        tensors: the model's parameters and buffers. Of these, only what weights are unpacked from counts.
        placed: how each lies.
        presets: those of the plan, each with its axis.
    """
    reasons = _Reasons(compiled, tensors, presets)
    weights = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.nn.Parameter) and not reasons.is_unpacked(name):
            continue
        sizes = zip(placed[name], compiled.mesh.sizes, strict=True)
        parts = math.prod(size for each, size in sizes if is_shard(each))
        where = describe_all(placed[name], compiled.mesh.names)
        reason = reasons.of(name) if parts == 1 else ""
        weights.append(Weight(name, tuple(tensor.shape), tensor.nbytes, where, parts, reason))
    return Coverage(tuple(weights))


class _Reasons:
    """Why weights are whole."""

    def __init__(
        self, compiled: Compiled, tensors: Mapping[str, torch.Tensor], presets: Sequence[tuple[str, str]]
    ) -> None:
        graph = compiled.stages["normalize"]
        self.compiled, self.tensors, self.facts = compiled, tensors, Graph.of(graph)
        self.nodes = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        self.presets = [preset for preset, _ in presets]
        self.splitting = [axis for preset, axis in presets if preset not in ("data_parallel", "context_parallel")]
        self.packed = frozenset[fx.Node]().union(*self.facts.unpacked.values())
        matrices = [t.numel() for t in tensors.values() if t.dim() > 1 and isinstance(t, torch.nn.Parameter)]
        self.small = ALONE * max(matrices, default=0)

    def is_unpacked(self, name: str) -> bool:
        """Whether a weight is unpacked from it and others."""
        return self._node(name) in self.packed

    def _node(self, name: str) -> fx.Node | None:
        return self.nodes.get(self.compiled.captured.aliases.get(name, name))

    def of(self, name: str) -> str:
        """The reason for one weight."""
        tensor = self.tensors[name]
        node = self._node(name)
        if self.compiled.mesh.world_size == 1:
            return "there is one rank"
        if node is None:
            return "the captured call does not read it"
        if self.presets and not self.splitting:
            return "the plan splits no weights: every rank has a part of the batch or of the sequence"
        if tensor.dim() < 2:
            return "a vector"
        readers = self._readers(node)
        if any(n.target is torch.ops.aten.copy_.default and n.args[0] is node for n in node.users):
            return "forward writes to it"
        strange = next((n for n in readers if isinstance(n.target, OperatorBase) and find_rule(n.target) is None), None)
        if strange is not None:
            return f"{name_of(strange.target)[1]} has no rule"
        if all(size % n for size in tensor.shape for n in self._sizes()):
            return f"no dim of it divides by {' or '.join(map(str, self._sizes()))}"
        if "zero" in self.presets:
            return "small: zero leaves whole what is little beside a rank's share"
        if readers and all(name_of(n.target)[1] == "aten.embedding" for n in readers):
            return "a table that is looked up by positions or types, not by the words of an input"
        products = [n for n in readers if contraction(n, self.facts) is not None]
        if not products:
            first = name_of(readers[0].target)[1] if readers else "nothing"
            return f"no product takes it: it is read by {first}"
        if tensor.numel() < self.small:
            return "small, and in no column and row pair"
        where = source_of(products[0])
        return f"in no column and row pair{f': {where}' if where else ''}"

    def _sizes(self) -> list[int]:
        mesh = self.compiled.mesh
        axes = self.splitting or list(mesh.names)
        return [size for size in dict.fromkeys(mesh.size(axis) for axis in axes) if size > 1]

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """The calls that read a weight, or a view of it."""
        found, waiting = [], [node]
        while waiting:
            for user in waiting.pop().users:
                if user.op != "call_function":
                    continue
                if user in self.facts.weights:
                    waiting.append(user)
                else:
                    found.append(user)
        return list(dict.fromkeys(found))
