"""Writes on one way of a branch, to memory that is there whether or not the way is taken.

A way writes to a copy of its own, and where the ways meet the memory gets what it holds on the way that was taken:

    add_ = add_(seen, x)     on one way         copy = clone(seen)                  on one way
                                          ->    add_ = add_(copy, x)                on one way
                                                taken = taken(decision, copy, seen, 0)
                                                copy_ = copy_(seen, taken)

Running statistics, which a norm writes beside what it returns, stay as they are where nothing else reads them: a way
that is not taken is not run.

``taken`` gives a value, no name for memory: where one device could tell the difference, by a later write, the model is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxshard.capture.traces import operands, refused
from fxshard.ir.root import Root
from fxshard.rules.effects import base_of, is_mutating
from fxshard.rules.recipe import written
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.module import find
from fxshard.torch_internals import SET_GRAD

__all__ = ["check_names", "copies_written", "held_by"]

_clone, _copy = torch.ops.aten.clone.default, torch.ops.aten.copy_.default


def held_by(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node that stands for the same memory as the result of an operator in place; of a copy, what it stands for."""
    while is_mutating(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return copies.get(node, node)


def copies_written(root: Root, nodes: Sequence[fx.Node], mark: fx.Node) -> dict[fx.Node, fx.Node]:
    """Lets a way write to copies.

    Args:
        root: has what is read.
        nodes: the way, in a row.
        mark: its decision.

    Returns:
        The copies, each with the memory outside of the way that it stands for.

    Raises:
        CaptureError: it writes to what can be read by another name, or behind the back of autograd.
    """
    own, found = set(nodes), dict[fx.Node, fx.Node]()
    for node in nodes:
        for name, held in written(node).items():
            base = base_of(held)
            if base in own:
                continue
            if not is_mutating(node.target):
                if base is not held or not own.issuperset(_readers(base)):
                    raise refused(node, f"one way alone changes {name}, which is read elsewhere")
                continue
            if base not in found.values():
                _check_alone(root, base, nodes, own)
                with mark.graph.inserting_before(nodes[0]):
                    copy = mark.graph.call_function(_clone, (base,))
                copy.meta = {**mark.meta, "val": base.meta["val"]}
                found[copy] = base
    for copy, base in found.items():
        for node in nodes:
            node.replace_input_with(base, copy)
    return found


def _readers(held: fx.Node) -> Iterable[fx.Node]:
    """All that read some memory of the model, or an input."""
    for node in held.graph.find_nodes(op=held.op):
        if node.target == held.target:
            yield from node.users


def _check_alone(root: Root, base: fx.Node, nodes: Sequence[fx.Node], own: set[fx.Node]) -> None:
    """Raises where a way can see, or write to, some memory otherwise than by its name."""
    for node in nodes:
        for read in operands(node):
            same = read.op == base.op != "call_function" and read.target == base.target
            if read not in own and read is not base and (same or base_of(read) is base):
                raise refused(node, "one way changes a tensor that it reads by another name as well")
    value = find(root, str(base.target)) if base.op == "get_attr" else base.meta["val"]
    hidden = base.op == "call_function" and any(node.target is SET_GRAD for node in nodes)
    if hidden or (base.op != "call_function" and (isinstance(value, nn.Parameter) or value.requires_grad)):
        raise refused(nodes[0], "one way changes a tensor without telling autograd of it")


def write_taken(
    held: fx.Node,
    written: Sequence[Mapping[fx.Node, fx.Node]],
    mark: fx.Node,
    taken: Callable[[fx.Node, fx.Node], fx.Node],
) -> Iterator[fx.Node]:
    """Emits where two ways meet, and gives the nodes: some memory gets what it holds on the way that was taken.

    Args:
        held: the memory.
        written: the copies that each way writes to.
        mark: the decision.
        taken: emits the choice between two values.
    """
    graph = held.graph

    def emitted(target: Any, *args: fx.Node) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {**mark.meta, "val": held.meta["val"]}
        return node

    sides = []
    for copies in written:
        value = next((copy for copy, base in copies.items() if base is held), held)
        if value is held and held.op != "call_function":  # what a backward pass keeps must not be written to
            value = emitted(_clone, held)
            yield value
        sides.append(value)
    value = taken(*sides)
    yield value
    yield emitted(_copy, held, value)


def check_names(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], beside: Container[fx.Node]) -> None:
    """Raises where a later write would, on one device, be seen by another name of the memory that a branch gave.

    On one device, what a branch gives may be the memory of something else, such as the ``x`` that a skipped layer hands
    on. The value that ``taken`` gives is not.
    """
    memory: dict[fx.Node, set[fx.Node]] = {}  # what a name may be the memory of, on one device
    for node in graph.nodes:
        if node.target is TAKEN and node not in beside:
            sides = {_memory(side, copies) for side in node.args[1:3]}
            for side in sides:
                memory.setdefault(side, {side})
            memory[node] = set[fx.Node]().union(*(memory[side] for side in sides))
    if not memory:
        return
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        base = base_of(node.args[0]) if is_mutating(node.target) else None
        if base not in memory:
            continue
        before = {each for each in memory if place[each] < place[node] and each is not base}
        others = {each for each in before if not memory[each].isdisjoint(memory[base])}
        if not others:
            continue
        late = [n for n in graph.nodes if place[n] > place[node] and _reads(n, others, copies)]
        if late or any(other.op != "call_function" for other in others):
            raise refused(node, "writes afterwards to a tensor that one of the ways gives, and that has another name")


def _memory(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    base: fx.Node = base_of(node)
    return copies.get(base, base)


def _reads(node: fx.Node, names: Iterable[fx.Node], copies: Mapping[fx.Node, fx.Node]) -> bool:
    return node.target is not TAKEN and any(_memory(read, copies) in names for read in operands(node))
