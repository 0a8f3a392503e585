"""Bring a captured graph into the form that one rule an operator can describe.

In: the graph of ``capture``. Out: the same computation without wrappers, guards, identities, in-place operators or
dead nodes, and with the bias of a linear as an addition of its own (the only step that changes how results round).

    _set_grad_enabled(False)                                  detach = detach(x)
    cos = cos(x)                                              cos = cos(detach)
    _set_grad_enabled(True)                             ->
    to = to(cos, float32)              # is float32           linear = linear(cos, w)
    linear = linear(to, w, b)                                 add = add(linear, b)    # meta: split_bias

Steps: inline wrappers, write out what regions without gradient and of autocast do (see ``autocast.py``) and drop
guards (one copy of the graph), functionalize (only where something mutates), then simplify in place. The input is never
changed; parameters are shared with it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxshard.ir.origins import SOURCE_META, module_of
from fxshard.ir.root import Root
from fxshard.lowerings.memory_order import note
from fxshard.normal.explicit_casts import (
    Casts,
    Effect,
    Unknown,
    WithDtype,
    casts_of,
    occurrences,
    set_dtype,
    stay_under_autocast,
    with_occurrences,
)
from fxshard.normal.functionalize import (
    functionalize_graph,
    infer_value,
    is_inert_dropout,
    nested_graphs,
    same_shape,
)
from fxshard.normal.masks import read_masks
from fxshard.normal.strided import over_memory
from fxshard.rules.effects import has_effect, is_dead, is_mutating
from fxshard.rules.recipe import bind
from fxshard.runtime.autocast import State, entered
from fxshard.runtime.module import find
from fxshard.torch_internals import EXIT_AUTOCAST, MODE_MARKS, SET_GRAD, Graph, OpOverload

__all__ = ["sparse_tables", "normalize"]

_aten = torch.ops.aten
_hop = torch.ops.higher_order
# They begin and end a region without gradient, or of autocast.
# Only memory or the name of the region differ; the values and their order are those of the graph inside.
_PLAIN_WRAPPERS = frozenset(
    getattr(_hop, name) for name in ("tag_activation_checkpoint", "wrap") if hasattr(_hop, name)
)
_GUARDS = frozenset(
    (
        *("_assert_tensor_metadata", "_assert_scalar", "_functional_assert_scalar"),
        *("sym_constrain_range", "sym_constrain_range_for_size", "_functional_assert_async"),
    )
)
# These return their operand unchanged when the result has the same shape, dtype and device.
_IDENTITIES = frozenset(
    (
        *("alias", "to", "type_as", "_to_copy", "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"),
        *("expand", "expand_as", "squeeze", "slice", "narrow", "_unsafe_view"),
    )
)
# What reads only the shape of its second operand, and what says the same with sizes.
_SIZED = {
    _aten.expand_as.default: _aten.expand.default,
    _aten.view_as.default: _aten.view.default,
    _aten.reshape_as.default: _aten.reshape.default,
}
_DROPOUTS = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))


def normalize(root: Root, autocast: State = ()) -> Root:
    """Return the normal form of a captured graph; ``root`` itself is not changed.

    Args:
        root: what ``capture`` gave.
        autocast: the autocast under which it was captured; the result has its casts, and runs without.

    Raises:
        CaptureError: an operator mutates its operand and has no functional counterpart.

    Example:
        >>> from fxshard.capture.capture import capture
        >>> captured = capture(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
        >>> [str(node.target) for node in normalize(captured.root).graph.nodes][3:]
        ['aten.linear.default', 'aten.add.Tensor', 'output']
    """
    graph = functionalize_graph(_Inliner(root, autocast).run(), root)
    _simplify(graph, root)
    return root.over(graph)


@functools.cache
def _kind(target: Any) -> str:
    """Sort an operator by what this pass does with it; "" is nothing."""
    if target is operator.getitem:
        return "getitem"
    if target in _SIZED or target is _aten.type_as.default:
        return "like"
    if target in MODE_MARKS:
        return "mark"
    if target in _PLAIN_WRAPPERS:
        return "wrapper"
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return ""
    name = target._schema.name.removeprefix("aten::")
    kinds = {
        "guard": _GUARDS,
        "identity": _IDENTITIES,
        "dropout": _DROPOUTS,
        "bias": {"linear", "addmm"},
        "drawn like": {"randint_like"},
        "table": {"embedding", "embedding_bag", "_embedding_bag"},
    }
    return next((kind for kind, names in kinds.items() if name in names), "detach_" if name == "detach_" else "")


@functools.cache
def _returns_operand(target: Any) -> bool:
    """Whether an operator writes to its first operand, and returns that very tensor."""
    if not isinstance(target, OpOverload) or not is_mutating(target) or len(target._schema.returns) != 1:
        return False
    first, result = target._schema.arguments[0].alias_info, target._schema.returns[0].alias_info
    return first is not None and result is not None and first.before_set == result.before_set


@dataclass(frozen=True)
class _Mode:
    """What surrounds a call: whether autograd records it, which autocast it is under, and in how many of them."""

    grad: bool
    autocast: State
    depth: int


@dataclass
class _Inliner:
    """Copies a graph without its guards, and with the graphs of wrappers in place of the wrappers."""

    root: Root
    autocast: State = ()
    graph: fx.Graph = field(default_factory=Graph)
    without_grad: set[fx.Node] = field(default_factory=set)
    detached: dict[fx.Node, fx.Node] = field(default_factory=dict)
    effects: dict[Any, Effect] = field(default_factory=dict)
    kept: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict)

    def run(self) -> fx.Graph:
        self._region(self.root, "", {}, _Mode(True, self.autocast, bool(self.autocast)))
        return self.graph

    @functools.cached_property
    def mutates(self) -> bool:
        graphs = [module.graph for module in self.root.modules() if isinstance(module, Root | fx.GraphModule)]
        return any(is_mutating(node.target) for graph in graphs for node in graph.nodes)

    def _region(self, owner: Root | fx.GraphModule, prefix: str, env: dict[fx.Node, Any], mode: _Mode) -> Any:
        """Copy the graph of ``owner``, whose operands are in ``env``; return what it returns."""
        outside: dict[fx.Node, _Mode] = {}
        for node in owner.graph.nodes:
            if node.op == "output" and prefix:
                return map_arg(node.args[0], env.__getitem__)
            kind = _kind(node.target) if node.op == "call_function" else ""
            if node in env or kind == "guard" or (node.op == "call_module" and node.target.endswith("_guards_fn")):
                continue
            if kind == "mark":
                mode = self._enter_or_leave(node, mode, outside)
            elif kind == "wrapper":
                env[node] = self._inline(node, owner, prefix, env, mode)
            elif kind == "getitem" and isinstance(env[node.args[0]], tuple | list):
                env[node] = env[node.args[0]][node.args[1]]
            elif (kind == "dropout" and is_inert_dropout(node)) or (kind == "detach_" and _is_fresh_constant(node)):
                # Before anything is functionalized: the result of an inert dropout is its operand, not a copy.
                env[node] = env[node.args[0]]
            else:
                env[node] = self._copy(node, prefix, env, mode)
        return None

    def _copy(self, node: fx.Node, prefix: str, env: dict[fx.Node, Any], mode: _Mode) -> fx.Node:
        """Copy one node, with what its mode does to it."""

        def operand(old: fx.Node) -> Any:
            return env[old] if mode.grad else self._quiet(env[old])

        if node.target is _aten.as_strided.default:
            new = over_memory(self.graph, node, operand, lambda old: env[old] in self.without_grad)
        else:
            new = self.graph.node_copy(node, operand)
        note(new)
        if prefix and node.op == "get_attr":
            new.target = prefix + str(node.target)
        if not mode.grad:
            self.without_grad.add(new)
        if mode.autocast and node.op == "call_function":
            self._write_casts(new, mode)
        if not mode.grad and _returns_operand(node.target):
            return env[node.args[0]]  # type: ignore[index, no-any-return]  # itself, not what the region sees of it
        return new

    def _enter_or_leave(self, node: fx.Node, mode: _Mode, outside: dict[fx.Node, _Mode]) -> _Mode:
        """Return the mode behind a call that enters or leaves a region."""
        if node.target is SET_GRAD:
            return replace(mode, grad=bool(node.args[0]))
        if node.target is EXIT_AUTOCAST:
            before = outside[node.args[0]]  # type: ignore[index]
            return replace(mode, autocast=before.autocast, depth=before.depth)
        outside[node] = mode
        if not mode.depth:
            self.kept = {}
        device, dtype, enabled, _ = node.args
        return replace(mode, autocast=entered(mode.autocast, device, dtype, enabled), depth=mode.depth + 1)  # type: ignore[arg-type]

    def _inline(
        self, node: fx.Node, owner: Root | fx.GraphModule, prefix: str, env: dict[fx.Node, Any], mode: _Mode
    ) -> Any:
        """Copy the graph that the wrapper ``node`` calls; return the values of its result."""
        name, *operands = node.args
        assert isinstance(name, fx.Node)
        inner = find(owner, str(name.target))
        assert isinstance(inner, fx.GraphModule)
        values = [env[operand] if isinstance(operand, fx.Node) else operand for operand in operands]
        inputs = dict(zip(inner.graph.find_nodes(op="placeholder"), values, strict=True))
        return self._region(inner, f"{prefix}{name.target}.", inputs, mode)

    def _write_casts(self, node: fx.Node, mode: _Mode) -> None:
        """Make the casts of autocast nodes in front of ``node``."""
        effect = casts_of(node, mode.autocast, self.effects)
        if isinstance(effect, Unknown):
            stay_under_autocast(node, mode.autocast)
        elif isinstance(effect, WithDtype):
            set_dtype(node, effect.dtype)
        elif isinstance(effect, Casts):
            values = [
                self._cast(node, operand, effect.dtypes[i], mode, i not in effect.views)
                if i in effect.dtypes
                else operand
                for i, operand in enumerate(occurrences(node))
            ]
            node.args, node.kwargs = with_occurrences(node, values)

    def _cast(self, node: fx.Node, operand: fx.Node, dtype: torch.dtype, mode: _Mode, direct: bool) -> fx.Node:
        """Return ``operand`` cast for ``node``: a weight once in its outermost region, anything else every time."""
        value = operand.meta["val"]
        is_kept = direct and dtype in dict(mode.autocast).values() and self._is_trained(operand, value)
        if is_kept and (operand, dtype) in self.kept:
            return self.kept[operand, dtype]
        with self.graph.inserting_before(node):
            cast = self.graph.call_function(_aten.to.dtype, (operand, dtype))
        cast.meta = {key: node.meta[key] for key in SOURCE_META if key in node.meta}
        cast.meta["val"] = infer_value(cast)
        if is_kept:
            self.kept[operand, dtype] = cast
        if not mode.grad:
            self.without_grad.add(cast)
        return cast

    def _is_trained(self, operand: fx.Node, value: Any) -> bool:
        if operand.op == "placeholder":
            return value.dtype == torch.float32 and bool(value.requires_grad)
        if operand.op != "get_attr" or value.dtype != torch.float32:
            return False
        return isinstance(find(self.root, str(operand.target)), torch.nn.Parameter)

    def _quiet(self, node: Any) -> Any:
        """Return ``node`` as an operator sees it that runs without gradient."""
        if not isinstance(node, fx.Node) or node in self.without_grad or not self._may_carry_gradient(node):
            return node
        if node not in self.detached:
            self.detached[node] = detach = self.graph.call_function(_aten.detach.default, (node,))
            detach.meta = {key: node.meta[key] for key in (*SOURCE_META, "val") if key in node.meta}
        return self.detached[node]

    def _may_carry_gradient(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or not (val.is_floating_point() or val.is_complex()):
            return False
        if node.op == "get_attr" and not self.mutates:
            held = find(self.root, str(node.target))
            return isinstance(held, torch.nn.Parameter) or bool(held.requires_grad)
        return node.op != "call_function" or bool(node.all_input_nodes)


def _is_fresh_constant(node: fx.Node) -> bool:
    """Say whether ``node`` detaches a literal of the user's code, which has no gradient to be detached from."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.op == "get_attr" or (source.target is _aten.lift_fresh_copy.default and len(source.users) == 1)


def _simplify(graph: fx.Graph, root: Root) -> None:
    """Drop identities, split biases off, and drop what nobody reads."""
    for node in graph.nodes:
        kind = _kind(node.target) if node.op == "call_function" else ""
        if kind in ("identity", "like") and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
        elif kind == "bias":
            _split_bias(graph, node)
        elif kind == "like":
            _name_sizes(graph, node)
        elif kind == "drawn like":
            _detach(graph, node)
        elif kind == "table":
            _dense(node)
        if node.target in _SIZED.values():
            _mend_shape(node)
    read_masks(graph)
    for node in reversed(graph.nodes):
        if is_dead(node) and not any(has_effect(item) for item in _within(node, root)):
            graph.erase_node(node)


def _detach(graph: fx.Graph, node: fx.Node) -> None:
    """Let a draw that has only the shape of its operand read no value of it: torch has no gradient for that."""
    source = node.args[0]
    if isinstance(source, fx.Node):
        with graph.inserting_before(node):
            detached = graph.call_function(_aten.detach.default, (source,))
        detached.meta = {**node.meta, "val": source.meta["val"].detach()}
        node.replace_input_with(source, detached)


def _dense(node: fx.Node) -> None:
    """Let a table have a dense gradient: sums over ranks, and gradients' other ways, know no sparse ones."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == "sparse":
            node.args = tuple(False if i == index else value for i, value in enumerate(node.args))
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "sparse"}


def sparse_tables(graph: fx.Graph) -> list[str]:
    """The modules whose tables are asked to have sparse gradients, which they do not get."""
    found = [n for n in graph.nodes if _kind(n.target) == "table" and bind(n).get("sparse")]
    return list(dict.fromkeys(module_of(node) or "the model" for node in found))


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or node.kwargs.get("copy") or any(arg is True for arg in node.args[1:]):
        return False
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    a, b = source.meta.get("val"), node.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if not _keeps_dims(node, a):
        return False
    return a.dtype == b.dtype and a.device == b.device and a.layout == b.layout and same_shape(a.shape, b.shape)


def _keeps_dims(node: fx.Node, source: torch.Tensor) -> bool:
    """Whether the arguments say so, too: of sizes that values decide, the noted shapes do not tell which dims are 1."""
    other = node.args[1] if len(node.args) > 1 else None
    if _kind(node.target) == "like":
        return node.target is _aten.type_as.default or other.meta["val"].dim() == source.dim()  # type: ignore[union-attr]
    if node.target in (_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims):
        dims = range(source.dim()) if other is None else [other] if isinstance(other, int) else other
        return not source.dim() or all(isinstance(source.shape[dim], int) for dim in dims)  # type: ignore[union-attr, index]
    return node.target not in _SIZED.values() or len(_sizes(node)) == source.dim()


def _sizes(node: fx.Node) -> Sequence[Any]:
    """The sizes that a view, reshape or expand is given."""
    sizes: Any = next(iter((*node.args[1:], *node.kwargs.values())))
    return sizes  # type: ignore[no-any-return]


def _mend_shape(node: fx.Node) -> None:
    """Note the shape that a reshape is given, where export noted that of a source whose sizes values decide."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and len(_sizes(node)) != value.dim():
        sizes = [size.meta["val"] if isinstance(size, fx.Node) else size for size in _sizes(node)]
        if -1 not in sizes:
            node.meta["val"] = value.new_empty(sizes)


def _split_bias(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrite ``linear(x, w, b)`` as ``linear(x, w) + b``, and ``addmm(b, x, w)`` as ``mm(x, w) + b``."""
    if node.target is _aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        product, target = node.args[:2], _aten.linear.default
    else:
        scaled = any(factor != 1 for factor in node.kwargs.values())
        bias = None if scaled else node.args[0]
        product, target = node.args[1:], _aten.mm.default
    if not isinstance(bias, fx.Node):
        return
    with graph.inserting_after(node):
        add = graph.call_function(_aten.add.Tensor, (node, bias))
    add.meta = {**node.meta, "split_bias": True}
    node.replace_all_uses_with(add, delete_user_cb=lambda user: user is not add)
    node.target, node.args, node.kwargs = target, product, {}


def _name_sizes(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrite ``expand_as(x, other)`` and the like with sizes, ``type_as`` with a dtype: no value is read of other."""
    source, other = node.args[:2]
    value = node.meta["val"]
    if node.target is _aten.type_as.default:
        node.target, node.args = _aten.to.dtype, (source, value.dtype)
        return
    sizes: list[Any] = []
    with graph.inserting_before(node):
        for dim, size in enumerate(other.meta["val"].shape):  # type: ignore[union-attr]
            if not isinstance(size, int):
                read = graph.call_function(_aten.sym_size.int, (other, dim))
                read.meta = {**node.meta, "val": size}
                size = read
            sizes.append(size)
    assert isinstance(node.target, OpOverload)
    node.target, node.args = _SIZED[node.target], (source, sizes)


def _within(node: fx.Node, root: torch.nn.Module) -> Iterator[fx.Node]:
    """The nodes of the graphs that a higher-order operator calls."""
    for owner in nested_graphs(node, root):
        for item in owner.graph.nodes:
            yield item
            yield from _within(item, owner)
