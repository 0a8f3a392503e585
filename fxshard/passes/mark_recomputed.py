"""mark_recomputed: says which calls are computed anew in the backward pass, instead of keeping what they computed.

In: a normal graph, whose nodes may carry the marks of ``checkpoints.py``; the modules that the user asked for.
Out: the same graph. A node of a checkpointed call has one more entry on its stack of modules, where the call was made:

    nn_module_stack   {root: Model, layers.0: Layer, layers.0.mlp: Mlp}
                ->    {root: Model, layers.0: Layer, layers.0@checkpoint: Layer, layers.0.mlp: Mlp}

Passes copy the stack to whatever they write in place of a node, and the code generator cuts the graph into calls by it.

A checkpointed call within another one is computed anew with that one, not once more by itself: of several entries the
outermost stays.

What is computed anew must read what was read before, and must not update anything a second time. So where the model
writes to a buffer or an input, all read a copy of it: the write comes at the end of the forward pass. And a batch norm
within such a call moves copies of its running statistics, which are written back at the end, too.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.capture.checkpoint_regions import POLICY, marks_of
from fxshard.errors import PlanError
from fxshard.ir.info import copy_graph
from fxshard.ir.origins import CHECKPOINT, clean_path
from fxshard.rules.recipe import written

__all__ = ["mark_recomputed"]

_aten = torch.ops.aten

Stack = Mapping[str, tuple[str, Any]]


def mark_recomputed(graph: fx.Graph, asked: Sequence[str], modules: Iterable[str]) -> tuple[fx.Graph, tuple[str, ...]]:
    """Marks the calls that are computed anew.

    Args:
        graph: the graph; it is not changed.
        asked: names or globs of modules.
        modules: the names of the model's modules.

    Returns:
        The graph, and what could not be done as the user asked.

    Raises:
        PlanError: where a glob matches no module, or none that is called; all of them are listed.
    """
    if not asked and not any(marks_of(node.meta) for node in graph.nodes):
        return graph, ()
    work = _Calls(_chosen(graph, asked, list(modules)))
    for node in graph.nodes:
        work.note(node)
    stacks = {node.name: work.entered(node) for node in graph.nodes if node.op == "call_function"}
    if not any(stacks.values()):
        return graph, ()
    graph = copy_graph(graph)
    for node in graph.nodes:
        stack = stacks.get(node.name)
        if stack is not None:
            node.meta["nn_module_stack"] = stack
    for node in list(graph.nodes):
        if stacks.get(node.name) is not None:
            _update_copies(node)
    _read_copies(graph)
    return graph, tuple(work.notes())


def _stack(node: fx.Node) -> Stack:
    return node.meta.get("nn_module_stack") or {}


def _paths(node: fx.Node) -> list[str]:
    return [clean_path(path) for path, *_ in _stack(node).values()]


def _chosen(graph: fx.Graph, asked: Sequence[str], modules: list[str]) -> frozenset[str]:
    """The modules that the globs match, and that are called."""
    if not asked:
        return frozenset()
    called = {path for node in graph.nodes for path in _paths(node) if path}
    out: set[str] = set()
    problems = []
    for glob in asked:
        found = [n for n in modules if n and (n == glob or fnmatch.fnmatchcase(n, glob))]
        out.update(called.intersection(found))
        if not found:
            near = difflib.get_close_matches(glob, [n for n in modules if n], 3, 0.4)
            fix = f"the nearest names are {', '.join(map(repr, near))}" if near else "see model.named_modules()"
            problems.append(PlanError(f"checkpoint {glob!r} matches no module of the model", fix=fix))
        elif not called.intersection(found):
            inside = [n for n in called if n.startswith(f"{found[0]}.")]
            fix = f"name what is in it, such as {found[0] + '.*'!r}" if inside else "name a module that computes"
            problems.append(PlanError(f"checkpoint {glob!r} matches {found[0]!r}, which is not called", fix=fix))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        text = "\n".join(f"{i}. {problem}" for i, problem in enumerate(problems, 1))
        raise PlanError(f"{len(problems)} entries of checkpoint cannot be applied:\n{text}")
    return frozenset(out)


@dataclass
class _Calls:
    """The checkpointed calls of a graph.

    Attributes:
        modules: the modules whose calls are computed anew.
        around: a checkpoint of the model's own -> the calls of modules that surround all of its nodes.
        names: a checkpoint of the model's own -> its function's name.
        dropped: checkpoints of the model's own that lie within others.
    """

    modules: frozenset[str]
    around: dict[int, list[str]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    dropped: dict[str, None] = field(default_factory=dict)

    def note(self, node: fx.Node) -> None:
        """Looks at a node's marks."""
        if node.op != "call_function":
            return
        keys = list(_stack(node))
        for number, name in marks_of(node.meta).items():
            self.names[number] = name
            known = self.around.setdefault(number, keys)
            same = next((i for i, (a, b) in enumerate(zip(known, keys, strict=False)) if a != b), None)
            self.around[number] = known[: min(len(known), len(keys)) if same is None else same]

    def entered(self, node: fx.Node) -> dict[str, tuple[str, Any]] | None:
        """The node's stack with the entry of its checkpointed call; None where it stands in none."""
        stack, paths = _stack(node), _paths(node)
        found: list[tuple[int, int, int | str]] = [
            (depth, 0, path) for depth, path in enumerate(paths, 1) if path in self.modules
        ]
        marks: list[tuple[int, int, int | str]] = (
            [(len(self.around[number]), 1, number) for number in marks_of(node.meta)] if stack else []
        )
        if not found and not marks:
            return None
        (depth, own, which), *others = sorted([*found, *marks], key=lambda each: each[:2])
        for deeper, _, other in others:
            if deeper > depth and isinstance(other, int):
                self.dropped[f"{self._name(other)} in {paths[deeper - 1] or 'the model'}"] = None
        entries = list(stack.items())
        key, (path, kind, *_) = entries[depth - 1]
        name = self._name(which, "part") if isinstance(which, int) else ""
        part = "".join(word.capitalize() for word in name.split("_"))
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        entry = f"{key}{CHECKPOINT}{which if own else ''}:{name}", (path, f"{kind}{part}")
        return dict([*entries[:depth], entry, *entries[depth:]])

    def _name(self, number: int, otherwise: str = "a function") -> str:
        return self.names[number].removesuffix(POLICY) or otherwise

    def notes(self) -> Iterable[str]:
        """What could not be done as the user asked."""
        if self.dropped:
            first, *more = self.dropped
            yield (
                f"checkpoint of {first}{f' and {len(more)} more' if more else ''}: within another checkpointed call, "
                "and computed anew with it, not by itself"
            )
        kept = [self._name(number) for number, name in self.names.items() if name.endswith(POLICY)]
        if kept:
            yield f"checkpoint of {kept[0]}: its context_fn is not followed, everything in it is computed anew"


