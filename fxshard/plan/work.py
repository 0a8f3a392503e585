"""A plan while it is resolved: what it says of the graph so far, checked entry by entry."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from fxshard.errors import DivisibilityError, FxshardError, PlanError
from fxshard.mesh import Mesh
from fxshard.placement import (
    BlockShard,
    Cut,
    Placement,
    Shard,
    chunk_shares,
    cut_of,
    describe,
    same,
    shard,
)
from fxshard.plan.detect import Split, find_split
from fxshard.plan.graph import Graph, is_parameter, shapes_of
from fxshard.rules.recipe import Dim, units


@dataclass(frozen=True)
class Names:
    """What a plan can name in a captured model.

    Args:
        params: parameter and buffer names -> their nodes; tied names lead to one node.
        inputs: input names -> their nodes.
        modules: module paths -> the nodes that they return.
        outputs: the flat outputs; None where one is no tensor.
        all_params: names of parameters that the graph does not read, with their shapes.
    """

    params: Mapping[str, fx.Node]
    inputs: Mapping[str, fx.Node]
    modules: Mapping[str, Sequence[fx.Node]]
    outputs: Sequence[fx.Node | None]
    all_params: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Work:
    """A plan that is being resolved.

    Attributes:
        mesh: the mesh.
        names: what a plan can name.
        facts: the graph.
        ring: the axes along which attention passes keys and values round.
        settled: an earlier capture has applied the plan: what it names need not be in this one.
        found: what tensor parallelism splits, by the size of an axis.
        nodes: what was said of the graph's nodes.
        explicit: the same in the words of a plan.
        used: as what parameters are read, where that is not how they are stored.
        uses: the same in the words of a plan.
        problems: entries that cannot be applied.
        notes: what the presets could not do.
        without_rule: calls at which tensor parallelism ends.
    """

    mesh: Mesh
    names: Names
    facts: Graph
    ring: tuple[str, ...] = ()
    settled: bool = False
    found: dict[int, Split] = field(default_factory=dict)
    nodes: dict[fx.Node, dict[str, Placement]] = field(default_factory=dict)
    explicit: dict[str, dict[str, dict[str, Placement]]] = field(
        default_factory=lambda: {"params": {}, "inputs": {}, "activations": {}}
    )
    used: dict[fx.Node, dict[str, Placement]] = field(default_factory=dict)
    uses: dict[str, dict[str, Placement]] = field(default_factory=dict)
    problems: list[FxshardError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_rule: dict[str, None] = field(default_factory=dict)

    def split(self, size: int) -> Split:
        """What tensor parallelism over ``size`` ranks splits."""
        if size not in self.found:
            self.found[size] = find_split(self.facts, size)
        return self.found[size]

    def apply(self, part: str, glob: str, entry: Mapping[str, Placement]) -> None:
        """One entry of the user's plan."""
        matched = self._match(part, glob)
        if part == "inputs" and not {*glob}.isdisjoint("*?["):  # a number has no dims to be split
            matched = [(name, node) for name, node in matched if _has_dims(node)] or matched
        for axis, placement in entry.items():
            if not self.has_axis(axis, f"{part} {glob!r}"):
                continue
            for name, node in matched:
                is_tensor = name in self.names.params or name in self.names.all_params
                kind = "params" if is_tensor else "activations" if part == "params" else part
                self.put(kind, name, node, axis, placement, f"{part} {glob!r}")

    def use(self, glob: str, entry: Mapping[str, Placement]) -> None:
        """One entry of how parameters are read."""
        matched = self._match("params", glob)
        for axis, placement in entry.items():
            if not self.has_axis(axis, f"uses {glob!r}"):
                continue
            if isinstance(placement, Shard) or placement.is_partial():
                asked = f"uses {glob!r}: a parameter cannot be read as {describe(placement)}"
                self.problems.append(PlanError(asked, fix="give Replicate(); to read it in parts, store it so"))
                continue
            self.uses.setdefault(glob, {})[axis] = placement
            for name, node in matched:
                if node is not None and name in self.names.params:
                    self.used.setdefault(node, {})[axis] = placement

    def has_axis(self, axis: str, asked_by: str) -> bool:
        """Whether the mesh has an axis; a problem where it has not."""
        if axis in self.mesh.names:
            return True
        names = ", ".join(map(repr, self.mesh.names))
        fix = f"use one of {names}, or add {axis!r} to the mesh"
        self.problems.append(PlanError(f"{asked_by}: there is no mesh axis {axis!r}", fix=fix))
        return False

    def _match(self, part: str, glob: str) -> list[tuple[str, fx.Node | None]]:
        if part == "params":
            known: dict[str, Any] = {**dict.fromkeys(self.names.all_params), **self.names.params}
        elif part == "inputs":
            known = dict(self.names.inputs)
        else:
            known = dict(self.names.modules)
            if glob.startswith("%"):
                known = {f"%{n.name}": [n] for n in self._graph_nodes()}
        found = [n for n in known if n == glob] or [n for n in known if fnmatch.fnmatchcase(n, glob)]
        if not found and part == "params":  # a dict plan may name modules: what they return
            found = [n for n in self.names.modules if fnmatch.fnmatchcase(n, glob)]
            known |= {n: self.names.modules[n] for n in found}
        if not found and self.settled:
            self.notes.append(f"{part} {glob!r} matches nothing in this capture")
        elif not found:
            near = difflib.get_close_matches(glob, list(known), 3, 0.4)
            what = {"params": "parameter, buffer or module", "inputs": "input", "activations": "module"}[part]
            fix = f"the nearest names are {', '.join(map(repr, near))}" if near else f"names are {_few(known)}"
            self.problems.append(PlanError(f"{part} {glob!r} matches no {what} of the model", fix=fix))
        out: list[tuple[str, fx.Node | None]] = []
        for name in found:
            value = known[name]
            out += [(name, v) for v in value] if isinstance(value, (list, tuple)) else [(name, value)]
        return out

    def _graph_nodes(self) -> Iterable[fx.Node]:
        first = next(iter([*self.names.params.values(), *self.names.inputs.values()]))
        return (n for n in first.graph.nodes if n.op == "call_function")

    def put(self, part: str, name: str, node: fx.Node | None, axis: str, placement: Placement, asked_by: str) -> None:
        """Records one placement, after checking that it can be."""
        shape = shapes_of(node)[0] if node is not None else self.names.all_params[name]
        known = self.explicit[part].get(name, {}) if node is None else self.nodes.get(node, {})
        checked = self._check(name, shape, axis, placement, asked_by, known)
        if checked is None:
            return
        explicit = self.explicit[part].setdefault(name, {})
        have = explicit if node is None else self.nodes.setdefault(node, {})
        if self._agrees(have, name, axis, checked, asked_by):
            have[axis] = explicit[axis] = checked

    def _agrees(self, have: Mapping[str, Placement], name: str, axis: str, placement: Placement, asked_by: str) -> bool:
        """Whether nothing else was asked for on an axis; a problem where it was."""
        if axis not in have or same(have[axis], placement):
            return True
        text = f"{name} is asked to be both {describe(have[axis])} and {describe(placement)} on axis {axis!r}"
        self.problems.append(PlanError(f"{text} (by {asked_by})", fix="let one entry of the plan match it"))
        return False

    def _check(
        self,
        name: str,
        shape: Sequence[Any],
        axis: str,
        placement: Placement,
        asked_by: str,
        known: Mapping[str, Placement],
    ) -> Placement | None:
        """The placement of one tensor on ``axis``, as it is written; ``known``: those on other axes."""
        size = self.mesh.size(axis)
        if not isinstance(placement, Shard):
            if placement.is_partial():
                self.problems.append(
                    PlanError(
                        f"{asked_by}: {name} cannot be {describe(placement)}", fix="use Shard(dim) or Replicate()"
                    )
                )
                return None
            return placement
        dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
        if not 0 <= dim < len(shape):
            self.problems.append(
                PlanError(
                    f"{asked_by}: {name} of shape {list(shape)} has no dim {placement.dim}",
                    fix=f"use a dim from {-len(shape)} to {len(shape) - 1}" if shape else "a scalar is replicated",
                )
            )
            return None
        beside = self.beside(known, axis, dim)
        found = fitting(shape[dim], dim, placement, size, beside)
        if found is None:
            others = [ranks for _, ranks in beside.inner + beside.outer]
            over = f"mesh axis {axis!r} (size {size})" + (f" beside axes of sizes {others}" if others else "")
            self.problems.append(
                DivisibilityError(
                    f"dim {dim} (size {shape[dim]}) of {name} cannot be split over {over}",
                    op=f"{asked_by}: {describe(placement)} of {list(shape)}",
                    fix=f"{_mending(shape[dim], placement, others)}, or replicate dim {dim}",
                )
            )
            return None
        return found

    def beside(self, known: Mapping[str, Placement], axis: str, dim: int) -> _Beside:
        """How the other axes split the same dim."""
        outer: list[tuple[Cut, int]] = []
        inner: list[tuple[Cut, int]] = []
        for name, size in zip(self.mesh.names, self.mesh.sizes, strict=True):
            placement = known.get(name)
            if name != axis and isinstance(placement, Shard) and placement.dim == dim:
                side = outer if self.mesh.index(name) < self.mesh.index(axis) else inner
                side.append((cut_of(placement), size))
        return _Beside(tuple(outer), tuple(inner))

    def offer(self, part: str, name: str, node: fx.Node, axis: str, placement: Shard, preset: str) -> None:
        """What a preset would split: left whole, with a note, where other axes leave too little of that dim."""
        if not self.free(node, axis):
            return
        size = shapes_of(node)[0][placement.dim]
        beside = self.beside(self.nodes.get(node, {}), axis, placement.dim)
        if fitting(size, placement.dim, placement, self.mesh.size(axis), beside) is not None:
            self.put(part, name, node, axis, placement, preset)
        else:
            ranks = math.prod(n for _, n in beside.outer + beside.inner) * self.mesh.size(axis)
            what = f"dim {placement.dim} (size {size}) does not divide by {ranks}"
            self.notes.append(f"{preset} leaves {name} whole on axis {axis!r}: {what}")

    def named(self, node: fx.Node) -> tuple[str, str]:
        """The part of a plan that can speak of a value, and its name there."""
        known = {"placeholder": ("inputs", self.names.inputs), "get_attr": ("params", self.names.params)}
        part, names = known.get(node.op, ("activations", {}))
        return part, next((name for name, each in names.items() if each is node), f"%{node.name}")

    def match_blocks(self) -> None:
        """A packed weight that the user splits by its dim is split block by block, as its readers cut it."""
        if not any(is_parameter(n) and isinstance(p, Shard) for n, e in self.nodes.items() for p in e.values()):
            return
        for axis in self.mesh.names:
            asked = {n: e[axis] for n, e in self.nodes.items() if isinstance(e.get(axis), Shard) and is_parameter(n)}
            asked = {n: p for n, p in asked.items() if axis not in self.used.get(n, {})}  # those are read whole
            if not asked or self.mesh.size(axis) == 1:
                continue
            found = self.split(self.mesh.size(axis)).paired
            for node, placement in asked.items():
                better = found.get(node)
                if isinstance(better, BlockShard) and self._says_only(better.dim, node, placement, axis):
                    self.nodes[node][axis] = better
                    for name, n in self.names.params.items():
                        if n is node and name in self.explicit["params"]:
                            self.explicit["params"][name][axis] = better

    def _says_only(self, dim: int, node: fx.Node, placement: Placement, axis: str) -> bool:
        """Whether the user said no more than which dim to split: no blocks, and no shares but those of ``chunk``."""
        count = shapes_of(node)[0][dim]
        if any(self.beside(self.nodes[node], axis, dim)):
            return False  # heads would have to go round all these axes
        return placement.is_shard(dim) and cut_of(placement) == cut_of(
            fitting(count, 0, Shard(0), self.mesh.size(axis)) or placement
        )

    def outputs(self, outputs: Mapping[str, Mapping[str, Placement]]) -> list[dict[str, Placement]]:
        """The placements of every flat output."""
        out: list[dict[str, Placement]] = [{} for _ in self.names.outputs]
        for glob, entry in outputs.items():
            for axis, placement in entry.items():
                if not self.has_axis(axis, "outputs"):
                    continue
                matched = [i for i in range(len(out)) if fnmatch.fnmatchcase(str(i), glob)]
                if not matched and not self.settled:
                    self.problems.append(
                        PlanError(
                            f"outputs {glob!r} matches none of the {len(out)} outputs", fix="use '0', '1', or '*'"
                        )
                    )
                for i in matched:
                    node = self.names.outputs[i]
                    if node is None or not isinstance(node.meta.get("val"), torch.Tensor):
                        continue
                    shape = shapes_of(node)[0]
                    if glob == "*" and isinstance(placement, Shard) and not shape:
                        continue  # a scalar among the outputs is whole
                    checked = self._check(f"output {i}", shape, axis, placement, "outputs", out[i])
                    if checked is not None and self._agrees(out[i], f"output {i}", axis, checked, f"outputs {glob!r}"):
                        out[i][axis] = checked
        return out

    def raise_problems(self) -> None:
        """Raises what was found: the one error, or one that lists all."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            text = "\n".join(f"{i}. {problem}" for i, problem in enumerate(self.problems, 1))
            raise PlanError(f"{len(self.problems)} entries of the plan cannot be applied:\n{text}")

    def free(self, node: fx.Node, axis: str) -> bool:
        """Whether the user's own entries leave a node's placement on an axis open."""
        return axis not in self.nodes.get(node, {})


class _Beside(NamedTuple):
    """How other axes cut a dim: those outside of the axis at hand, and those inside, each with its size."""

    outer: tuple[tuple[Cut, int], ...] = ()
    inner: tuple[tuple[Cut, int], ...] = ()


NOTHING = _Beside()


def fitting(size: Dim, dim: int, placement: Shard, ranks: int, beside: _Beside = NOTHING) -> Shard | None:
    """The shard of a dim of ``size`` over ``ranks``, beside others that split it too; None where there is none.

    Where the size does not divide, the first ranks hold more, as with ``torch.chunk``; beside others it must divide.
    """
    cut = cut_of(placement)
    if cut.shares and (not isinstance(size, int) or len(cut.shares) != ranks):
        return None
    if divides_by(size, (*beside.outer, (cut, ranks), *beside.inner)):
        return shard(dim, *cut)
    if cut.shares or any(beside) or not isinstance(size, int) or size == 0 or size % sum(cut.blocks):
        return None
    return shard(dim, cut.blocks, chunk_shares(size // sum(cut.blocks), ranks))


def divides_by(size: Dim, cuts: Sequence[tuple[Cut, int]]) -> bool:
    """Whether every axis cuts into whole pieces what the axes before it leave to each rank."""
    if not isinstance(size, int):
        return units(size, max((cut.blocks for cut, _ in cuts), key=len), math.prod(ranks for _, ranks in cuts))
    parts = {size}
    for cut, ranks in cuts:
        if not all(units(part, cut.blocks, cut.pieces(ranks)) for part in parts if part or part == size):
            return False
        parts = {part * cut.share(ranks, at) // cut.pieces(ranks) for part in parts for at in range(ranks)}
    return True


def _mending(size: Dim, placement: Shard, others: Sequence[int]) -> str:
    blocks, shares, _ = cut_of(placement)
    if shares and not isinstance(size, int):
        return "give no shares: a dynamic size is split evenly"
    if shares:
        return f"give the shares of {sum(shares)} pieces as many ranks as the axis has, of a size that they divide"
    if others:
        return f"choose axis sizes whose product divides {size}"
    return f"choose blocks that tile {size}" if blocks != (1,) else "choose a dim that is not empty"


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (f", ... ({len(listed)} in all)" if len(listed) > 5 else "")


def _has_dims(node: fx.Node | None) -> bool:
    value = None if node is None else node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0
