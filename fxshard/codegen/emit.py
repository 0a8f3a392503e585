"""The Python source that a rank runs: the user's tree of modules, as classes over this rank's weights.

In: the final graph.   Out: source such as

    class Mlp:
        def __init__(self, m):
            self.up, self.down = ...

        def __call__(self, x):
            # mlp.py:6: y = self.down(F.relu(self.up(x)))
            up = F.linear(x, self.up.weight)  # f32[8, 64]  tp: Shard(1)
            ...

Calls that compute the same are one class: equal operators on equal types, with the weights of their own modules. The
statements stand in the order of the graph, so that all ranks issue the same collectives in the same order.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.codegen.naming import RESERVED, Scope, hint, identifier, operator_name, source_line, trace_of, user_names
from fxshard.codegen.regions import Region, is_empty, regions_of, walk
from fxshard.codegen.spelling import is_ours, literal, spell
from fxshard.codegen.text import statement, summarize
from fxshard.mesh import Mesh
from fxshard.passes.capture import module_of
from fxshard.passes.insert_collectives import CONVERSIONS
from fxshard.passes.typing import has_info, info_of
from fxshard.placement import describe_all, local_shape
from fxshard.runtime import collectives

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "b8", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip

_WORDS = {"self", "m", "aten", "torch", "F", "operator", "math", "device", "axes", "build", *dir(collectives)}


def describe_value(node: fx.Node, mesh: Mesh) -> str:
    """The local type of a node's result, e.g. ``f32[4, 16, 32]``."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    shape = tuple(value.shape)
    if has_info(node) and info_of(node).outputs:
        shape = local_shape(shape, info_of(node).placements, mesh.sizes)
    return f"{DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, shape))}]"


def describe_local(node: fx.Node, mesh: Mesh) -> str:
    """The local type of a node's result, and its placements where it is not replicated."""
    text = describe_value(node, mesh)
    if text and has_info(node) and info_of(node).outputs:
        placed = describe_all(info_of(node).placements, mesh.names)
        text += f"  {placed}" if placed != "Replicate" else ""
    return text


def emit(graph: fx.Graph, mesh: Mesh, title: str) -> str:
    """The source of a module with a function ``build(m)``: the model over the local weights ``m``, to be called.

    Every statement says what it gives: local type and placement; above it stands the user's line that it comes from.
    Mesh axes and ``device`` are names that ``runtime.module.load`` supplies.
    """
    return _File(graph, mesh).text(title)


@dataclass(eq=False)
class _Class:
    """One generated class: all the calls that compute alike."""

    region: Region
    number: int
    needs_weights: bool
    name: str = ""
    paths: list[str] = field(default_factory=list)


class _File:
    """One generated file."""

    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.graph = graph
        self.mesh = mesh
        self.axes = {a: a if a.isidentifier() and a not in RESERVED | _WORDS else f'axes["{a}"]' for a in mesh.names}
        self.reserved = _WORDS | set(mesh.names)
        self.imports: set[str] = set()
        self.root = regions_of(graph)
        self.output = next(iter(reversed(graph.nodes)))
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.classes: list[_Class] = []
        self.class_of: dict[int, _Class] = {}
        self._classify()

    def _classify(self) -> None:
        known: dict[Any, _Class] = {}
        for region in walk(self.root):
            key = _Key(self, region).value
            found = known.get(key)
            if found is None:
                found = known[key] = _Class(region, len(self.classes), self._needs_weights(region))
                self.classes.append(found)
            elif len(found.paths) == 1:
                found.region = region  # the second layer reads what a layer gives: better names than the first one's
            found.paths.append(region.path)
            self.class_of[id(region)] = found
        taken = set(self.reserved) | RESERVED
        for each in self.classes:
            each.name, count = each.region.class_name, 1
            while each.name in taken:
                count += 1
                each.name = f"{each.region.class_name}{count}"
            taken.add(each.name)
        self.reserved = self.reserved | {each.name for each in self.classes}

    def _needs_weights(self, region: Region) -> bool:
        """Whether a call, or one inside it, reads weights of its own module."""
        calls = region.children()
        if any(self.class_of[id(child)].needs_weights for child in calls):
            return True
        return any(True for _ in own_weights(region))

    def text(self, title: str) -> str:
        body: list[str] = []
        for each in self.classes:
            body += ["", "", *_Body(self, each).lines()]
        body += ["", "", "def build(m):", '    """The model over one rank\'s weights."""']
        body += [f"    return {_made(self.classes[-1], 'm')}"]
        used = sorted({n.target.__name__ for n in self.graph.nodes if is_ours(n.target)})
        text = "\n".join(body)
        lines = [f'"""{title}"""', ""]
        lines += (
            [*(f"import {name}" for name in sorted(self.imports - {"torch"})), ""] if self.imports - {"torch"} else []
        )
        lines += ["import torch"] if "torch." in text else []
        lines += ["from torch.nn import functional as F"] if "F." in text else []
        lines += [""] if lines[-1] else []
        if used:
            lines += [*statement(0, f"from fxshard.runtime.collectives import {', '.join(used)}"), ""]
        if "aten." in text:
            lines += ["aten = torch.ops.aten", ""]
        return "\n".join(lines[:-1] + body) + "\n"


