"""``as_strided``: it shows memory, of whatever its operand is a view of.

The operand becomes that value, which alone has all the memory; the gradient stays what PyTorch gives, which goes to
what the operand shows, and to nothing beside it:

    half = x[:2]                                  as_strided = as_strided(x, [2, 2], [4, 1], 0)
    as_strided = as_strided(half, [2, 2], [4, 1]) ->
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxshard.errors import CaptureError
from fxshard.ir.origins import where
from fxshard.lowerings.memory_order import note
from fxshard.normal.functionalize import infer_value
from fxshard.rules.effects import is_mutating, shares_memory, shown_operand
from fxshard.rules.recipe import bind
from fxshard.runtime.draws import extent

_aten = torch.ops.aten
_DETACH = (_aten.detach.default, _aten.detach_.default)


def over_memory(
    graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], fx.Node], is_quiet: Callable[[fx.Node], bool]
) -> fx.Node:
    """The ``as_strided`` of a captured graph, of the value that has all the memory.

    Args:
        graph: gets the new nodes.
        node: the call.
        operand: what stands in the graph for a value of the captured one.
        is_quiet: whether a captured value was computed without gradient.

    Raises:
        CaptureError: the memory is read as another dtype; or what is shown is written to, and lies beside the operand.
    """
    operand_value, given = node.args[0].meta["val"], bind(node)  # type: ignore[union-attr]
    size, stride = given["size"], given["stride"]
    start = operand_value.storage_offset() if given["storage_offset"] is None else given["storage_offset"]
    base, steps = _memory_of(node)
    hides = any(step.target in _DETACH or is_quiet(step) for step in steps)
    if base.meta["val"].dtype != operand_value.dtype:
        raise _error(node, f"shows memory of {base.meta['val'].dtype} as {operand_value.dtype}")

    def emit(target: Any, *args: Any, val: torch.Tensor | None = None, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {**node.meta, "val": None}
        new.meta["val"] = infer_value(new) if val is None else val
        note(new)
        return new

    def shown(value: fx.Node) -> fx.Node:
        new = graph.node_copy(node, operand)
        new.args, new.kwargs = (value, size, stride, start), {}
        note(new)
        return new

    source = operand(base)
    numbers = [*size, *stride, start, *operand_value.shape, *operand_value.stride(), operand_value.storage_offset()]
    differentiable = operand_value.is_floating_point() or operand_value.is_complex()
    if hides or not differentiable or not all(isinstance(each, int) for each in numbers):
        return shown(emit(_aten.detach.default, source) if hides and differentiable else source)
    reached, own = (size, stride, start), (operand_value.shape, operand_value.stride(), operand_value.storage_offset())
    inside = torch.isin(_positions(*reached), _positions(*own))
    if bool(inside.all()):
        return shown(source)
    if not bool(inside.any()):
        return shown(emit(_aten.detach.default, source))
    if _is_written_to(node):
        raise _error(node, "shows memory beside its operand, and is written to")
    end = max(start + extent(shape, strides) for shape, strides, start in (reached, own))
    numbered = operand_value.new_empty((end,), dtype=torch.int64)
    positions = emit(_aten.arange.default, end, device=operand_value.device, val=numbered)
    mine, theirs = (emit(_aten.as_strided.default, positions, *map(_plain, lies)) for lies in (reached, own))
    mask = emit(_aten.isin.Tensor_Tensor, mine, theirs)
    return emit(_aten.where.self, mask, shown(source), shown(emit(_aten.detach.default, source)))


def _memory_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What the operand of ``as_strided`` is a view of, and the steps between them."""
    source: Any = node.args[0]
    steps: list[fx.Node] = []
    while isinstance(below := shown_operand(source), fx.Node) and shares_memory(below, node.args[0]):  # type: ignore[arg-type]
        steps.append(source)
        source = below
    return source, steps


def _is_written_to(node: fx.Node) -> bool:
    """Whether an operator changes, in place, a value or a view of it."""
    return any(is_mutating(user.target) or _is_written_to(user) for user in node.users if shown_operand(user) is node)


def _positions(size: Any, stride: Any, start: int) -> torch.Tensor:
    """Where in memory the elements of a tensor lie."""
    return torch.arange(start + extent(size, stride)).as_strided(tuple(size), tuple(stride), start)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)


def _error(node: fx.Node, what: str) -> CaptureError:
    return CaptureError(
        f"{node.target} {what}",
        **where(node),
        fix="take as_strided of the tensor that has all of it, or write that line with slices",
    )
