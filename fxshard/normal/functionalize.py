"""Replace operators that mutate by their functional counterparts.

In: a graph where a node may change a value in place, through any view of it. Out: the same computation where every
node only makes new values; a parameter, buffer or input that was changed is written once, at the end.

    slice_1 = slice(buf, 0, 1, 3)             slice_1 = slice(buf, 0, 1, 3)
    add_ = add_(slice_1, x)            ->     add = add(slice_1, x)
    mul = mul(buf, 2)                         slice_scatter = slice_scatter(buf, add, 0, 1, 3)
                                              mul = mul(slice_scatter, 2)
                                              copy_ = copy_(buf, slice_scatter)

Every value is a view, possibly of no steps, of a *cell*, which stands for memory. A write to a view is carried back
step by step into a new value of the cell; a later reader of any view of that cell replays its own steps on the new
value. Which operator mutates, and what its counterpart is, is read off the schemas.

Reference: functionalization in PyTorch, https://dev-discuss.pytorch.org/t/965.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxshard.errors import CaptureError
from fxshard.ir.origins import SOURCE_META, where
from fxshard.ir.root import Root
from fxshard.lowerings.memory_order import carry
from fxshard.normal.explicit_casts import occurrences
from fxshard.rules.effects import base_of, is_mutating, may_view, shares_memory, shown_operand
from fxshard.runtime.hidden_writes import HIDDEN, HIDDEN_WRITE
from fxshard.runtime.module import find
from fxshard.torch_internals import Graph, HigherOrderOperator, OpOverload

__all__ = [
    "functionalize",
    "functionalize_graph",
    "infer_value",
    "is_inert_dropout",
    "nested_graphs",
    "same_shape",
]

_aten = torch.ops.aten
_IDENTITIES = frozenset(("alias", "detach", "to", "contiguous", "lift_fresh", "type_as"))
_RESHAPES = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"),
        *("expand", "expand_as", "_reshape_alias", "atleast_1d", "atleast_2d", "atleast_3d"),
    )
)
_EXPANDS = frozenset(("expand", "expand_as"))
_PERMUTATIONS = frozenset(("transpose", "t", "permute", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims"))
_SCATTERS = {"slice": "slice_scatter", "select": "select_scatter", "diagonal": "diagonal_scatter"}
_DROPOUTS = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))
_DROPOUTS_IN_PLACE = frozenset(f"{name}_" for name in (*_DROPOUTS, "rrelu", "rrelu_with_noise"))
# Position, among the arguments after the tensor, of the dim that is cut.
_SPLITS = {"split": 1, "chunk": 1, "split_with_sizes": 1, "tensor_split": 1, "unbind": 0}
# The schema of these allows a view; whether it is one depends on strides and dtypes.
_PERHAPS_VIEWS = frozenset(("to", "contiguous", "type_as", "reshape", "reshape_as", "flatten", "ravel", "lift_fresh"))
_COMPARISONS = ("eq_", "ne_", "lt_", "le_", "gt_", "ge_", "logical_", "greater", "less", "not_equal_")


def functionalize(root: Root) -> Root:
    """Return ``root`` with every in-place operator replaced; ``root`` itself is not changed.

    Raises:
        CaptureError: an operator mutates its operand and has no functional counterpart, or writes through a view
            that cannot be inverted.
    """
    return root.over(functionalize_graph(root.graph, root))


def functionalize_graph(graph: fx.Graph, root: torch.nn.Module) -> fx.Graph:
    """Return a functional copy of ``graph``, or ``graph`` itself where nothing in it mutates."""
    if not any(node.op == "call_function" and _needs_work(node) for node in graph.nodes):
        return graph
    return _Functionalizer(graph, root).run()


def is_inert_dropout(node: fx.Node) -> bool:
    """Say whether ``node`` is a dropout that returns its operand itself, though its schema does not say so."""
    if _name(node.target) not in _DROPOUTS:
        return False
    _, p, train = (*node.args, *node.kwargs.values())[:3]
    return train is False or (isinstance(p, int | float) and p == 0)


def nested_graphs(node: fx.Node, root: torch.nn.Module) -> list[fx.GraphModule]:
    """Return the graphs that a higher-order operator calls."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    targets = [operand.target for operand in node.all_input_nodes if operand.op == "get_attr"]
    owners = [find(root, str(target)) for target in targets]
    return [owner for owner in owners if isinstance(owner, fx.GraphModule)]