class _Key:
    """What two calls must share to be one class."""

    def __init__(self, file: _File, region: Region) -> None:
        self.index: dict[fx.Node, int] = {}
        self.prefix = len(region.path) + 1 if region.path else 0
        for node in region.inputs:
            self._new(node)
        inputs = tuple(describe_local(n, file.mesh) for n in region.inputs)
        items: list[tuple[Any, ...]] = []
        for item in region.items:
            if isinstance(item, Region):
                items.append(
                    (
                        file.class_of[id(item)].number,
                        item.path[self.prefix :],
                        tuple(self._encode(n) for n in item.inputs),
                    )
                )
                for node in item.outputs:
                    self._new(node)
            else:
                placed = info_of(item).outputs if has_info(item) else None
                kwargs = tuple((k, self._encode(v)) for k, v in item.kwargs.items())
                items.append((item.target, self._encode(item.args), kwargs, placed))
                self._new(item)
        outputs = tuple(self.index[n] for n in region.outputs)
        self.value = (region.class_name, inputs, tuple(items), outputs, region.parent is None)

    def _new(self, node: fx.Node) -> None:
        self.index[node] = len(self.index)

    def _encode(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            found = self.index.get(value)
            if found is not None:
                return ("%", found)
            if value.op != "get_attr":
                return ("outer", value.name)
            tensor = value.meta.get("val")
            shape = str(tuple(tensor.shape)) + str(tensor.dtype) if isinstance(tensor, torch.Tensor) else ""
            return ("w", "" if is_empty(value) else str(value.target)[self.prefix :], shape)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._encode, value))
        if isinstance(value, slice):
            return ("slice", self._encode(value.start), self._encode(value.stop), self._encode(value.step))
        if isinstance(value, dict):
            return tuple((k, self._encode(v)) for k, v in value.items())
        if value is None or isinstance(value, str):
            return value
        return type(value), str(value)


