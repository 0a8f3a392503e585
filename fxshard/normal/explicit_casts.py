"""Autocast written out: the casts that it makes in secret become nodes.

In: a call that the model makes under ``torch.autocast``. ``torch.export`` records the call as the user wrote it, with
a result of the dtype that autocast gave it, and without the casts: autocast comes after the tracing of operators.
Out: the same call behind explicit casts, which computes the same with autocast off.

    linear = linear(x, w)   # bf16, of f32        to   = to(x, bfloat16)
                                           ->     to_1 = to(w, bfloat16)
                                                  linear = linear(to, to_1)

Which operand an operator casts, and to what, differs between devices and versions of torch. So it is not listed but
*observed*: the call is run on fake tensors under autocast, in a mode that sees every kernel below, casts included. Then
it is run without, behind the casts that were seen. Only if both runs make the same calls are the casts believed; this
also finds them where autocast reaches an operator's inner part only, as the ``bmm`` of an ``einsum``. Otherwise the
call stays under autocast (``under_autocast``): its operands are gathered, and the report says so.

Of a weight that requires a gradient, autocast keeps the cast until its outermost region ends. So do we: one cast, in
which the gradients of all readers meet. All else is cast once for each reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxshard.capture.export import quiet
from fxshard.rules.effects import is_mutating
from fxshard.runtime.autocast import State, under_autocast, using
from fxshard.torch_internals import HigherOrderOperator, OpOverload, TorchDispatchMode, has_kernel

__all__ = [
    "Casts",
    "Plain",
    "Unknown",
    "WithDtype",
    "casts_of",
    "occurrences",
    "set_dtype",
    "stay_under_autocast",
    "with_occurrences",
]

_aten = torch.ops.aten
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


@dataclass(frozen=True)
class Plain:
    """Autocast does nothing to the call."""


@dataclass(frozen=True)
class Casts:
    """The dtype to which each operand is cast, by its position among the call's; and which are cast as views only."""

    dtypes: Mapping[int, torch.dtype]
    views: frozenset[int] = frozenset()


@dataclass(frozen=True)
class WithDtype:
    """The call's own argument ``dtype`` is set; a reduction that accumulates and returns single precision."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Unknown:
    """What autocast does cannot be written in front of the call."""


Effect = Plain | Casts | WithDtype | Unknown


def casts_of(node: fx.Node, state: State, known: dict[Any, Effect]) -> Effect:
    """What autocast does to a call, whose operands' ``meta['val']`` are fake tensors.

    Args:
        node: a call of an operator.
        state: the autocast in which it is.
        known: what was found before; added to.
    """
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return Unknown()
    if not isinstance(target, OpOverload) or not node.all_input_nodes or _never_cast(target):
        return Plain()
    if is_mutating(target):
        return Unknown() if _has_kernel(target, state) else Plain()
    values = [operand.meta["val"] for operand in node.all_input_nodes]
    if not any(isinstance(value, torch.Tensor) or _holds_tensors(value) for value in values):
        return Plain()
    key = (target, state, str(map_arg((node.args, node.kwargs), lambda n: _describe(n.meta["val"]))))
    if key not in known:
        known[key] = _observe(node, state)
    return known[key]


def occurrences(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in order, lists flattened, with repetitions."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def with_occurrences(node: fx.Node, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``values`` in the places of ``occurrences``."""
    rest = iter(values)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda _: next(rest))
    return args, dict(kwargs)


def _never_cast(target: OpOverload) -> bool:
    """Views and casts: by far the most calls, and none of autocast's."""
    schema = target._schema
    views = bool(schema.arguments) and schema.arguments[0].alias_info is not None and not is_mutating(target)
    return views and target.namespace == "aten"


def _has_kernel(target: OpOverload, state: State) -> bool:
    name = f"{target._schema.name}.{target._schema.overload_name}".removesuffix(".")
    composite = has_kernel(name, "CompositeImplicitAutograd")
    return composite or any(has_kernel(name, _KEYS.get(device, "AutocastCPU")) for device, _ in state)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}@{value.device}"
    if isinstance(value, list | tuple):
        return str([_describe(item) for item in value])
    return str(value)


