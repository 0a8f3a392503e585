"""Which nodes make up which module call: the tree of calls that the generated classes follow.

A *region* is a run of consecutive nodes that one call of one module of the user's tree computes. Cutting the graph into
regions never moves a node: what the regions hold, read in order, is the graph.

    embedding   model.embed_tokens              LlamaForCausalLM
    pow         model.layers.0.norm               embedding
    linear      model.layers.0.mlp.up    ->       Region model.layers.0
    linear_sum  model.layers.0.mlp.up               pow, linear, linear_sum
    linear      lm_head                           linear

A checkpointed call (``passes/mark_recomputed.py``) is a region too: that of its module where it computes nothing but
this module's call, else one of its own, which belongs to the module that makes the call.

Conversions have no module of their own. One that leads from a module to its sibling stands in their parent, where a
reader looks for communication; in any case it never cuts in two the call that surrounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from fxshard.ir.origins import checkpoint_of, clean_path, way_of
from fxshard.passes.fold import PREFIX
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.module import is_word

Path: TypeAlias = tuple[str, ...]
Item: TypeAlias = "fx.Node | Region"

_LEAVES = ("placeholder", "get_attr")
SMALLEST = 4
"""A call of fewer nodes is written where it stands, unless it is computed anew in the backward pass."""


@dataclass(eq=False)
class Region:
    """One call of one module.

    Attributes:
        path: the module's path in the user's model; ``""`` is the model.
        class_name: the module's class, as the user named it.
        parent: the call that makes this one; None for the model's.
        checkpoint: whether it is computed anew in the backward pass.
        way: the branch that it is on, and its way; None where it always is computed.
        decision: what decides whether that way is taken.
        function: the function's name, where this is not the call of a whole module.
        items: nodes and inner calls, in order.
        size: how many nodes there are, inner calls included.
        inputs: values from outside that are read inside, in the order of reading.
        outputs: values from inside that are read outside, in the order of making; of the model's call, the weights
            that it returns as they are.
    """

    path: str
    class_name: str
    parent: Region | None
    checkpoint: bool = False
    way: tuple[int, bool] | None = None
    decision: fx.Node | None = None
    function: str = ""
    items: list[Item] = field(default_factory=list)
    size: int = 0
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    outputs: dict[fx.Node, None] = field(default_factory=dict)

    def children(self) -> list[Region]:
        """The inner calls, in order."""
        return [item for item in self.items if isinstance(item, Region)]


def regions_of(graph: fx.Graph) -> Region:
    """The model's call, with the calls inside it."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    stacks = _Stacks()
    root = Region("", "", None)
    opened: list[Region] = [root]
    names: Path = ()
    seen: set[Path] = set()
    for node, path in zip(nodes, _paths(nodes, stacks), strict=True):
        common = _common(names, path)
        while len(names) > common:
            opened.pop()
            names = names[:-1]
        for key in path[common:]:
            inner = (*names, key)
            if inner in seen:  # that call was left already: nodes that come late stand in its parent
                break
            seen.add(inner)
            names = inner
            module, class_name = stacks.modules[key]
            function = checkpoint_of(key)
            way = way_of(key)
            function = f"way_{way[0]}" if way else function
            opened.append(Region(module, class_name, opened[-1], checkpoint_of(key) is not None, way))
            opened[-1].function = function or ""
            opened[-2].items.append(opened[-1])
        opened[-1].items.append(node)
    root.class_name = stacks.root or "Model"
    root.items = _settle(root)
    decisions = {node.args[3]: node.args[0] for node in nodes if node.target is TAKEN}
    for region in walk(root):
        if region.way is not None:
            region.decision = decisions[region.way[0]]
    _connect(graph, root)
    returned = next(iter(reversed(graph.nodes))).all_input_nodes
    root.outputs = dict.fromkeys(n for n in returned if n.op == "get_attr")
    return root


class _Stacks:
    """Reads ``nn_module_stack``: a path of calls, outermost first, without the model's own."""

    def __init__(self) -> None:
        self.modules: dict[str, tuple[str, str]] = {}
        self.root = ""
        self._paths: dict[Path, Path] = {}

    def path(self, meta: dict[str, Any]) -> Path | None:
        stack = meta.get("nn_module_stack")
        if not stack:
            return None
        keys = tuple(stack)
        found = self._paths.get(keys)
        if found is None:
            found = self._paths[keys] = tuple(key for key in keys if self._note(key, *stack[key][:2]))
        return found

    def _note(self, key: str, path: str, kind: Any) -> bool:
        module = clean_path(path)
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        name = name.rsplit(".", 1)[-1]
        name = name if is_word(name) and not name.startswith("__") else "Module"  # which classes read as another name
        self.modules[key] = (module, name)
        if checkpoint_of(key) is None and way_of(key) is None and not module:
            self.root = name
            return False
        return True


def _common(a: Path, b: Path) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _paths(nodes: Sequence[fx.Node], stacks: _Stacks) -> list[Path]:
    """For each node, the calls that it stands in."""
    own = [None if "fxshard_reader" in node.meta else stacks.path(node.meta) for node in nodes]
    following: list[Path] = [()] * len(nodes)
    after: Path = ()
    for i in reversed(range(len(nodes))):
        following[i] = after
        path = own[i]
        after = after if path is None else path
    out: list[Path] = []
    before: Path = ()
    for node, path, after in zip(nodes, own, following, strict=True):
        if path is None:
            wanted = _wanted(node, stacks)
            reach = max(_common(wanted, before), _common(wanted, after))
            around = _common(before, after)
            path = wanted[:reach] if _common(wanted, before[:around]) == around else before[:around]
        out.append(path)
        before = path
    return out


