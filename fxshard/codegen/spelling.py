"""Calls as Python text: ``aten.add.Tensor(x, y)`` as ``x + y``.

Where torch has a shorter way to call the very same operator, that is what is written: it reads better, and it is
faster to call than the operator's entry in ``torch.ops``. What is not listed, or comes with arguments that the short
form does not cover, is written in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxshard.codegen.text import attribute, quoted
from fxshard.ir.conversions import BEGIN, CONVERSIONS
from fxshard.plan.graph import is_parameter
from fxshard.rules.recipe import is_tensor
from fxshard.runtime import async_collectives, collective_matmul, collectives, ring, row_groups
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.hidden_writes import HIDDEN
from fxshard.torch_internals import HigherOrderOperator, OpOverload

aten = torch.ops.aten
_END = 2**63 - 1

INFIX = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/",
    aten.add.Scalar: "+", aten.sub.Scalar: "-", aten.mul.Scalar: "*", aten.div.Scalar: "/",
    aten.matmul.default: "@",
    aten.eq.Tensor: "==", aten.eq.Scalar: "==", aten.ne.Tensor: "!=", aten.ne.Scalar: "!=",
    aten.lt.Tensor: "<", aten.lt.Scalar: "<", aten.le.Tensor: "<=", aten.le.Scalar: "<=",
    aten.gt.Tensor: ">", aten.gt.Scalar: ">", aten.ge.Tensor: ">=", aten.ge.Scalar: ">=",
    aten.bitwise_and.Tensor: "&", aten.bitwise_or.Tensor: "|", aten.__and__.Tensor: "&", aten.__or__.Tensor: "|",
}  # fmt: skip

NUMBERS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "mod": "%",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
"""Functions of ``operator``, on sizes."""

METHODS = {
    aten.rsqrt.default: "rsqrt", aten.sqrt.default: "sqrt", aten.cos.default: "cos", aten.sin.default: "sin",
    aten.exp.default: "exp", aten.log.default: "log", aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu", aten.abs.default: "abs", aten.reciprocal.default: "reciprocal", aten.t.default: "t",
    aten.contiguous.default: "contiguous", aten.detach.default: "detach", aten.clone.default: "clone",
    aten.transpose.int: "transpose", aten.unsqueeze.default: "unsqueeze", aten.squeeze.dim: "squeeze",
    aten.to.dtype: "to", aten.masked_fill.Scalar: "masked_fill", aten.masked_fill.Tensor: "masked_fill",
    aten.flatten.using_ints: "flatten", aten.pow.Tensor_Scalar: "pow", aten.softmax.int: "softmax",
    aten.logical_not.default: "logical_not", aten.logical_or.default: "logical_or", aten.erf.default: "erf",
    aten.logical_and.default: "logical_and", aten.cumsum.default: "cumsum", aten.square.default: "square",
}  # fmt: skip
"""Methods of the first operand; the largest number of positional arguments is in ``LIMITS``."""

SHAPED = {aten.view.default: "view", aten.reshape.default: "reshape", aten.expand.default: "expand"}
SHAPED[aten.permute.default] = "permute"
"""Methods whose second argument is a list of numbers, which may be given one by one."""

FUNCTIONS = {
    aten.linear.default: "F.linear", aten.embedding.default: "torch.embedding",
    aten.layer_norm.default: "torch.layer_norm",
    aten.silu.default: "F.silu", aten.gelu.default: "F.gelu", aten.cat.default: "torch.cat",
    aten.stack.default: "torch.stack", aten.addmm.default: "torch.addmm", aten.mm.default: "torch.mm",
    aten.bmm.default: "torch.bmm", aten.where.self: "torch.where", aten.dropout.default: "torch.dropout",
    aten.scaled_dot_product_attention.default: "F.scaled_dot_product_attention", aten.tril.default: "torch.tril",
    aten.arange.default: "torch.arange", aten.arange.start: "torch.arange", aten.conv2d.default: "F.conv2d",
    aten.zeros.default: "torch.zeros", aten.ones.default: "torch.ones", aten.full.default: "torch.full",
    aten.minimum.default: "torch.minimum", aten.maximum.default: "torch.maximum", aten.triu.default: "torch.triu",
}  # fmt: skip

LIMITS = {aten.to.dtype: 2, aten.softmax.int: 2, aten.contiguous.default: 1}
"""The positional arguments that the short form takes, where the operator takes more."""

REDUCTIONS = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "amax", aten.amin.default: "amin"}

OURS = {module.__name__: module for module in (async_collectives, collective_matmul, collectives, ring, row_groups)}
"""The modules whose functions generated code imports by name."""

NAMED = {*CONVERSIONS, *BEGIN.values()} - {collectives.all_to_all, async_collectives.begin_all_to_all}
"""Calls whose arguments behind the value and the axis are named."""

_USELESS = {"pin_memory": False, "layout": None, "dtype": None, "device": None, "memory_format": None}

Text = Callable[[Any], str]


def is_ours(target: Any) -> bool:
    """Whether a call is one of fxshard's runtime: an axis is written by its name."""
    return getattr(target, "__module__", "") in OURS