def _update_copies(node: fx.Node) -> None:
    """Lets a call that moves running statistics move copies, which are written back at the end."""
    graph = node.graph
    end = next(iter(reversed(graph.nodes)))
    for held in dict.fromkeys(written(node).values()):
        if held.op != "get_attr" or node.target is _aten.copy_.default:
            continue
        with graph.inserting_before(node):
            copy = graph.call_function(_aten.clone.default, (held,))
        with graph.inserting_before(end):
            write = graph.call_function(_aten.copy_.default, (held, copy))
        copy.meta = {"val": held.meta["val"], "nn_module_stack": node.meta["nn_module_stack"]}
        write.meta = {"val": held.meta["val"]}
        node.replace_input_with(held, copy)


def _read_copies(graph: fx.Graph) -> None:
    """Lets all that reads what the model writes to read a copy."""
    writes = {n for n in graph.nodes if n.target is _aten.copy_.default}
    first = next(n for n in graph.nodes if n.op == "call_function")
    root = dict(list(_stack(first).items())[:1])
    for held in dict.fromkeys(n.args[0] for n in writes):
        readers = [user for user in held.users if user not in writes]
        if not readers or held.op not in ("get_attr", "placeholder"):
            continue
        if held.op == "get_attr":
            first.prepend(held)
        with graph.inserting_before(first):
            copy = graph.call_function(_aten.clone.default, (held,))
        copy.meta = {"val": held.meta["val"], "nn_module_stack": root}
        for reader in readers:
            reader.replace_input_with(held, copy)