def _wanted(node: fx.Node, stacks: _Stacks) -> Path:
    """Where a node that the compiler made would best stand: in the innermost call that holds all it connects."""
    ends: list[Path] = []
    if "fxshard_reader" in node.meta:
        source = stacks.path(node.meta)
        reader = stacks.path(node.meta["fxshard_reader"]) or ()
        ends = [reader] if source is None else [source, reader]
    else:
        ends = [stacks.path(user.meta) or () for user in node.users]
    if not ends:
        return ()
    shortest = min(_common(ends[0], end) for end in ends)
    return ends[0][:shortest]


def _settle(region: Region) -> list[Item]:
    """The items of a region once calls that are too small, or that only wrap another one, are written in place."""
    items: list[Item] = []
    region.size = 0
    for item in region.items:
        if isinstance(item, fx.Node):
            items.append(item)
            region.size += 1
            continue
        item.items = _settle(item)
        region.size += item.size
        wraps = _merge(item)
        is_small = item.size < SMALLEST and not item.checkpoint and item.way is None
        items += _inside(item.items if is_small or wraps else [item], region.path)
    for item in items:
        if isinstance(item, Region):
            item.parent = region
    return items


def _merge(outer: Region) -> bool:
    """Whether a call only wraps another one, which then stands for both."""
    if len(outer.items) != 1 or not isinstance(outer.items[0], Region):
        return False
    inner = outer.items[0]
    if outer.way is not None and inner.way is not None:
        return False
    inner.checkpoint |= outer.checkpoint
    inner.way, inner.decision = inner.way or outer.way, inner.decision or outer.decision
    if inner.function and inner.path == outer.path:  # the function is all that the module does
        inner.class_name, inner.function = outer.class_name, outer.function
    return True


def _inside(items: Sequence[Item], owner: str) -> Iterator[Item]:
    """The items, with calls of modules that do not belong to ``owner``, which cannot reach them, written in place.

    A checkpointed one stays a call, as that of a function of ``owner``'s.
    """
    for item in items:
        if not isinstance(item, Region) or _is_inside(item.path, owner) or (item.function and item.path == owner):
            yield item
        elif item.checkpoint or item.way is not None:
            item.path, item.function = owner, item.function or item.path.rpartition(".")[2]
            item.items = list(_inside(item.items, owner))
            yield item
        else:
            yield from _inside(item.items, owner)


def _is_inside(path: str, owner: str) -> bool:
    """Whether a module belongs to another one; a module can be called by one that it does not belong to."""
    return not owner or path.startswith(f"{owner}.")


def _connect(graph: fx.Graph, root: Region) -> None:
    """Finds what every region reads from outside, and gives to outside."""
    home: dict[fx.Node, Region] = {}

    def place(region: Region) -> None:
        for item in region.items:
            if isinstance(item, Region):
                place(item)
            else:
                home[item] = region

    place(root)
    chains: dict[int, list[Region]] = {}

    def chain(region: Region) -> list[Region]:
        found = chains.get(id(region))
        if found is None:
            found = chains[id(region)] = [*(chain(region.parent) if region.parent else ()), region]
        return found

    reads = [(chain(home.get(n, root)), n.all_input_nodes) for n in graph.nodes if n.op not in _LEAVES]
    reads += [(chain(r.parent), [r.decision]) for r in walk(root) if r.decision is not None and r.parent is not None]
    for reading, operands in reads:
        for operand in operands:
            made = home.get(operand)
            if made is reading[-1]:
                continue
            if operand.op == "get_attr":
                if is_empty(operand):
                    continue
                made = owner_of(str(operand.target), reading)
            making = chain(made or root)
            shared = 0
            for a, b in zip(reading, making, strict=False):
                if a is not b:
                    break
                shared += 1
            for region in reading[shared:]:
                region.inputs[operand] = None
            for region in making[shared:]:
                region.outputs[operand] = None
    position = {node: i for i, node in enumerate(home)}
    for region in walk(root):
        region.outputs = dict.fromkeys(sorted(region.outputs, key=position.__getitem__))


def walk(region: Region) -> Iterator[Region]:
    """All regions, inner ones first."""
    for child in region.children():
        yield from walk(child)
    yield region


def owner_of(name: str, reading: Sequence[Region]) -> Region:
    """The innermost of the calls ``reading`` (outermost first) whose module holds the tensor ``name``."""
    if not is_constant(name):
        for region in reversed(reading):
            if not region.path or name.startswith(f"{region.path}."):
                return region
    return reading[0]


def is_constant(name: str) -> bool:
    """Whether export or ``fold`` made up the name, for the whole model: it says nothing about the layer."""
    last = name.rpartition(".")[2]
    return last.startswith((PREFIX, "lifted_tensor_", "_tensor_constant", "_lifted_tensor_constant"))


def is_empty(node: fx.Node) -> bool:
    """Whether ``node`` is an empty tensor that export lifted out of the code; it is written where it is used."""
    if node.op != "get_attr" or not is_constant(str(node.target)):
        return False
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and 0 in value.shape