def spell(node: fx.Node, text: Text, imports: set[str], axes: Mapping[str, str]) -> str:
    """The call of ``node`` as an expression.

    Args:
        node: a ``call_function`` node.
        text: writes an argument.
        imports: modules that the expression needs; added to.
        axes: how the mesh axes are written.
    """
    target = node.target
    args: Sequence[Any] = node.args
    kwargs = {k: v for k, v in node.kwargs.items() if k not in _USELESS or v != _USELESS[k]}
    if target is aten.copy_.default and (is_parameter(args[0]) or _is_hidden_input(node)):
        return _called("overwrite", args, kwargs, text)
    if target is TAKEN:
        decision, yes, no, _ = map(text, args)
        return f"{yes} if {decision} else {no}"
    if isinstance(target, OpOverload):
        return _short(target, args, kwargs, text) or _long(target, args, kwargs, text)
    if is_ours(target):
        return _ours(target, args, kwargs, lambda a: axes[a] if isinstance(a, str) and a in axes else text(a))
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__name__", "")
    if module == "_operator":
        if name == "getitem" and not isinstance(args[1], slice):
            return f"{text(args[0])}[{text(args[1])}]"
        if name in NUMBERS and len(args) == 2:
            return _infix(args, NUMBERS[name], text)
        module = "operator"
    if isinstance(target, HigherOrderOperator):
        return _called(f"torch.ops.higher_order.{target.name()}", args, kwargs, text)
    imports.add(module)
    return _called(f"{module}.{name}", args, kwargs, text)


def _is_hidden_input(node: fx.Node) -> bool:
    """Whether an input is written that may be a leaf, to which autograd lets nobody write."""
    return node.args[0].op == "placeholder" and bool(node.meta.get(HIDDEN))  # type: ignore[union-attr]


def _called(function: str, args: Sequence[Any], kwargs: Mapping[str, Any], text: Text) -> str:
    return f"{function}({', '.join([*map(text, args), *(f'{k}={text(v)}' for k, v in kwargs.items())])})"


def _ours(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], text: Text) -> str:
    texts = list(map(text, args))
    if target in NAMED:
        names = target.__code__.co_varnames[: target.__code__.co_argcount]
        texts[2 : len(names)] = [f"{name}={texts[i]}" for i, name in enumerate(names) if 2 <= i < len(args)]
    texts += [f"{name}={text(value)}" for name, value in kwargs.items()]
    return f"{target.__name__}({', '.join(texts)})"


def _long(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], text: Text) -> str:
    name = "aten" if target.namespace == "aten" else attribute("torch.ops", target.namespace)
    for part in (target._schema.name.split("::")[1], target._overloadname):
        name = attribute(name, part)
    return _called(name, args, kwargs, text)


def _infix(args: Sequence[Any], sign: str, text: Text) -> str:
    return f"{text(args[0])} {sign} {text(args[1])}"


def _short(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], text: Text) -> str:
    """The short form; ``""`` where there is none for these arguments."""
    if target in FUNCTIONS:
        return "" if len(args) > LIMITS.get(target, 99) else _called(FUNCTIONS[target], args, kwargs, text)
    if not args or not is_tensor(args[0]):
        return ""
    first = text(args[0])
    if target in METHODS and len(args) <= LIMITS.get(target, 99):
        return _called(f"{first}.{METHODS[target]}", args[1:], kwargs, text)
    if target in REDUCTIONS and len(args) in (2, 3) and isinstance(args[1], (list, tuple)) and args[1] and not kwargs:
        dims = text(args[1][0] if len(args[1]) == 1 else tuple(args[1]))
        keep = ", keepdim=True" if len(args) == 3 and args[2] else ""
        return f"{first}.{REDUCTIONS[target]}({dims}{keep})"
    if kwargs:
        return ""
    if target in INFIX and len(args) == 2:
        return _infix(args, INFIX[target], text)
    if target in SHAPED and len(args) == 2 and args[1]:
        return f"{first}.{SHAPED[target]}({', '.join(map(text, args[1]))})"
    if target is aten.neg.default:
        return f"-{first}"
    if target is aten.rsub.Scalar and len(args) == 2:
        return f"{text(args[1])} - {first}"
    if target is aten.slice.Tensor:
        return _sliced(first, args, text)
    if target is aten.select.int:
        return _indexed(first, args, text(args[2]))
    return ""


def _sliced(first: str, args: Sequence[Any], text: Text) -> str:
    given = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, end, step = given[:4]
    start = "" if start in (None, 0) else text(start)
    stop = "" if end is None or (isinstance(end, int) and end >= _END) else text(end)
    return _indexed(first, [args[0], dim], f"{start}:{stop}" + (f":{text(step)}" if step != 1 else ""))


def _indexed(first: str, args: Sequence[Any], index: str) -> str:
    rank = args[0].meta["val"].dim()
    dim = args[1] % rank
    if dim == rank - 1 and rank > 2:
        return f"{first}[..., {index}]"
    return f"{first}[{':, ' * dim}{index}]"


def literal(value: Any) -> str:
    """A constant as text."""
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return f'float("{value}")'
    if isinstance(value, str):
        return quoted(value)
    return repr(value).replace("e+", "e") if isinstance(value, float) else repr(value)
