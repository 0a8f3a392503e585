"""The Python source that a rank runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxshard.mesh import Mesh
from fxshard.passes.capture import source_of
from fxshard.passes.typing import has_info, info_of
from fxshard.placement import describe_all, local_shape
from fxshard.runtime import collectives

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "b8", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def describe_value(node: fx.Node, mesh: Mesh) -> str:
    """The local type of a node's result, e.g. ``f32[4, 16, 32]``."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    shape = tuple(value.shape)
    if has_info(node) and info_of(node).outputs:
        shape = local_shape(shape, info_of(node).placements, mesh.sizes)
    return f"{DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, shape))}]"


def emit(graph: fx.Graph, mesh: Mesh, title: str) -> str:
    """The source of a module with one function, ``forward(m, *inputs)``; ``m`` holds the local weights.

    Every line says what it gives: local type, placement, and the line of the user's source that it comes from.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    names = _Names(mesh.names)
    body: list[tuple[str, str]] = []
    last_use = _last_uses(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            names.of(node)
        elif node.op == "get_attr":
            names.attribute(node)
        elif node.op == "output":
            body.append((f"return {names.text(node.args[0])}", ""))
        elif node.op == "call_function":
            text = f"{names.call(node)}"
            freed = [names.of(n) for n in last_use.get(node, ()) if n.op == "call_function"]
            line = f"{names.of(node)} = {text}" + (f"; {' = '.join(freed)} = None" if freed else "")
            placed = describe_all(info_of(node).placements, mesh.names) if has_info(node) else ""
            comment = "  ".join(
                x for x in (describe_value(node, mesh), placed if placed != "Replicate" else "", source_of(node)) if x
            )
            body.append((line, comment))
    used = sorted({n.target.__name__ for n in graph.nodes if n.op == "call_function" and _is_ours(n.target)})
    lines = [f'"""{title}"""', "", "import operator", "", "import torch", ""]
    if used:
        lines += [f"from fxshard.runtime.collectives import {', '.join(used)}", ""]
    lines += ["aten = torch.ops.aten", "", ""]
    params = ", ".join(["m", *(names.of(n) for n in inputs)])
    lines.append(f"def forward({params}):")
    lines += [f"    {line}" + (f"  # {comment}" if comment else "") for line, comment in body]
    return "\n".join(lines) + "\n"


def _is_ours(target: Any) -> bool:
    return getattr(target, "__module__", "") == collectives.__name__


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                if node.op != "output":
                    out.setdefault(node, []).append(operand)
    return out


class _Names:
    """Nodes, attributes and arguments as Python text."""

    def __init__(self, axes: Sequence[str]) -> None:
        self.attributes: dict[fx.Node, str] = {}
        self.reserved = {"m", "aten", "torch", "operator", "device", *axes, *dir(collectives)}

    def attribute(self, node: fx.Node) -> None:
        text = "m"
        for part in str(node.target).split("."):
            text += f"[{part}]" if part.isdigit() else f".{part}"
        self.attributes[node] = text

    def of(self, node: fx.Node) -> str:
        if node in self.attributes:
            return self.attributes[node]
        return f"{node.name}_" if node.name in self.reserved else node.name

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.of(value)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return "(" + ", ".join(map(self.text, value)) + ("," if len(value) == 1 else "") + ")"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.text, value)) + "]"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, float):
            return repr(value) if value == value and abs(value) != float("inf") else f"float('{value}')"
        return repr(value)

    def call(self, node: fx.Node) -> str:
        args: Sequence[Any] = node.args
        if _is_ours(node.target):
            texts = [self.text(args[0]), *(a if i == 0 else self.text(a) for i, a in enumerate(args[1:]))]
            if node.target is collectives.local_index:
                texts = [self.text(args[0]), str(args[1]), self.text(args[2])]
            elif node.target is collectives.offset:
                texts = [str(args[0]), self.text(args[1])]
            elif node.target is collectives.dropout_mask:
                texts = list(map(self.text, args))
            return f"{node.target.__name__}({', '.join(texts)})"  # type: ignore[union-attr]
        texts = [self.text(a) for a in args] + [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        return f"{self.function(node.target)}({', '.join(texts)})"

    def function(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
            return name if target.namespace == "aten" else f"torch.ops.{name}"
        if isinstance(target, torch._ops.HigherOrderOperator):
            return f"torch.ops.higher_order.{target.name()}"
        module = getattr(target, "__module__", "")
        if module == "_operator":
            return f"operator.{target.__name__}"
        if module == "math":
            return f"__import__('math').{target.__name__}"
        return f"__import__({module!r}, fromlist=['x']).{target.__name__}"
