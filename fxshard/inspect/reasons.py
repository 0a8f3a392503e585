"""Why a collective is there, in a sentence, read off the graph: what split the value, and what reads it."""

from __future__ import annotations

import re

import torch
from torch import fx

from fxshard.ir.conversions import CONVERSIONS, SUMMED
from fxshard.ir.info import Choice, has_info, info_of
from fxshard.ir.origins import module_of
from fxshard.placement import REPLICATE, Placement, is_partial, is_shard
from fxshard.runtime import collectives as run
from fxshard.torch_internals import OpOverload

MODULES_NAMED = 3
"""How many readers a sentence names."""


def op_name(node: fx.Node) -> str:
    """The operator, as users write it: ``aten.linear``, ``all_reduce``."""
    if isinstance(node.target, OpOverload):
        return str(node.target._schema.name.replace("::", "."))
    return str(getattr(node.target, "__name__", node.target))


def reason(node: fx.Node, phase: str, axis: int, axis_name: str) -> str:
    """Why the conversion ``node`` communicates in ``phase``."""
    source = source_of_value(node)
    before, after = _placed(source, axis), _placed(node, axis)
    readers = _readers(node, source)
    if phase == "forward":
        have = f"every rank holds {_what(before)}, since {_cause(source, axis, axis_name)}"
        return f"{have}; {_need(after)} by {readers}"
    if node.target in SUMMED:
        return f"every rank computes only its share of this gradient, since {_split_of(node, axis, axis_name, readers)}"
    if node.target is run.all_to_all:
        return f"every rank holds {_what(after)} of this gradient; {_need(before)} by {_named(source)}"
    have = "every rank holds the gradient of its part only"
    if is_partial(before):
        return f"{have}; every summand of {_named(source)} needs all of it"
    return f"{have}; {_named(source)} is whole on every rank of {axis_name}"


def source_of_value(node: fx.Node) -> fx.Node:
    """The value that a conversion converts."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _placed(node: fx.Node, axis: int) -> Placement:
    return info_of(node).placements[axis] if has_info(node) and info_of(node).outputs else REPLICATE


def _what(placement: Placement) -> str:
    if is_partial(placement):
        return "a partial sum"
    return f"a part along dim {placement.dim}" if is_shard(placement) else "a part"


def _need(placement: Placement) -> str:
    return f"needed in parts along dim {placement.dim}" if is_shard(placement) else "needed whole"


def _named(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    return (
        f"input {node.target}" if node.op == "placeholder" else f"the {op_name(node).removeprefix('aten.')} before it"
    )


def home_of(node: fx.Node) -> str:
    """The module that a value belongs to: a weight to the one that holds it."""
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else module_of(node)


# --- readers ---------------------------------------------------------------------------------------------------------


def readers_of(node: fx.Node) -> list[fx.Node]:
    """What reads a conversion's result in the end."""
    out: dict[fx.Node, None] = {}
    for user in node.users:
        out |= dict.fromkeys(readers_of(user) if user.target in CONVERSIONS else [user])
    return list(out)


def _readers(node: fx.Node, source: fx.Node) -> str:
    """The readers in a sentence: ``linear in self_attn.q_proj, self_attn.k_proj; the add after it``."""
    found: dict[str, dict[str, None]] = {}
    for reader in readers_of(node)[:MODULES_NAMED]:
        operator, place = _reader(reader, home_of(source))
        found.setdefault(operator, {})[place] = None
    parts = []
    for operator, places in found.items():
        named = ", ".join(place for place in places if place)
        parts += [f"the {operator} after it"] if "" in places else []
        parts += [f"{operator} {named}" if operator == "the output" else f"{operator} in {named}"] if named else []
    more = len(readers_of(node)) - MODULES_NAMED
    return " and ".join(parts) + (f" and {more} more" if more > 0 else "") or "nothing"


def _reader(reader: fx.Node, module: str) -> tuple[str, str]:
    if reader.op == "output":
        return "the output", "of the model"
    there = module_of(reader)
    return op_name(reader).removeprefix("aten."), there[len(_common_parent(module, there)) :].lstrip(".")


def _common_parent(a: str, b: str) -> str:
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)