def _observe(node: fx.Node, state: State) -> Effect:
    """Find the casts by running the call; see the module's text."""
    operands = occurrences(node)
    with torch.no_grad():  # of its own for every operand: two may be one object
        values = [v.detach() if isinstance(v := operand.meta["val"], torch.Tensor) else v for operand in operands]
    plain = _record(node, values, {}, ())
    cast = _record(node, values, {}, state)
    if cast is None:
        return Unknown()
    if plain == cast:  # plain may be None: without autocast, operands of several dtypes may be refused
        return Plain()
    dtypes: dict[int, torch.dtype] = {}
    for position, dtype in cast.casts:
        if dtypes.setdefault(position, dtype) != dtype:
            return Unknown()
    if dtypes:
        early = [_cast(value, dtypes.get(i)) for i, value in enumerate(values)]
        behind = _record(node, early, {}, ())
        if behind is not None and behind.calls == cast.calls and not behind.casts:
            return Casts(dtypes, frozenset(cast.views))
    if _takes_dtype(node) and _record(node, values, {"dtype": torch.float32}, ()) == cast:
        return WithDtype(torch.float32)
    return Unknown()


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None else value


def _takes_dtype(node: fx.Node) -> bool:
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    if "dtype" not in names or node.kwargs.get("dtype") is not None:
        return False
    position = names.index("dtype")
    return len(node.args) <= position or node.args[position] is None


@dataclass
class _Seen(TorchDispatchMode):
    """What a call does below autocast: its kernels, and the casts of its operands apart.

    Views are left out: a cast may come before a view or behind it.
    """

    roots: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    casts: list[tuple[int, torch.dtype]] = field(default_factory=list)
    views: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and (self.calls, self.casts) == (other.calls, other.casts)

    __hash__ = None  # type: ignore[assignment]

    def hold(self, value: Any, root: int) -> None:
        """Take a tensor for (a view or a cast of) the operand at position ``root``."""
        self.alive.append(value)
        self.roots[id(value)] = root

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # it asks for a device or a layout
            return out
        root = self.roots.get(id(args[0])) if args else None
        if root is not None and func is _aten._to_copy.default and args[0].dtype != out.dtype:
            self.casts.append((root, out.dtype))
            if args[0] is not self.alive[root]:
                self.views.add(root)
            self.hold(out, root)
        elif root is not None and _never_cast(func):
            for item in out if isinstance(out, list | tuple) else [out]:
                self.hold(item, root)
        else:
            self.calls.append((func, _picture((args, kwargs))))
        return out


def _picture(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, str(list(value.shape))
    if isinstance(value, list | tuple):
        return tuple(map(_picture, value))
    if isinstance(value, dict):
        return tuple((key, _picture(item)) for key, item in value.items())
    return str(value)


def _record(node: fx.Node, values: Sequence[Any], more: Mapping[str, Any], state: State) -> _Seen | None:
    """Run a call on ``values`` in place of its operands; None where it fails."""
    args, kwargs = with_occurrences(node, values)
    kwargs |= more
    if more and isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
        args = tuple(a for a, name in zip(args, names, strict=False) if name not in more)
    modes = [mode for value in values for item in _tensors(value) if (mode := getattr(item, "fake_mode", None))]
    seen = _Seen()
    for position, value in enumerate(values):
        seen.hold(value, position)
    assert callable(node.target)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(torch.no_grad())
            stack.enter_context(using(state))
            if modes:
                stack.enter_context(modes[0])
            stack.enter_context(seen)
            node.target(*args, **kwargs)
    except Exception:  # whatever keeps it from running on fake tensors: nothing is known of it
        return None
    return seen


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


def stay_under_autocast(node: fx.Node, state: State) -> None:
    """Make ``node`` a call of ``under_autocast``: opaque, its operands gathered."""
    name = str(node.target)
    if isinstance(node.target, HigherOrderOperator):
        name = f"higher_order.{node.target.name()}"
    node.args = (state, name, *node.args)
    node.target = under_autocast


def set_dtype(node: fx.Node, dtype: torch.dtype) -> None:
    """Set the argument ``dtype`` of a call, wherever it stands."""
    assert isinstance(node.target, OpOverload)
    position = [argument.name for argument in node.target._schema.arguments].index("dtype")
    if len(node.args) > position:
        node.args = (*node.args[:position], dtype, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, "dtype": dtype}
