"""Branches: a model's ``if`` on a value, as both of its ways, of which a run takes one.

``torch.export`` follows one way, and so must know it. Here it is told (``decisions.py``), and each answer leaves a
mark. One with which the model raises is an assertion that it is the other. Else the model is traced again with other
answers, one decision turned or, of many, every second one at once, and the traces are laid side by side
(``traces.py``): up to a mark, and from some node behind it on, they are equal. What stands between is what the two ways
compute; where a node behind reads another value, there the ways meet:

    rand = rand([])                            rand = rand([])
    lt = lt(rand, 0.1)                         lt = lt(rand, 0.1)
    linear = linear(x, w)      x, when lt      linear = linear(x, w)           # on branch 0, where lt is false
    relu = relu(linear)        relu(x)   ->    taken = taken(lt, x, linear, 0)
                                               relu = relu(taken)

That every decision is for itself is proven on every trace, among them the one with all decisions turned and some with
other sets of them: the graph, with its branches decided so, must be that trace, node for node. Otherwise the model is
refused.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxshard.capture.branch_writes import check_names, copies_written, held_by, write_taken
from fxshard.capture.decisions import Decisions
from fxshard.capture.traces import Meeting, Trace, alike, operands, refused, same_leaves
from fxshard.errors import CaptureError
from fxshard.ir.origins import BRANCH, branch_of, module_of, source_of
from fxshard.ir.root import Root
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.module import find
from fxshard.torch_internals import SET_GRAD

__all__ = ["with_branches"]

aten = torch.ops.aten
ASSERTIONS = 16
"""How many decisions may be assertions: each takes a trace that ends in an error."""


def with_branches(export: Callable[[Decisions], Trace]) -> Trace:
    """The trace whose graph has the ways of all decisions in it.

    Args:
        export: traces the model with these decisions.

    Raises:
        CaptureError: a decision is not one between two ways that meet again.
    """
    sure: dict[int, str] = {}
    held: dict[int, bool] = {}

    def trace(wanted: Mapping[int, bool], free: frozenset[int] | None = None) -> tuple[Trace, frozenset[int]]:
        """A trace with these answers, and of those in ``free`` the ones with which the model did not raise."""
        while True:
            decisions = Decisions({**wanted, **held})
            try:
                return export(decisions), frozenset(free or ()) - sure.keys()
            except CaptureError as error:
                last = decisions.count - 1
                if free is not None and last not in free:
                    if len(free) != 1 or decisions.drawn or not error.by_the_model:
                        raise CaptureError(
                            "the forward decides by values inside a tensor, and on one way decides again: "
                            + error.what,
                            source=error.source,
                            fix="use torch.where or torch.cond, or pass the value as a number",
                        ) from None
                    # that way raises, unless what it decides in turn comes out otherwise: it is not taken
                    (last,) = free
                given_up = last < 0 or last in sure or decisions.drawn or len(sure) == ASSERTIONS
                if given_up or not error.by_the_model:
                    raise
                sure[last] = error.what
                held[last] = not decisions.answers.get(last, False)

    parts = 0
    while True:
        base, _ = trace({})
        answers = {number: held.get(number, False) for number in range(base.count)}
        if not base.count:
            return base
        if base.count != len(base.marks):
            raise CaptureError(
                "the forward decides by values inside a tensor, within torch.cond or its like",
                fix="use torch.where there, or a torch.cond of its own",
            )
        parts = 2 * parts or (base.count if base.count <= FEW else 2)
        try:
            return _with_both(trace, base, answers, sure, parts)
        except CaptureError:
            if parts >= min(base.count, MANY):
                raise


FEW, MANY = 4, 16
"""So many decisions are turned one by one; of more, every second one at once, or rarer ones, where that does not do."""
Tracer = Callable[..., tuple[Trace, frozenset[int]]]


def _with_both(trace: Tracer, base: Trace, answers: dict[int, bool], sure: Mapping[int, str], parts: int) -> Trace:
    """The base, with the ways of all decisions in it; one in ``parts`` decisions is turned at once."""
    for _ in range(2):
        groups = [frozenset(range(start, base.count, parts)) - sure.keys() for start in range(parts)]
        found = [trace({**answers, **_turned(answers, group)}, group) for group in groups if group]
        others = [(flips, other) for other, flips in found if flips]
        meetings = [Meeting(base, other, flips) for flips, other in others]
        short = {number for each in meetings for number in each.shorter}
        if not short:
            break
        answers |= _turned(answers, short)  # the way that computes more is followed: it reads what others leave
        base, _ = trace(answers, frozenset())
    free = sorted(answers.keys() - sure.keys())
    turned = [
        *others,
        *((flips, trace({**answers, **_turned(answers, flips)}, frozenset())[0]) for flips in _more(free)),
    ]
    for each in meetings:
        each.join()
    beside, copies = _merge(base, answers, meetings, sure)
    for flips, other in turned:
        _prove(base, beside, copies, other, {**answers, **_turned(answers, flips)})
    return base


def _turned(answers: Mapping[int, bool], flips: Sequence[int] | frozenset[int] | set[int]) -> dict[int, bool]:
    return {k: not answers[k] for k in flips}


def _more(free: Sequence[int]) -> list[frozenset[int]]:
    """Which decisions are turned, beside every so many, to see whether the graph says the same: of a few, all sets of
    several; of more, all, and some at random.
    """
    if len(free) <= 3:
        sets = [frozenset(each) for size in range(2, len(free) + 1) for each in itertools.combinations(free, size)]
        return sets or [frozenset(free)]
    rng = random.Random(len(free))
    return [frozenset(free), *(frozenset(k for k in free if rng.random() < 0.5) for _ in range(2))]


def _merge(
    base: Trace, answers: Mapping[int, bool], meetings: Sequence[Meeting], sure: Mapping[int, str]
) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """Writes what other ways compute into the base's graph, and the values where they meet.

    Returns:
        What is there beside what the model computes; and the copies that ways write to, with what they stand for.
    """
    graph = base.root.graph
    beside: set[fx.Node] = set()
    copies: dict[fx.Node, fx.Node] = {}
    joins: dict[int, dict[fx.Node, fx.Node]] = {}
    away: dict[int, list[fx.Node]] = {}
    match: dict[fx.Node, fx.Node] = {}
    for each in meetings:
        match |= each.match
        away |= {k: each.other[k] for k in each.flips}
        joins |= each.joins
    if any(n.op == "get_attr" and n not in match for nodes in away.values() for n in _read(nodes)):
        raise refused(base.marks[0], "one way alone reads a tensor")
    now: dict[fx.Node, fx.Node] = {}  # a value that only the base computes -> what others read
    recorded = _recorded(base.root)
    for number in range(base.count):
        mark, segment = base.marks[number], base.segments[number + 1]
        if number in sure:
            beside |= _assert(mark, answers[number], sure[number])
            continue
        own = next((e.own[number] for e in meetings if number in e.flips), [])
        decision = _flag(mark, beside) if own else None
        with graph.inserting_before(segment[len(own)]):
            for node in away[number]:
                for operand in operands(node):
                    if operand not in match:
                        raise refused(mark, "one way alone reads a tensor")
                match[node] = graph.node_copy(node, lambda n: now.get(match[n], match[n]))
        theirs = [match[n] for n in away[number]]
        written = [copies_written(base.root, way, mark) for way in (own, theirs)]
        _mark([*written[0], *own], number, answers[number], mark)
        _mark([*written[1], *theirs], number, not answers[number], mark)
        if (own or theirs) and not joins[number] and not any(written):
            raise refused(mark, "nothing that either way computes is read")
        copies |= written[0] | written[1]
        with graph.inserting_before(segment[len(own)]):
            taken = functools.partial(_taken, mark, decision, number, answers[number])
            for x, y in joins[number].items():
                other = now.get(match.get(y, y), match.get(y, y))
                held = held_by(x, copies)
                if mark not in recorded and any(side in recorded for side in (x, other)):
                    raise refused(mark, "hands on, within no_grad, a value that may have a gradient")
                now[x] = held if held is not x and held is held_by(other, copies) else taken(x, other)
            for held in dict.fromkeys([*written[0].values(), *written[1].values()]):
                beside.update(write_taken(held, written, mark, taken))
        for x in own:
            for reader in [user for user in x.users if user not in own and user.target is not TAKEN]:
                if x not in now:
                    raise refused(mark, "what follows depends on it")
                reader.replace_input_with(x, now[x])
    for number, mark in enumerate(base.marks):
        if number not in sure:
            graph.erase_node(mark)
    check_names(graph, copies, beside)
    return beside | copies.keys(), copies


def _taken(mark: fx.Node, decision: Any, number: int, answer: bool, x: fx.Node, other: fx.Node) -> fx.Node:
    """What ``x``, on the way of ``answer``, and ``other`` are behind a decision."""
    yes, no = (x, other) if answer else (other, x)
    node = mark.graph.call_function(TAKEN, (decision, yes, no, number))
    node.meta = {**mark.meta, "val": x.meta["val"]}
    return node


def _recorded(root: Root) -> set[fx.Node]:
    """What may carry a gradient: inputs, parameters, and what is made where gradients are enabled."""
    found, enabled = set(), True
    for node in root.graph.nodes:
        if node.target is SET_GRAD:
            enabled = bool(node.args[0])
        is_weight = node.op == "get_attr" and getattr(find(root, str(node.target)), "requires_grad", False)
        if node.op == "placeholder" or is_weight or (enabled and node.op != "get_attr"):
            found.add(node)
    return found


def _flag(mark: fx.Node, beside: set[fx.Node]) -> fx.Node:
    """What a decision is made by, as one bool."""
    value = mark.all_input_nodes[0]
    with mark.graph.inserting_before(mark):
        if value.meta["val"].dtype != torch.bool:
            value = _call(aten.ne.Scalar, (value, 0), mark, beside)
        if value.meta["val"].dim():
            value = _call(aten.reshape.default, (value, []), mark, beside)
    return value


def _call(target: Any, args: tuple[Any, ...], mark: fx.Node, beside: set[fx.Node]) -> fx.Node:
    node = mark.graph.call_function(target, args)
    value = args[0].meta["val"]
    with value.fake_mode:
        node.meta = {**mark.meta, "val": target(value, *args[1:])}
    beside.add(node)
    return node


def _assert(mark: fx.Node, answer: bool, error: str) -> set[fx.Node]:
    """Lets a mark assert that a decision is what it was."""
    beside = {mark}
    value: Any = mark.args[0]
    if not answer:
        with mark.graph.inserting_before(mark):
            value = _call(aten.eq.Scalar, (value, 0), mark, beside)
    where = source_of(mark) or module_of(mark) or "the model"
    mark.args = (value, f"{where} decides by a value, and goes another way now, which ends in: {error}")
    return beside


def _read(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        yield from operands(node)


def _mark(nodes: Sequence[fx.Node], number: int, when: bool, mark: fx.Node) -> None:
    """Notes on nodes that they belong to one way: within the call of the module that decides, ``mark``'s."""
    stacks = [list((node.meta.get("nn_module_stack") or {"": ("", "")}).items()) for node in (mark, *nodes)]
    depth = 0
    while all(len(s) > depth and s[depth] == stacks[0][depth] for s in stacks):
        depth += 1
    stacks = stacks[1:]
    for node, stack in zip(nodes, stacks, strict=True):
        key, entry = stack[max(depth - 1, 0)]
        inserted = (f"{key}{BRANCH}{number}:{when}", entry)
        node.meta["nn_module_stack"] = dict([*stack[:depth], inserted, *stack[depth:]])