class _Body:
    """The lines of one class."""

    def __init__(self, file: _File, each: _Class) -> None:
        self.file = file
        self.each = each
        self.region = each.region
        self.scope = Scope(file.reserved)
        self.members = _Members(file, each.region)
        self.source = ""
        self.uses: dict[fx.Node, list[int]] = {}
        self.ends = {
            trace_of(item): item
            for item in self.region.items
            if isinstance(item, fx.Node) and item.target not in CONVERSIONS
        }
        for at, item in enumerate(self.region.items):
            for node in item.inputs if isinstance(item, Region) else item.all_input_nodes:
                self._use(node, at)
        for node in self._returned():
            self._use(node, len(self.region.items))

    def _use(self, node: fx.Node, at: int) -> None:
        self.uses.setdefault(node, []).append(at)
        self.scope.read(node, at)

    def _returned(self) -> Sequence[fx.Node]:
        return self.file.output.all_input_nodes if self.region.parent is None else list(self.region.outputs)

    def lines(self) -> Iterator[str]:
        yield f"class {self.each.name}:"
        where = summarize(self.each.paths) if self.region.path else ""
        yield f'    """{where or "The whole model."}"""'
        yield ""
        members = list(self.members.lines())
        header = "    def __init__(self, m):" if self.each.needs_weights else "    def __init__(self):"
        yield from [header, *members, ""] if members else ()
        parameters = self.file.inputs if self.region.parent is None else list(self.region.inputs)
        for node in parameters:
            self.scope.name(node, self._parameter_names(node), -1)
            if node not in self.uses:
                self.scope.read(node, len(self.region.items) if node.op == "placeholder" else -1)
        yield from statement(4, f"def __call__({', '.join(['self', *(self.scope.names[n] for n in parameters)])}):")
        yield from self._statements()

    def _parameter_names(self, node: fx.Node) -> list[str]:
        if self.region.parent is None and node.op == "placeholder":
            return [identifier(str(node.target))]
        return [hint(node), operator_name(node.target) if node.op == "call_function" else hint(node)]

    def _statements(self) -> Iterator[str]:
        items = self.region.items
        at = 0
        while at < len(items):
            item = items[at]
            if isinstance(item, Region):
                end = self._loop_end(at)
                yield from self._loop(at, end) if end > at else self._call(item, at)
                at = end
            else:
                yield from self._node(item, at)
            at += 1
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
        name = self.scope.name(node, self._wishes(node), at)
        yield from statement(8, f"{name} = {code}", self._comment(node))

    def _source(self, node: fx.Node) -> Iterator[str]:
        """The user's line, above the first statement that comes from it."""
        where, code, _ = source_line(trace_of(node))
        if where and where != self.source and node.target not in CONVERSIONS:
            self.source = where
            yield f"        # {where}: {code}"[:120].rstrip()

    def _comment(self, node: fx.Node) -> str:
        return describe_local(node, self.file.mesh)

    def _wishes(self, node: fx.Node) -> Iterator[str]:
        """Names for a node's result, best first: the user's for a line's result, the leaf module's, the operator's."""
        names = user_names(node)
        if node.target in CONVERSIONS:
            source = node.args[0]
            if self.scope.names.get(source):  # type: ignore[arg-type]
                yield self.scope.names[source]  # type: ignore[index]
            yield hint(node)
            return
        ends = self.ends.get(trace_of(node)) is node
        if len(names) == 1 and ends:
            yield names[0]
        leaf = module_of(node)
        last = leaf.rpartition(".")[2]
        if leaf != self.region.path and last and not last.isdigit():
            yield identifier(last)
        elif len(names) == 1 and self._leads(node):
            yield names[0]
        yield hint(node) if len(names) > 1 else operator_name(node.target)

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
        arguments = ", ".join(self.text(n) for n in region.inputs)
        code = f"{self.members.names[id(region)]}({arguments})"
        if region.outputs:
            code = f"{', '.join(self._result(n, region, at) for n in region.outputs)} = {code}"
        kinds = [self._comment(n) for n in region.outputs]
        yield from statement(8, code, ", ".join(filter(None, kinds)) if len(kinds) <= 2 else "")

    def _result(self, node: fx.Node, region: Region, at: int) -> str:
        last = region.path.rpartition(".")[2]
        named = hint(node) if user_names(node) or last.isdigit() else identifier(last)
        return self.scope.name(node, [named], at)

    def _loop_end(self, at: int) -> int:
        """The last of the calls from ``at`` on that one loop can make: each takes what the one before it gave."""
        items = self.region.items
        end = at
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
                self.file.class_of[id(here)] is not self.file.class_of[id(after)]
                or [b for _, b in changes] != [carried]
                or self.uses.get(carried) != [end + 1]
                or (end > at and changes[0][0] is not next(iter(items[end - 1].outputs)))  # type: ignore[union-attr]
            ):
                break
            end += 1
        return end

    def _loop(self, at: int, end: int) -> Iterator[str]:
        first, second, last = (self.region.items[i] for i in (at, at + 1, end))
        assert isinstance(first, Region)
        assert isinstance(second, Region)
        assert isinstance(last, Region)
        self.source = ""
        (initial,) = (a for a, b in zip(first.inputs, second.inputs, strict=True) if a is not b)
        (result,) = last.outputs
        before = self.text(initial)
        name = self._result(result, last, at)
        if name != before:
            yield from statement(8, f"{name} = {before}")
        prefix, index = self.members.listed[id(first)]
        members, count = self.members.lists[prefix]
        each = members.removesuffix("s") if members != members.removesuffix("s") else "layer"
        each = self.scope.name(first, [each, "layer"], end)  # type: ignore[arg-type]
        self.scope.last_use[first] = end  # type: ignore[index]
        whole = index == 0 and end - at + 1 == count
        cut = "" if whole else f"[{index}:{index + end - at + 1}]"
        arguments = ", ".join(name if n is initial else self.text(n) for n in first.inputs)
        yield f"        for {each} in self.{members}{cut}:"
        yield from statement(12, f"{name} = {each}({arguments})", self._comment(result))

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