def infer_value(node: fx.Node) -> Any:
    """Compute what ``node`` returns from its operands' ``meta['val']``, on fake tensors."""
    modes = []

    def value(operand: fx.Node) -> Any:
        val = operand.meta["val"]
        if (mode := getattr(val, "fake_mode", None)) is not None:
            modes.append(mode)
        return val

    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    assert callable(node.target)
    if not modes:
        return node.target(*args, **kwargs)
    with modes[0], torch.no_grad():
        return node.target(*args, **kwargs)


def _needs_work(node: fx.Node) -> bool:
    return is_mutating(node.target) or isinstance(node.target, HigherOrderOperator)


@functools.cache
def _name(target: Any) -> str:
    """Return ``add_`` for ``aten.add_.Tensor``, and nothing for what is not an operator of ATen."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::")


@functools.cache
def _written(target: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _counterpart(target: Any) -> Any:
    """Find the operator that returns what ``target`` would write: the same operands, less those of ``out=``."""
    arguments = target._schema.arguments
    name = target._schema.name.split("::")[1]
    wanted = [str(argument.type) for argument in arguments if not argument.is_out]
    if any(argument.is_out for argument in arguments):
        stems = [name]
    elif name.startswith("__i"):
        stems = ["__" + name[3:]]
    else:
        stems = [name[:-1], name + "functional"] if name.endswith("_") else []
    for stem in stems:
        packet = getattr(getattr(torch.ops, target.namespace), stem, None)
        overloads = packet.overloads() if packet is not None else []
        for overload in sorted(overloads, key=lambda o: bool(o != target._overloadname)):
            candidate = getattr(packet, overload)
            same = [str(argument.type) for argument in candidate._schema.arguments] == wanted
            if same and candidate._schema.returns and not is_mutating(candidate):
                return candidate
    return None


@dataclass(eq=False)
class _Cell:
    """Memory: the node of the new graph that holds its present value, and how often it was written."""

    value: fx.Node
    version: int = 0
    is_hidden: bool = True  # whether autograd knows of no write to it


@dataclass(eq=False)
class _View:
    """One step from memory to a view of it; ``index`` picks a part where the operator returns several.

    ``shown`` is the operand of ``node`` that the view is of.
    """

    node: fx.Node
    shown: fx.Node
    index: int | None = None
    part: fx.Node | None = None


@dataclass(eq=False)
class _Ref:
    """A value of the old graph: steps on a cell, and the new node that held it at some version of the cell."""

    cell: _Cell
    views: tuple[_View, ...]
    node: fx.Node
    version: int = 0


@dataclass
class _Functionalizer:
    """Copies a graph in order, keeping for every old node where its value lives."""

    old: fx.Graph
    root: torch.nn.Module
    graph: fx.Graph = field(default_factory=Graph)
    refs: dict[fx.Node, _Ref] = field(default_factory=dict)
    replayed: dict[tuple[_Cell, int, tuple[_View, ...]], fx.Node] = field(default_factory=dict)
    attributes: dict[str, _Ref] = field(default_factory=dict)

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "output":
                self._write_back()
                self.graph.node_copy(node, self._read)
            elif node.op == "get_attr":
                if str(node.target) not in self.attributes:
                    self.attributes[str(node.target)] = self._fresh(self.graph.node_copy(node))
                self.refs[node] = self.attributes[str(node.target)]
            elif node.op == "call_function" and is_mutating(node.target):
                self._mutate(node)
            else:
                self._check_region(node)
                self._copy(node)
        return self.graph

    def _fresh(self, node: fx.Node) -> _Ref:
        return _Ref(_Cell(node), (), node)

    # Reading.

    def _read(self, old: fx.Node) -> fx.Node:
        """Return the new node that holds what ``old`` holds by now."""
        ref = self.refs[old]
        if ref.version != ref.cell.version:
            ref.node, ref.version = self._replay(ref.cell, ref.views), ref.cell.version
        return ref.node

    def _replay(self, cell: _Cell, views: tuple[_View, ...]) -> fx.Node:
        """Apply the steps ``views`` to the present value of ``cell``."""
        if not views:
            return cell.value
        key = (cell, cell.version, views)
        if key not in self.replayed:
            view, source = views[-1], self._replay(cell, views[:-1])
            args, kwargs = map_arg((view.node.args, view.node.kwargs), lambda n: source if n is view.shown else n)
            result = self.graph.call_function(view.node.target, args, kwargs)  # type: ignore[arg-type]
            result.meta = dict(view.node.meta)
            if view.part is not None:
                part = self.graph.call_function(view.part.target, (result, view.index))  # type: ignore[arg-type]
                part.meta = dict(view.part.meta)
                result = part
            self.replayed[key] = result
        return self.replayed[key]

    def _copy(self, node: fx.Node) -> None:
        """Copy a node that does not mutate, and remember which memory its result shares."""
        new = self.graph.node_copy(node, self._read)
        self.refs[node] = self._fresh(new)
        if is_inert_dropout(node):
            self.refs[node] = self.refs[node.args[0]]  # type: ignore[index]
        elif node.target is operator.getitem:
            self._copy_part(node, new)
        elif _name(node.target) not in _SPLITS:
            source = shown_operand(node)
            if isinstance(source, fx.Node) and _is_view(source, node):
                self.refs[node] = self._step(self.refs[source], _View(new, self._read(source)), new)

    def _copy_part(self, node: fx.Node, new: fx.Node) -> None:
        """Remember the memory of one of the tensors that an operator returns."""
        several, index = node.args
        if not isinstance(several, fx.Node) or not isinstance(index, int):
            return
        if several.target is operator.getitem:
            self._copy_of_inner_list(node, several)
            return
        known = _name(several.target) in _SPLITS
        whole = several.args[0] if known else next((x for x in several.all_input_nodes if shares_memory(node, x)), None)
        if not isinstance(whole, fx.Node):
            return
        split = self.refs[several].node
        shown = occurrences(split)[occurrences(several).index(whole)]
        ref = self._step(self.refs[whole], _View(split, shown, index, new), new)
        # The parts are as old as the split: a write in between makes them out of date.
        ref.version = ref.cell.version if shown is self._read(whole) else -1
        self.refs[node] = ref

    def _copy_of_inner_list(self, node: fx.Node, several: fx.Node) -> None:
        """Remember the memory of a tensor in a list among the results: ``histogramdd`` gives back its operands."""
        while several.target is operator.getitem:
            several = several.args[0]  # type: ignore[assignment]
        sharing = [x for x in several.all_input_nodes if shares_memory(node, x)]
        same = next((x for x in sharing if _lies_as(node.meta["val"], x.meta["val"])), None)
        if same is not None:
            self.refs[node] = self.refs[same]
        elif sharing:
            raise self._error(several, "returns a view of an operand within a list of its results")

    def _step(self, ref: _Ref, view: _View, node: fx.Node) -> _Ref:
        return _Ref(ref.cell, (*ref.views, view), node, ref.cell.version)

    # Writing.

    def _mutate(self, node: fx.Node) -> None:
        target = node.target
        assert isinstance(target, OpOverload)
        positions = _written(target)
        index, name = positions[0]
        written = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        if len(positions) != 1 or not isinstance(written, fx.Node):
            raise self._error(node, "changes several operands in place")
        ref = self.refs[written]
        self.refs[node] = ref
        if torch.Tag.inplace_view in target.tags:
            self._restride(node, ref)
            return
        before = ref.cell.value if self._hides_gradient(ref) else None
        ref.cell.is_hidden &= before is not None
        held = self._read(written)
        whole = not ref.views or _name(node.target) in (
            "zero_",
            "fill_",
        )  # of a part that is copied, the rest carries it
        behind = whole and self._may_carry_gradient(held)
        self._store(node, ref, self._cast(node, self._functional(node, held, behind), held))
        if before is not None:
            ref.cell.value = self._emit(node, HIDDEN_WRITE, (ref.cell.value, before), val=before.meta["val"])

    def _functional(self, node: fx.Node, held: fx.Node, behind: bool) -> fx.Node:
        """Emit the operator that returns what ``node`` would write into ``held``.

        Args:
            node: it changes its operand in place.
            held: what the operand holds.
            behind: whether a gradient goes on behind it: where all is overwritten, one of zero.
        """
        name = _name(node.target)
        if name == "copy_" and isinstance(node.args[1], fx.Node):
            source = self._broadcast(node, self._source(node, node.args[1]), held)
            return self._over(node, held, source) if behind else source
        if name == "zero_" or (name == "fill_" and not isinstance(node.args[1], fx.Node)):
            number = 0 if name == "zero_" else node.args[1]
            target = _aten.fill.Scalar if behind else _aten.full_like.default
            return self._emit(node, target, (held, number), val=held.meta["val"])
        if name == "fill_diagonal_" and held.meta["val"].dim() == 2 and len(node.args) == 2:
            diagonal = self._emit(node, _aten.diagonal.default, (held,))
            filled = self._emit(node, _aten.full_like.default, (diagonal, node.args[1]))
            return self._scatter(node, _aten.diagonal_scatter.default, held, filled, ())
        counterpart = _counterpart(node.target)
        if counterpart is None:
            raise self._error(node, "changes its operand in place, and has no functional counterpart")
        outs = {argument.name for argument in node.target._schema.arguments if argument.is_out}  # type: ignore[union-attr]
        args = map_arg((*node.args, *_left_out(node, counterpart)), self._read)
        kwargs = {key: map_arg(value, self._read) for key, value in node.kwargs.items() if key not in outs}
        if torch.Tag.nondeterministic_seeded in node.target.tags and name not in _DROPOUTS_IN_PLACE:  # type: ignore[union-attr]
            detached = self._emit(node, _aten.detach.default, (held,), val=held.meta["val"])  # of a draw there is none
            drawn = self._emit(node, counterpart, map_arg(args, lambda n: detached if n is held else n), kwargs)
            carry(node, drawn, node.target)
            return self._over(node, held, drawn) if behind else drawn
        keeps_dtype = not outs and _one_float_dtype(node) and not name.startswith(_COMPARISONS)
        return carry(node, self._emit(node, counterpart, args, kwargs, val=held.meta["val"] if keeps_dtype else None))

    def _over(self, node: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
        """Emit ``value`` in the place of ``held``, to which a gradient of zero goes."""
        zeros = self._emit(node, _aten.fill.Scalar, (held, 0), val=held.meta["val"])
        return self._emit(node, _aten.add.Tensor, (zeros, value), val=held.meta["val"])

    def _source(self, node: fx.Node, old: fx.Node) -> fx.Node:
        """Return what is copied; of memory that may be written back at the end, a copy that the end leaves alone."""
        value, root = self._read(old), self.refs[old].node
        while may_view(root.target) or _name(root.target) in _DROPOUTS:
            root = root.all_input_nodes[0]
        if root.op in ("get_attr", "placeholder"):
            return self._emit(node, _aten.clone.default, (value,), val=value.meta["val"])
        return value

    def _broadcast(self, node: fx.Node, source: fx.Node, held: fx.Node) -> fx.Node:
        have, want = source.meta["val"], held.meta["val"]
        if have.device != want.device:
            source = self._emit(node, _aten.to.device, (source, want.device, want.dtype))
        source = self._cast(node, source, held)
        if not same_shape(have.shape, want.shape):
            source = self._emit(node, _aten.expand.default, (source, self._sizes(held)), val=want)
        return source

    def _cast(self, node: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
        dtype = like.meta["val"].dtype
        if value.meta["val"].dtype == dtype:
            return value
        return self._emit(node, _aten.to.dtype, (value, dtype))

    def _restride(self, node: fx.Node, ref: _Ref) -> None:
        """Handle ``unsqueeze_`` and the like: the memory stays, every name of this value is a further view of it."""
        if _name(node.target) == "detach_" and ref.node.op == "get_attr":
            return  # a literal or a buffer: it has no gradient to be detached from
        counterpart = _counterpart(node.target)
        if _name(counterpart) not in _IDENTITIES | _RESHAPES | _PERMUTATIONS or ref is self._owned(ref):
            raise self._error(node, "changes the memory or the shape of its operand in place")
        new = self._emit(node, counterpart, map_arg(node.args, self._read), dict(node.kwargs), val=node.meta["val"])
        view = _View(new, new.all_input_nodes[0])
        ref.views, ref.node, ref.version = (*ref.views, view), new, ref.cell.version

    def _owned(self, ref: _Ref) -> _Ref | None:
        """Return ``ref`` if it is a parameter, a buffer or an input, whose shape outlives the call."""
        return ref if ref.node.op in ("get_attr", "placeholder") else None

    def _store(self, node: fx.Node, ref: _Ref, value: fx.Node) -> None:
        """Make ``value``, written to a view, part of a new value of its cell."""
        cell, written = ref.cell, value
        for i in reversed(range(len(ref.views))):
            value = self._put_back(node, ref.views[i], functools.partial(self._replay, cell, ref.views[:i]), value)
        cell.value, cell.version = value, cell.version + 1
        ref.node, ref.version = written, cell.version

    def _put_back(self, node: fx.Node, view: _View, source: Any, value: fx.Node) -> fx.Node:
        """Return ``source()`` with ``value`` in the place that ``view`` shows."""
        name, rest, kwargs = _name(view.node.target), view.node.args[1:], dict(view.node.kwargs)
        if view.index is not None:
            return self._put_back_part(node, view, source(), value)
        if name in _IDENTITIES:
            return value
        if name in _SCATTERS:
            return self._scatter(node, getattr(_aten, _SCATTERS[name]).default, source(), value, rest, kwargs)
        if name == "narrow" and all(isinstance(item, int) for item in rest):
            dim, start, length = rest
            ends = dim, start, start + length  # type: ignore[operator]
            return self._scatter(node, _aten.slice_scatter.default, source(), value, ends)
        if name in _RESHAPES and _shows_all(name, source().meta["val"], value.meta["val"]):
            return self._emit(node, _aten.reshape.default, (value, self._sizes(source())))
        if name in _PERMUTATIONS:
            return self._emit(node, _aten.permute.default, (value, _inverse_permutation(view.node)))
        return self._put_back_slice(node, view, source(), value)

    def _put_back_part(self, node: fx.Node, view: _View, source: fx.Node, value: fx.Node) -> fx.Node:
        """Put ``value`` back as one part of a split."""
        if _name(view.node.target) not in _SPLITS:
            return self._put_back_slice(node, view, source, value)
        position = _SPLITS[_name(view.node.target)]
        rest = view.node.args[1:]
        dim = rest[position] if len(rest) > position else view.node.kwargs.get("dim", 0)
        parts = view.node.meta["val"]
        assert isinstance(dim, int)
        assert view.index is not None
        index = view.index % len(parts)
        if _name(view.node.target) == "unbind":
            return self._scatter(node, _aten.select_scatter.default, source, value, (dim, index))
        sizes = [part.shape[dim] for part in parts[: index + 1]]
        if not all(isinstance(size, int) for size in sizes):
            raise self._error(node, "writes to a part of a split whose sizes are dynamic")
        start = sum(sizes[:-1])
        ends = dim, start, start + sizes[-1]
        return self._scatter(node, _aten.slice_scatter.default, source, value, ends)

    def _put_back_slice(self, node: fx.Node, view: _View, source: fx.Node, value: fx.Node) -> fx.Node:
        """Put ``value`` back as what some operator shows, where that is its operand itself, or a slice of it."""
        whole, part = view.shown.meta["val"], (view.part or view.node).meta["val"]
        start, cut = part.storage_offset() - whole.storage_offset(), None
        if part.dtype == whole.dtype and same_shape(part.stride(), whole.stride()) and isinstance(start, int):
            cut = [dim for dim in range(part.dim()) if not _same_size(part.shape[dim], whole.shape[dim])]
        if cut == [] and start == 0:
            return value
        if cut is None or len(cut) != 1 or not isinstance(part.shape[cut[0]], int):
            raise self._error(node, f"writes through {view.node.target}, which cannot be undone")
        start //= max(whole.stride()[cut[0]], 1)
        ends = cut[0], start, start + part.shape[cut[0]]
        return self._scatter(node, _aten.slice_scatter.default, source, value, ends)

    def _scatter(
        self, node: fx.Node, target: Any, source: fx.Node, value: fx.Node, rest: Any, kwargs: Any = None
    ) -> fx.Node:
        """Put ``value`` in the place of a part of ``source``; complex ones as pairs, which alone have a gradient."""
        if not source.meta["val"].is_complex():
            return self._emit(node, target, (source, value, *rest), kwargs or {})
        ndim, names = source.meta["val"].dim(), [a.name for a in target._schema.arguments]
        given = dict(zip(names[2:], rest, strict=False)) | dict(kwargs or {})
        for name in ("dim", "dim1", "dim2"):
            if name in names:
                given[name] = given.get(name, int(name == "dim2")) % ndim
        plain = [self._emit(node, _aten.resolve_conj.default, (each,)) for each in (source, value)]
        pairs = [self._emit(node, _aten.view_as_real.default, (each,)) for each in plain]
        if target is _aten.diagonal_scatter.default:  # the diagonal comes last, behind the pair
            pairs[1] = self._emit(node, _aten.transpose.int, (pairs[1], -1, -2))
        return self._emit(node, _aten.view_as_complex.default, (self._emit(node, target, tuple(pairs), given),))

    def _write_back(self) -> None:
        """Write each changed parameter, buffer and input once."""
        changed = {
            ref.cell: old
            for old, ref in self.refs.items()
            if old.op in ("get_attr", "placeholder") and ref.cell.version and not ref.views
        }
        for cell, old in changed.items():
            written = self._emit(
                cell.value, _aten.copy_.default, (self._original(old), cell.value), val=old.meta["val"]
            )
            written.meta[HIDDEN] = cell.is_hidden

    def _original(self, old: fx.Node) -> fx.Node:
        found: fx.Node = next(node for node in self.graph.nodes if node.op == old.op and node.target == old.target)
        return found

    # Helpers.

    def _emit(self, like: fx.Node, target: Any, args: Any, kwargs: Any = None, *, val: Any = None) -> fx.Node:
        """Add a node that comes from where ``like`` comes from."""
        node = self.graph.call_function(target, tuple(args), kwargs or {})
        node.meta = {key: like.meta[key] for key in SOURCE_META if key in like.meta}
        node.meta["val"] = infer_value(node) if val is None else val
        return node

    def _sizes(self, node: fx.Node) -> list[Any]:
        """Return the shape of ``node`` as arguments: numbers, and nodes that read the dynamic sizes."""
        sizes: list[Any] = []
        for dim, size in enumerate(node.meta["val"].shape):
            dynamic = isinstance(size, torch.SymInt)
            sizes.append(self._emit(node, _aten.sym_size.int, (node, dim), val=size) if dynamic else size)
        return sizes

    def _hides_gradient(self, ref: _Ref) -> bool:
        """Say whether a write hides from autograd, while a gradient may flow through the value that is written to."""
        behind = any(_name(view.node.target) == "detach" for view in ref.views)
        return behind and self._may_carry_gradient(ref.cell.value)

    def _may_carry_gradient(self, node: fx.Node) -> bool:
        """Say whether a gradient could flow from ``node`` to a parameter or an input, whatever needs one now."""
        pending, seen = [node], {node}
        while pending:
            item = pending.pop()
            val = item.meta.get("val")
            if _name(item.target) == "detach" or (isinstance(val, torch.Tensor) and not _differentiable(val)):
                continue
            if item.op == "get_attr":
                owner = find(self.root, str(item.target))
                if isinstance(owner, torch.nn.Parameter) or getattr(owner, "requires_grad", False):
                    return True
            elif item.op == "placeholder":
                return True
            pending += [operand for operand in item.all_input_nodes if operand not in seen]
            seen.update(item.all_input_nodes)
        return False

    def _check_region(self, node: fx.Node) -> None:
        """Refuse a higher-order operator whose graph writes to its operands: the write would not be seen."""
        for inner in nested_graphs(node, self.root):
            for item in inner.graph.nodes:
                if item.op != "call_function" or not is_mutating(item.target):
                    continue
                source = base_of(item)
                if isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr"):
                    raise self._error(item, f"changes, inside {node.target}, a value from outside of it")

    def _error(self, node: fx.Node, what: str) -> CaptureError:
        return CaptureError(
            f"{node.target} {what}",
            **where(node),
            fix="write that line with operators that return a new tensor",
        )


def _lies_as(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors in one memory are the same part of it."""
    return (one.shape, one.stride(), one.storage_offset()) == (two.shape, two.stride(), two.storage_offset())


