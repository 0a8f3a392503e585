"""What a model's Python asks of values while it is traced, and what it is told.

Every ``bool(tensor)`` of the model's code gets an answer. Where it is certain (a draw from [0, 1) is never below 0),
that is all. Any other answer is one of two, and leaves a mark in the graph: see ``branches.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxshard.errors import CaptureError
from fxshard.rules.lookup import draws
from fxshard.torch_internals import FakeTensor, node_of, replaced

__all__ = ["Decisions", "is_mark"]

aten = torch.ops.aten
_MARK = "fxshard decision "
MOST = 512
"""More decisions than that are those of a loop, which does not end."""


class Decisions:
    """Answers what a model asks of values while it is traced.

    Args:
        answers: the number of a decision -> its answer; by default False.

    Attributes:
        count: how many decisions there were.
        drawn: whether the last one was on random numbers.
    """

    def __init__(self, answers: Mapping[int, bool] | None = None) -> None:
        self.answers = dict(answers or {})
        self.count = 0
        self.drawn = False
        self._known: dict[fx.Node, bool] = {}

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Lets ``bool(tensor)`` be answered, and ``.item()`` of one, in this thread, where a graph is made."""
        here, own, own_item = threading.get_ident(), torch.Tensor.__bool__, torch.Tensor.item

        def asked(tensor: torch.Tensor) -> fx.Node | None:
            ours = threading.get_ident() == here and isinstance(tensor, FakeTensor)
            node = node_of(tensor) if ours else None
            return node if node is not None and tensor.numel() == 1 else None

        def answer(tensor: torch.Tensor) -> bool:
            node = asked(tensor)
            return own(tensor) if node is None else self.decide(tensor, node)

        def item(tensor: torch.Tensor) -> Any:
            node = asked(tensor)
            if node is None:
                return own_item(tensor)
            if tensor.dtype == torch.bool:
                return self.decide(tensor, node)
            return own_item(tensor) if _span(node) is None else tensor.reshape(())  # to be compared, as a number is

        with replaced(torch.Tensor, __bool__=answer, item=item):
            yield

    def decide(self, tensor: torch.Tensor, node: fx.Node) -> bool:
        """The answer, the same whenever it is asked of one value."""
        if node not in self._known:
            certain = outcome(node)
            if certain is None:
                if self.count == MOST:
                    raise CaptureError(
                        f"the model has asked values inside tensors {MOST} times what to do next",
                        fix="a loop that ends by a value is no graph: give it a fixed number of steps",
                    )
                aten._assert_async.msg(tensor, f"{_MARK}{self.count}")
                certain, self.drawn = self.answers.get(self.count, False), _is_drawn(node)
                self.count += 1
            self._known[node] = certain
        return self._known[node]


def outcome(node: fx.Node) -> bool | None:
    """What a condition on random draws always is; None where it is open.

    >>> graph = fx.Graph()
    >>> draw = graph.call_function(aten.rand.default, ([],))
    >>> [outcome(graph.call_function(aten.lt.Scalar, (draw, p))) for p in (0.0, 0.5, 1.0)]
    [False, None, True]
    """
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    if name in ("logical_not", "bitwise_not") and isinstance(node.args[0], fx.Node):
        inner = outcome(node.args[0])
        return None if inner is None else not inner
    if name not in ("lt", "le", "gt", "ge") or not isinstance(node.args[1], int | float):
        return None
    span, bound = _span(node.args[0]), node.args[1]
    if span is None:
        return None
    least, end = span  # the end is never reached
    if name in ("lt", "ge"):
        below = True if end <= bound else False if least >= bound else None
    else:
        below = True if end <= bound else False if least > bound else None
    return below if below is None or name in ("lt", "le") else not below


def _span(node: Any) -> tuple[float, float] | None:
    """[start, end) of what a draw can be."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.rand.default:
        return 0.0, 1.0
    if node.target in (aten.uniform_.default, aten.uniform.default):
        bounds: list[Any] = [*node.args[1:3], *(0.0, 1.0)[len(node.args) - 1 :]]
        known = all(isinstance(each, int | float) for each in bounds) and bounds[0] < bounds[1]
        return (bounds[0], bounds[1]) if known else None
    views = (aten.view.default, aten.reshape.default, aten.squeeze.default, aten.select.int, aten.detach.default)
    return _span(node.args[0]) if node.target in views else None


def _is_drawn(node: fx.Node) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if each.op == "call_function" and draws(each):
            return True
        waiting += [n for n in each.all_input_nodes if n not in seen]
        seen.update(each.all_input_nodes)
    return False


def is_mark(node: fx.Node) -> bool:
    """Whether a node is the mark of a decision: it reads what decides."""
    return node.target is aten._assert_async.msg and str(node.args[1]).startswith(_MARK)