class _Members:
    """What a class keeps of its module: the calls inside it, and the modules whose weights it reads.

    Attributes:
        names: a call inside -> how it is written.
        listed: a call inside that is an item of a list -> (the list's path, the index).
        lists: a list's path -> (its name, its length).
    """

    def __init__(self, file: _File, region: Region) -> None:
        self.region = region
        self.prefix = len(region.path) + 1 if region.path else 0
        self.names: dict[int, str] = {}
        self.listed: dict[int, tuple[str, int]] = {}
        self.lists: dict[str, tuple[str, int]] = {}
        self._taken = {"m"}
        self._lines: list[str] = []
        self._owners: dict[str, str] = {}
        self._is_direct = False
        self._add_calls(file)
        for name in own_weights(region):
            self._add_weight(name)

    def lines(self) -> Iterator[str]:
        """The body of ``__init__``."""
        if self._is_direct:
            yield "        self.m = m"
        for line in self._lines:
            yield from statement(8, line)

    def weight(self, name: str) -> str:
        """How a tensor is read."""
        owner, _, last = name[self.prefix :].rpartition(".")
        return access(self._owners[owner] if owner else "self.m", last)

    def _add_weight(self, name: str) -> None:
        owner, _, _ = name[self.prefix :].rpartition(".")
        if not owner:
            self._is_direct = True
        elif owner not in self._owners:
            attribute = self._name(owner)
            self._owners[owner] = f"self.{attribute}"
            self._lines.append(f"self.{attribute} = {_from_m(owner)}")

    def _add_calls(self, file: _File) -> None:
        calls: dict[tuple[str, int], list[Region]] = {}
        for child in self.region.children():
            calls.setdefault((child.path[self.prefix :], file.class_of[id(child)].number), []).append(child)
        lists = _lists(list(calls))
        for (path, number), regions in calls.items():
            prefix, _, last = path.rpartition(".")
            if prefix in lists:
                if prefix not in self.lists:
                    self._add_list(prefix, lists[prefix], file)
                name = f"self.{self.lists[prefix][0]}[{last}]"
            else:
                attribute = self._name(path)
                name = f"self.{attribute}"
                self._lines.append(f"{name} = {_made(file.classes[number], _from_m(path))}")
            for region in regions:
                self.names[id(region)] = name
                if prefix in lists:
                    self.listed[id(region)] = (prefix, int(last))

    def _add_list(self, prefix: str, classes: Sequence[int], file: _File) -> None:
        attribute = self._name(prefix)
        self.lists[prefix] = (attribute, len(classes))
        owner = _from_m(prefix)
        runs: list[list[int]] = []
        for i, number in enumerate(classes):
            if runs and classes[runs[-1][0]] == number:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
        texts = []
        for start, stop in runs:
            kind = file.classes[classes[start]]
            if stop - start == 1:
                texts.append(_made(kind, f"{owner}[{start}]"))
            else:
                count = f"range({start}, {stop})" if start else f"range({stop})"
                each = f"{_made(kind, f'{owner}[i]')} for {'i' if kind.needs_weights else '_'} in {count}"
                texts.append(each if len(runs) == 1 else f"*({each})")
        self._lines.append(f"self.{attribute} = [{', '.join(texts)}]")

    def _name(self, path: str) -> str:
        """A short name for a module inside: the last part of its path, longer where that is taken."""
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            last = parts[-count:]
            if last[0].isdigit() and count < len(parts):
                continue
            name = identifier("_".join(last)) if not last[0].isdigit() else f"layer_{'_'.join(last)}"
            name += "_" if name in RESERVED else ""
            if name not in self._taken:
                break
        base, number = name, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name


def _made(kind: _Class, owner: str) -> str:
    return f"{kind.name}({owner if kind.needs_weights else ''})"


def own_weights(region: Region) -> Iterator[str]:
    """The names of the tensors that a call reads from its own module, for itself or for a call inside."""
    for item in region.items:
        for node in item.inputs if isinstance(item, Region) else item.all_input_nodes:
            if node.op == "get_attr" and node not in region.inputs and not is_empty(node):
                yield str(node.target)


def _lists(calls: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Module lists all of whose items are calls: path -> the class of each item."""
    found: dict[str, dict[int, list[int]]] = {}
    for path, number in calls:
        prefix, _, last = path.rpartition(".")
        if prefix and last.isdigit():
            found.setdefault(prefix, {}).setdefault(int(last), []).append(number)
    return {
        prefix: [items[i][0] for i in range(len(items))]
        for prefix, items in found.items()
        if len(items) > 1 and sorted(items) == list(range(len(items))) and all(len(c) == 1 for c in items.values())
    }


def _from_m(path: str) -> str:
    text = "m"
    for part in path.split("."):
        text = access(text, part)
    return text


def access(owner: str, name: str) -> str:
    """How ``name`` of ``owner`` is written.

    >>> access("m.layers", "3"), access("m", "norm"), access("m", "lambda")
    ('m.layers[3]', 'm.norm', 'getattr(m, "lambda")')
    """
    if name.isdigit():
        return f"{owner}[{name}]"
    return f"{owner}.{name}" if name.isidentifier() and not keyword.iskeyword(name) else f'getattr({owner}, "{name}")'