def _is_view(source: fx.Node, node: fx.Node) -> bool:
    """Say whether the result of ``node``, whose schema allows it, shares the memory of ``source``."""
    if _name(node.target) not in _PERHAPS_VIEWS:
        return True
    a, b = source.meta["val"], node.meta["val"]
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def same_shape(a: Any, b: Any) -> bool:
    """Compare two shapes without asking a dynamic size for its value, which would add a guard."""
    return len(a) == len(b) and all(_same_size(x, y) for x, y in zip(a, b, strict=True))


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b


def _shows_all(name: str, source: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether a view shows every element of its source once, as it is: reshapes do, however many there are."""
    return source.dtype == value.dtype and (name not in _EXPANDS or _same_size(source.numel(), value.numel()))


def _differentiable(val: torch.Tensor) -> bool:
    return val.is_floating_point() or val.is_complex()


def _left_out(node: fx.Node, counterpart: Any) -> list[Any]:
    """Return the defaults that ``node`` relies on and ``counterpart`` does not have, as ``bernoulli_`` its 0.5."""
    pairs = list(zip(node.target._schema.arguments, counterpart._schema.arguments, strict=False))[len(node.args) :]  # type: ignore[union-attr]
    return [
        mine.default_value
        for mine, other in pairs
        if mine.has_default_value() and not other.has_default_value() and mine.name not in node.kwargs
    ]


def _one_float_dtype(node: fx.Node) -> bool:
    """Say whether all tensors that ``node`` reads are of one floating dtype, so that its result is as well."""
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return len(dtypes) == 1 and next(iter(dtypes)).is_floating_point


def _inverse_permutation(view: fx.Node) -> list[int]:
    """Read a permutation off the shape that it gives to a tensor of distinct sizes, and invert it."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    assert callable(view.target)
    rank = source.meta["val"].dim()
    probe = view.target(torch.empty(tuple(range(2, rank + 2)), device="meta"), *view.args[1:], **view.kwargs)
    order = [size - 2 for size in probe.shape]
    return [order.index(dim) for dim in range(rank)]
