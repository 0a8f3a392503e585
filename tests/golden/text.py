"""Graphs as text that a review reads: one node a line, with its whole shape and, once it is known, its placements.

up_weight: f32[16, 8] [S(0)] = get_attr up.weight
linear: f32[4, 16] [S(1)] split over o = aten.linear(x_vary, up_weight)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import has_info, info_of
from fxshard.torch_internals import OpOverload


def text_of(graph: fx.Graph) -> str:
    """All nodes of a graph."""
    return "".join(f"{_line(node)}\n" for node in graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_words(node.args[0])}"
    value = node.meta.get("val")
    kind = _tensor(value) if isinstance(value, torch.Tensor) else type(value).__name__
    called = f"{node.op} {node.target}"
    if node.op == "call_function":
        given = [*map(_words, node.args), *(f"{key}={_words(x)}" for key, x in node.kwargs.items())]
        called = f"{_name(node.target)}({', '.join(given)})"
    return f"{node.name}: {kind}{_placed(node)} = {called}"


def _placed(node: fx.Node) -> str:
    if not has_info(node):
        return ""
    info = info_of(node)
    words = [_list(placed) for placed in info.outputs]
    if info.given is not None:
        words.append(f"asked {_list('?' if each is None else each for each in info.given)}")
    for choice in filter(None, info.choices):
        words.append(choice.kind + (f" over {choice.factor}" if choice.factor else ""))
        words += [f"by {choice.lowering}"] * bool(choice.lowering)
    return "".join(f" {word}" for word in words)


def _tensor(value: torch.Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    return f"{kind}{_list(value.shape)}"


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _words(value: Any) -> str:
    return _list(map(_words, value)) if isinstance(value, list | tuple) else str(value)


def _list(values: Iterable[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"