def _prove(
    base: Trace, beside: set[fx.Node], copies: Mapping[fx.Node, fx.Node], other: Trace, answers: Mapping[int, bool]
) -> None:
    """Raises where the graph, decided so, is not what was traced with these answers."""
    match = same_leaves(base, other, base.marks[0])
    value: dict[fx.Node, fx.Node] = {}

    def meant(node: fx.Node | None) -> fx.Node | None:
        while node is not None and (held := held_by(value.get(node, node), copies)) is not node:
            node = held
        return node

    ours: list[fx.Node] = []
    for node in base.root.graph.nodes:
        branch = branch_of(node)
        if node in beside:
            continue
        if node.target is TAKEN:
            chosen = node.args[1] if answers[node.args[3]] else node.args[2]
            value[node] = value.get(chosen, chosen)
        elif node.op in ("call_function", "output") and (branch is None or answers[branch[0]] == branch[1]):
            ours.append(node)
    theirs = [node for segment in other.segments for node in segment]
    for a, b in zip(ours, theirs, strict=False):
        reads = ((meant(x), meant(match.get(held_by(y, {})))) for x, y in zip(operands(a), operands(b), strict=False))
        if not alike(a, b) or any(x is not y for x, y in reads):
            raise refused(base.marks[0], "the ways of several decisions depend on each other")
        match[b] = a
    if len(ours) != len(theirs):
        raise refused(base.marks[0], "the ways of several decisions depend on each other")
