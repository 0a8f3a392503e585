"""The statements of one generated class, in the order of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import torch
from torch import fx

from fxshard.codegen.checkpointed import call_of
from fxshard.codegen.classes import Class, Classes
from fxshard.codegen.freeing import deaths
from fxshard.codegen.members import Members
from fxshard.codegen.naming import Scope, hint, identifier, operator_name, source_line, trace_of, user_names
from fxshard.codegen.regions import Region, is_empty
from fxshard.codegen.spelling import literal, spell
from fxshard.codegen.text import WIDTH, in_comment, in_docstring, is_index, statement, summarize
from fxshard.codegen.types import describe_local
from fxshard.ir.conversions import PASSED_ON
from fxshard.ir.info import is_float
from fxshard.ir.origins import module_of
from fxshard.mesh import Mesh


@dataclass(frozen=True)
class File:
    """What the classes of one file share.

    Attributes:
        mesh: the mesh.
        classes: the classes.
        axes: mesh axis -> how it is written.
        reserved: names that no value may have.
        inputs: the placeholders.
        output: the output node.
        imports: modules that the statements need; they are added as statements are written.
        is_uneven: whether the ranks' programs differ.
    """

    mesh: Mesh
    classes: Classes
    axes: Mapping[str, str]
    reserved: frozenset[str]
    inputs: Sequence[fx.Node]
    output: fx.Node
    imports: set[str] = field(default_factory=set)
    is_uneven: bool = False


@dataclass(frozen=True)
class _Statement:
    """One statement: its lines, the names that it gives, and those whose large values it reads last."""

    lines: list[str]
    defined: set[str]
    dead: list[str]


SOON = 2
"""A dead value whose name is given away within so many statements, or whose function ends, needs no ``del``."""


def _with_deletions(written: Sequence[_Statement]) -> Iterator[str]:
    for at, each in enumerate(written):
        yield from each.lines
        following = written[at + 1 : at + 1 + SOON]
        dead = [name for name in each.dead if not any(name in other.defined for other in following)]
        if dead and len(following) == SOON:
            yield f"        del {', '.join(dead)}"


class Body:
    """The lines of one class."""

    def __init__(self, file: File, each: Class) -> None:
        self.file = file
        self.each = each
        self.region = each.region
        self.scope = Scope(file.reserved)
        self.members = Members(file.classes, each.region)
        self.source = ""
        self.defined: set[str] = set()
        self.nameless: set[fx.Node] = set()
        self.uses: dict[fx.Node, list[int]] = {}
        self.ends = {
            trace_of(item): item
            for item in self.region.items
            if isinstance(item, fx.Node) and item.target not in PASSED_ON
        }
        for at, item in enumerate(self.region.items):
            for node in item.inputs if isinstance(item, Region) else item.all_input_nodes:
                self._use(node, at)
            if isinstance(item, Region) and item.decision is not None:
                self._use(item.decision, at)
        for node in self._returned():
            self._use(node, len(self.region.items))
        self.loops, self.enters = self._find_loops()

    def _use(self, node: fx.Node, at: int) -> None:
        self.uses.setdefault(node, []).append(at)
        self.scope.read(node, at)

    def _returned(self) -> Sequence[fx.Node]:
        return self.file.output.all_input_nodes if self.region.parent is None else list(self.region.outputs)

    def lines(self) -> Iterator[str]:
        """The whole class."""
        yield f"class {self.each.name}:"
        where = summarize(self.each.paths) if self.region.path else "The whole model."
        if self.region.function:
            where = f"{self.region.function} in {summarize(self.each.paths) or 'the model'}"
        first, *more = wrap(in_docstring(where), WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [""]
        yield f'    """{first}' + ("" if more else '"""')
        yield from (*(f"    {line}" for line in more), '    """') if more else ()
        yield ""
        members = list(self.members.lines())
        header = "    def __init__(self, m):" if self.each.needs_weights else "    def __init__(self):"
        yield from [header, *members, ""] if members else ()
        parameters = self.file.inputs if self.region.parent is None else list(self.region.inputs)
        for node in parameters:
            self.scope.name(node, [hint(node)], -1)
            if node not in self.uses:
                self.scope.read(node, len(self.region.items) if node.op == "placeholder" else -1)
        yield from statement(4, f"def __call__({', '.join(['self', *(self.scope.names[n] for n in parameters)])}):")
        yield from self._statements()

    def _statements(self) -> Iterator[str]:
        items = self.region.items
        dead = deaths(self.region, self.scope.last_use, self.file.mesh)
        written: list[_Statement] = []
        at = 0
        while at < len(items):
            item, start = items[at], at
            self.defined = set()
            if isinstance(item, Region):
                at = self.loops.get(start, start)
                lines = [*(self._loop(start, at) if at > start else self._call(item, at))]
            else:
                lines = [*self._node(item, at)]
            held = [self.scope.names[n] for n in dead.get(at, ()) if self.scope.holds(n)]
            written.append(_Statement(lines, self.defined, held))
            at += 1
        yield from _with_deletions(written)
        if self.region.parent is None:
            yield from statement(8, f"return {self.text(self.file.output.args[0])}")
        elif self.region.outputs:
            yield from statement(8, f"return {', '.join(self.scope.names[n] for n in self.region.outputs)}")
        elif not items:
            yield "        pass"

    # --- statements ------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node, at: int) -> Iterator[str]:
        yield from self._source(node)
        code = spell(node, self.text, self.file.imports, self.file.axes)
        if not node.users:
            yield from statement(8, code, self._comment(node))
            return
        wishes = list(self._wishes(node))
        name = self._give(node, [*wishes, *self._fallbacks(node, at)] if node.target not in PASSED_ON else wishes, at)
        if name not in wishes:
            self.nameless.add(node)
        yield from statement(8, f"{name} = {code}", self._comment(node))

    def _source(self, node: fx.Node) -> Iterator[str]:
        """The user's line, above the first statement that comes from it."""
        where, code, _ = source_line(trace_of(node))
        if where and where != self.source and node.target not in PASSED_ON:
            self.source = where
            yield f"        # {in_comment(f'{where}: {code}')}"[:120].rstrip()

    def _give(self, node: fx.Node, wishes: Iterable[str], at: int) -> str:
        name = self.scope.name(node, wishes, at)
        self.defined.add(name)
        return name

    def _comment(self, node: fx.Node) -> str:
        return describe_local(node, self.file.mesh)

    def _wishes(self, node: fx.Node) -> Iterator[str]:
        """Names for a node's result, best first: the user's for a line's result, the leaf module's, the user's."""
        names = user_names(node)
        yield from self._entered(node)
        if node.target in PASSED_ON:
            source = node.args[0]
            if self.scope.names.get(source):
                yield self.scope.names[source]
            yield hint(node)
            return
        if len(names) == 1 and self.ends.get(trace_of(node)) is node:
            yield names[0]
        leaf = module_of(node)
        last = leaf.rpartition(".")[2]
        if leaf != self.region.path and last and not is_index(last):
            yield identifier(last)
        elif len(names) == 1 and self._leads(node):
            yield names[0]
        if len(names) > 1 and hint(node) in names:
            yield hint(node)

    def _fallbacks(self, node: fx.Node, at: int) -> Iterator[str]:
        """Names for a result that has none: that of a nameless operand which ends here, the operator's."""
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) and is_float(node.meta.get("val")):
            for operand in node.all_input_nodes:
                ends = operand in self.nameless and self.scope.last_use[operand] == at
                if ends and self._comment(operand).split("  ")[0] == self._comment(node).split("  ")[0]:
                    yield self.scope.names[operand]
        yield operator_name(node.target)

    def _leads(self, node: fx.Node) -> bool:
        """Whether nothing but the rest of the user's line reads a node, each step from the one before."""
        trace = trace_of(node)
        while self.ends.get(trace) is not node:
            if len(node.users) != 1:
                return False
            (user,) = node.users
            if not user.args or user.args[0] is not node or (trace_of(user) != trace):
                return False
            node = user
        return True

    def _call(self, region: Region, at: int) -> Iterator[str]:
        self.source = ""
        code = call_of(region, self.members.names[id(region)], map(self.text, region.inputs), self.file.is_uneven)
        if region.decision is not None and region.way is not None:
            nothing = "None" if len(region.outputs) < 2 else f"({', '.join(['None'] * len(region.outputs))})"
            ways = (code, nothing) if region.way[1] else (nothing, code)
            code = f"{ways[0]} if {self.text(region.decision)} else {ways[1]}"
        if region.outputs:
            code = f"{', '.join(self._result(n, region, at) for n in region.outputs)} = {code}"
        kinds = [self._comment(n) for n in region.outputs]
        yield from statement(8, code, ", ".join(filter(None, kinds)) if len(kinds) <= 2 else "")

    def _result(self, node: fx.Node, region: Region, at: int) -> str:
        return self._give(node, [*self._entered(node), _result_name(node, region)], at)

    def _entered(self, node: fx.Node) -> Iterator[str]:
        """The name that a value has in the loop that it enters."""
        if node in self.enters:
            yield self.enters[node]

    # --- loops -----------------------------------------------------------------------------------------------------

    def _find_loops(self) -> tuple[dict[int, int], dict[fx.Node, str]]:
        """First call of a loop -> its last; and the values that only enter a loop, with their names in it."""
        loops: dict[int, int] = {}
        enters: dict[fx.Node, str] = {}
        after = 0
        for at, item in enumerate(self.region.items):
            if isinstance(item, Region) and at >= after:
                end = self._loop_end(at)
                after = end + 1
                if end > at:
                    loops[at] = end
                    (initial,) = self._changing(at)
                    if self.uses[initial] == [at]:
                        (result,) = item.outputs
                        enters[initial] = _result_name(result, item)
        return loops, enters

    def _changing(self, at: int) -> list[fx.Node]:
        """What the call at ``at`` reads, and the next one does not."""
        first, second = self.region.items[at : at + 2]
        assert isinstance(first, Region)
        assert isinstance(second, Region)
        return [a for a, b in zip(first.inputs, second.inputs, strict=True) if a is not b]

    def _loop_end(self, at: int) -> int:
        """The last of the calls from ``at`` on that one loop can make: each takes what the one before it gave."""
        items = self.region.items
        end = at
        taken: fx.Node | None = None  # what the last call of the loop so far was given
        first = items[at]
        assert isinstance(first, Region)
        if len(first.outputs) != 1 or id(first) not in self.members.listed:
            return at
        prefix, index = self.members.listed[id(first)]
        while end + 1 < len(items):
            here, after = items[end], items[end + 1]
            assert isinstance(here, Region)
            if not isinstance(after, Region) or self.members.listed.get(id(after)) != (prefix, index + end + 1 - at):
                break
            (carried,) = here.outputs
            changes = [(a, b) for a, b in zip(here.inputs, after.inputs, strict=False) if a is not b]
            if (
                self.file.classes.of(here) is not self.file.classes.of(after)
                or here.checkpoint != after.checkpoint
                or here.way is not None
                or after.way is not None
                or [b for _, b in changes] != [carried]
                or self.uses.get(carried) != [end + 1]
                or (taken is not None and changes[0][0] is not taken)
            ):
                break
            end, taken = end + 1, carried
        return end

    def _loop(self, at: int, end: int) -> Iterator[str]:
        first, last = self.region.items[at], self.region.items[end]
        assert isinstance(first, Region)
        assert isinstance(last, Region)
        self.source = ""
        (initial,) = self._changing(at)
        (result,) = last.outputs
        before = self.text(initial)
        name = self._result(result, last, at)
        if name != before:
            yield from statement(8, f"{name} = {before}")
        prefix, index = self.members.listed[id(first)]
        members, count = self.members.lists[prefix]
        each = members.removesuffix("s") if members != members.removesuffix("s") else "layer"
        each = self.scope.name(first, [each, "layer"], end)
        self.scope.read(first, end)
        whole = index == 0 and end - at + 1 == count
        cut = "" if whole else f"[{index}:{index + end - at + 1}]"
        arguments = (name if n is initial else self.text(n) for n in first.inputs)
        yield f"        for {each} in self.{members}{cut}:"
        code = call_of(first, each, arguments, self.file.is_uneven)
        yield from statement(12, f"{name} = {code}", self._comment(result))

    # --- arguments -------------------------------------------------------------------------------------------------

    def text(self, value: Any) -> str:
        """An argument as Python text."""
        if isinstance(value, fx.Node):
            return self.scope.names.get(value) or self._attribute(value)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return "(" + ", ".join(map(self.text, value)) + ("," if len(value) == 1 else "") + ")"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.text, value)) + "]"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(k)}: {self.text(v)}" for k, v in value.items()) + "}"
        return literal(value)

    def _attribute(self, node: fx.Node) -> str:
        assert node.op == "get_attr", f"{node.name} is read before it is made"
        if is_empty(node):
            value = node.meta["val"]
            return f"torch.empty({tuple(value.shape)}, dtype={value.dtype}, device=device)"
        return self.members.weight(str(node.target))


def _result_name(node: fx.Node, region: Region) -> str:
    """What a call's result is called: as the user does, else as the module."""
    last = region.path.rpartition(".")[2]
    is_named_by_user = user_names(node) or is_index(last) or len(region.outputs) > 1
    return hint(node) if is_named_by_user else identifier(last)