def _split_of(node: fx.Node, axis: int, axis_name: str, readers: str) -> str:
    """What the readers of a value that has no split dim of its own are split over."""
    for reader in readers_of(node):
        choice = _choice(reader, axis)
        if choice is not None and choice.kind == "split" and choice.factor:
            root = _root(reader, axis)
            follows = f", as {_origin(root)} is" if root is not reader else ""
            return f"its readers ({readers}) are split over `{choice.factor}` on axis {axis_name}{follows}"
    return f"its readers ({readers}) are split on axis {axis_name}"


# --- causes ----------------------------------------------------------------------------------------------------------


def _choice(node: fx.Node, axis: int) -> Choice | None:
    choices = info_of(node).choices if has_info(node) else ()
    return choices[axis] if axis < len(choices) else None


def _cause(node: fx.Node, axis: int, axis_name: str) -> str:
    """What first split a value, or made it a partial sum."""
    for _ in range(1000):
        choice = _choice(node, axis)
        before = _leader(node, axis, choice)
        if before is None:
            break
        summed = is_partial(_placed(node, axis)) and not is_partial(_placed(before, axis))
        if before.op == "get_attr" or summed:
            return _sentence(node, before, axis, axis_name, choice)
        node = before
    if node.op == "placeholder":
        return f"input {node.target} is split on axis {axis_name}"
    if node.target in CONVERSIONS:
        return f"it follows the {op_name(node)} of {home_of(node) or 'the model'}"
    return f"{_named(node)} is split on axis {axis_name}"


def _sentence(node: fx.Node, leader: fx.Node, axis: int, axis_name: str, choice: Choice | None) -> str:
    over = f"over `{choice.factor}`" if choice is not None and choice.factor else ""
    if not over or node.meta.get("split_bias"):
        placed = _placed(leader, axis)
        over = f"along dim {placed.dim}" if is_shard(placed) else ""
    if leader.op == "get_attr":
        owner, _, name = str(leader.target).rpartition(".")
        what = f"its {name}" if owner == module_of(node) else str(leader.target)
        return f"{what} is split {over} on axis {axis_name}".replace("  ", " ")
    root = _origin(_root(leader, axis))
    return f"{op_name(node).removeprefix('aten.')} is split {over} on axis {axis_name}, as {root} is".replace("  ", " ")


def _leader(node: fx.Node, axis: int, choice: Choice | None) -> fx.Node | None:
    """The operand that a node's placement follows: a partial one, a split weight, else the first split one."""
    if node.op != "call_function":
        return None
    operands = node.all_input_nodes
    if choice is not None and choice.lowering:
        inner = [o for o in operands if _choice(o, axis) is choice]
        if inner:
            return inner[0]
    if is_partial(_placed(node, axis)):
        partial = [o for o in operands if is_partial(_placed(o, axis))]
        if partial:
            return partial[0]
    split = [stored(o) for o in operands if is_shard(_placed(o, axis))]
    weights = [o for o in split if o.op == "get_attr"]
    return max(weights, key=_dims) if weights else next(iter(split), None)


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def stored(node: fx.Node) -> fx.Node:
    """The weight or input that a node converts; the node itself where it is something else."""
    base = node
    while base.target in CONVERSIONS:
        base = source_of_value(base)
    return base if base.op in ("get_attr", "placeholder") else node


def _root(node: fx.Node, axis: int) -> fx.Node:
    """The weight or input whose split a node follows, or else the node that began it."""
    for _ in range(1000):
        leader = _leader(node, axis, _choice(node, axis))
        if leader is None:
            break
        node = leader
    return node


def _origin(node: fx.Node) -> str:
    if node.op == "call_function":
        return f"the {op_name(node).removeprefix('aten.')} of {module_of(node) or 'the model'}"
    return _named(node)


def without_layers(text: str) -> tuple[str, tuple[int, ...]]:
    """A sentence or a path without the numbers of layers in it, and these.

    >>> without_layers("layers.3.mlp")
    ('layers.{}.mlp', (3,))
    """
    numbers = tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|\b)|(?<![\w.`])\d+(?=\.[a-z])", text))
    return re.sub(r"(?<=\.)\d+(?=\.|\b)|(?<![\w.`])\d+(?=\.[a-z])", "{}", text), numbers
