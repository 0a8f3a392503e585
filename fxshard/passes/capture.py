"""Capture an unmodified module as a flat graph of ATen operators.

In: any ``nn.Module`` (on a real device or on ``meta``, or a ``GraphModule`` that the user traced) and example inputs.
Out: :class:`Captured`: a graph whose placeholders are the leaves of the inputs, whose ``get_attr`` nodes carry the
original parameter names, and whose output is a flat tuple of leaves; with what is needed to go from a call to
leaves and back.

    def forward(self, x):                     x = placeholder
        return {"y": self.up(x)}     ->       up_weight, up_bias = get_attr "up.weight", get_attr "up.bias"
                                              linear = aten.linear(x, up_weight, up_bias)
                                              return (linear,)

The export is ``torch.export`` in its training form, non-strict, once for each signature and training mode: operators
that mutate stay, regions without gradient stay, nothing is decomposed (decompositions would lose both).

Reference: PyTorch 2, https://dl.acm.org/doi/10.1145/3620665.3640366 (section 3, on graph capture).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import random
import re
import sys
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.autograd.function import _SingleLevelFunction
from torch.export import _trace as exporter
from torch.fx.graph import CodeGen

from fxshard.errors import CaptureError, FxshardError, InputError
from fxshard.passes.functions import call_whole
from fxshard.passes.guards import broken, guards_of
from fxshard.passes.vmaps import unmap
from fxshard.runtime.autocast import State, ambient
from fxshard.torch_internals import REGION_PASSES, is_vmapped, pytree

__all__ = ["Captured", "Leaf", "capture", "module_of", "quiet", "signature_key", "source_of"]

_TORCH_DIR = str(Path(torch.__file__).parent)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_GRAPH_CONSTANTS = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout)
# Only these reach a reader of the graph; export's own provenance records would double its size.
_KEPT_META = ("val", "nn_module_stack", "stack_trace", "torch_fn", "custom")
# torch's own machinery for wrapping operators: what it wraps is recorded whole, with its gradient.
_HARMLESS_FUNCTIONS = ("torch._higher_order_ops", "torch._functorch", "torch._dynamo", "torch._library", "torch._C")
_NOISY_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._functorch", "torch._subclasses")


@dataclass(frozen=True)
class Leaf:
    """One leaf of the inputs, as it was at capture.

    Attributes:
        path: where it is in the call, e.g. ``input_ids`` or ``batch['x']``.
        shape: sizes; a dynamic dim is a sympy expression. ``None`` for what is not a tensor.
        dtype: ``None`` for what is not a tensor.
        requires_grad: whether the example required a gradient.
        symbol: the sympy expression of a dynamic number, else ``None``.
    """

    path: str
    shape: tuple[Any, ...] | None = None
    dtype: torch.dtype | None = None
    requires_grad: bool = False
    symbol: Any = None

    def __str__(self) -> str:
        return f"{self.path}: {_describe(self.dtype, self.shape)}" if self.shape is not None else self.path


@dataclass(frozen=True)
class Captured:
    """A model as a flat graph, and the way from a call to the graph's leaves and back.

    Attributes:
        graph_module: ``graph_module(*leaves)`` returns a tuple of leaves.
        in_spec: the tree of ``((args...), {kwargs...})`` in canonical order: by keyword wherever possible.
        out_spec: the tree of what the model returns.
        placeholders: the placeholders' names, one for each input leaf, in order.
        aliases: every other name of a tied parameter or buffer -> the name used in the graph.
        training: the model's mode at capture.
        constants: index of an input leaf that is not a tensor -> its value at capture.
        example_inputs: what is known of each input leaf.
        ranges: symbol of a dynamic size -> its (smallest, largest) value.
        guards: what else the model's own branches assumed of dynamic sizes; where one is false the graph does not hold.
        output_constants: index of an output leaf that a graph cannot hold -> its value.
        non_persistent: names of buffers that are not part of the state dict.
        signature: the signature of the model's ``forward``.
        autocast: the autocast that surrounded the capture; the graph computes what the model does under the same.
    """

    graph_module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    placeholders: tuple[str, ...]
    aliases: Mapping[str, str]
    training: bool
    constants: Mapping[int, Any]
    example_inputs: tuple[Leaf, ...]
    ranges: Mapping[Any, tuple[float, float]] = field(default_factory=dict)
    guards: tuple[Any, ...] = ()
    output_constants: Mapping[int, Any] = field(default_factory=dict)
    non_persistent: frozenset[str] = frozenset()
    signature: inspect.Signature = field(default_factory=inspect.Signature)
    autocast: State = ()

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the leaves of a call in the order of the placeholders.

        Raises:
            InputError: the call does not fit what was captured.
        """
        tree = _canonical_call(self.signature, args, kwargs)
        leaves, spec = _flatten(tree)
        if spec != self.in_spec:
            leaves, spec = _flatten(_reorder(tree, self.in_spec))
        if spec != self.in_spec:
            raise _structure_error(self, tree)
        _check_leaves(self, leaves)
        return leaves

    def unflatten_outputs(self, leaves: Any) -> Any:
        """Return ``leaves``, a result of the graph, as the type that the model returns."""
        leaves = list(leaves)
        for index, value in self.output_constants.items():
            leaves[index] = value
        return pytree.tree_unflatten(leaves, self.out_spec)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Captured:
    """Capture ``model`` as it computes on these inputs, in its present training mode.

    Args:
        model: any module; it is not changed.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: sizes that may differ at run time, as ``torch.export.export`` takes them.

    Raises:
        CaptureError: the model cannot be exported, or its export would not compute what the model computes.
        InputError: the inputs do not fit the model's ``forward``.

    Example:
        >>> captured = capture(nn.Linear(3, 2), (torch.ones(4, 3),))
        >>> [str(node.target) for node in captured.graph_module.graph.nodes]
        ['input', 'weight', 'bias', 'aten.linear.default', 'output']
    """
    signature = inspect.signature(model.forward)
    tree = _canonical_call(signature, args, kwargs or {})
    leaves, in_spec = _flatten(tree)
    shapes = _named_dynamic_shapes(dynamic_shapes, signature, args, kwargs or {}, tree)
    outputs = _Outputs()
    program = _export(model, tree, shapes, outputs)
    guards = guards_of(program)
    graph_module, placeholders, aliases = _flat_graph(model, program, outputs)
    if _has_meta(model):
        _replace_meta_device(graph_module, leaves)
    values = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
    info = tuple(_leaf(path, leaf, value) for path, leaf, value in zip(_paths(tree), leaves, values, strict=True))
    return Captured(
        graph_module=graph_module,
        in_spec=in_spec,
        out_spec=outputs.spec or program.call_spec.out_spec,  # of a GraphModule, export calls no hooks
        placeholders=placeholders,
        aliases=aliases,
        training=model.training,
        constants={i: leaf for i, leaf in enumerate(leaves) if info[i].shape is None and info[i].symbol is None},
        example_inputs=info,
        ranges={symbol: _bounds(span) for symbol, span in program.range_constraints.items()},
        guards=guards,
        output_constants={i: value for i, value in outputs.constants.items() if not _fits_graph(value)},
        non_persistent=_non_persistent(model),
        signature=signature,
        autocast=ambient(),
    )


def signature_key(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Return a key that is equal for two calls exactly when one capture serves both.

    It holds the tree of the inputs, each tensor's shape and dtype, each other leaf, the training mode of every
    submodule, and the autocast that surrounds the call.
    """
    tree = _canonical_call(inspect.signature(model.forward), args, kwargs)
    leaves, spec = _flatten(tree)
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), _hashable(leaf))
        for leaf in leaves
    )
    return repr(spec), described, tuple(module.training for module in model.modules()), ambient()


def module_of(node: fx.Node) -> str:
    """Return the dotted path of the module that ``node`` comes from; ``""`` for the root or where it is unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _clean_path(next(reversed(stack.values()))[0])


def source_of(node: fx.Node) -> str:
    """Return the user's line that ``node`` comes from, e.g. ``model.py:6 in forward``; ``""`` where it is unknown."""
    trace = node.meta.get("stack_trace")
    return _innermost_line(trace) if trace else ""


@functools.lru_cache(maxsize=65536)
def _clean_path(path: str) -> str:
    path = re.sub(r"^L\['self'\]\.?|^L__self__[._]?|@\d+", "", path)
    return re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]", lambda m: f".{m[1] or m[2]}", path).strip(".")


@functools.lru_cache(maxsize=65536)
def _innermost_line(trace: str) -> str:
    best = ""
    for file, line, function in re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace):
        if not file.startswith(_TORCH_DIR) and not file.startswith("<"):
            best = f"{file.rsplit('/', 1)[-1]}:{line} in {function}"
    return best


# --- inputs ----------------------------------------------------------------------------------------------------------


def _canonical_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Write a call in the one way in which captures are compared: by keyword, in the order of the signature."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit the model's forward: {error}",
            fix=f"call it as forward{signature}",
        ) from None
    parameters = signature.parameters
    kinds = inspect.Parameter
    starred = any(parameters[name].kind is kinds.VAR_POSITIONAL for name in bound.arguments)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = parameters[name].kind
        if kind is kinds.VAR_POSITIONAL:
            positional.extend(value)
        elif kind is kinds.VAR_KEYWORD:
            named.update(sorted(value.items()))
        elif kind is kinds.POSITIONAL_ONLY or (starred and kind is kinds.POSITIONAL_OR_KEYWORD):
            positional.append(value)
        elif not (value is None and parameters[name].default is None):
            named[name] = value
    return tuple(positional), named


def _named_dynamic_shapes(
    shapes: Any,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tree: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """Name the entries of ``dynamic_shapes`` as the canonical call does; entries that are left out are static."""
    if isinstance(shapes, list | tuple):
        names = list(signature.bind(*args, **kwargs).arguments)
        shapes = dict(zip(names, shapes, strict=False)) if len(shapes) == len(names) else shapes
    if not isinstance(shapes, dict):
        return shapes
    present = list(signature.bind(*tree[0], **tree[1]).arguments)
    starred = {name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD}
    flat = {name: shapes.get(name) for name in present if name not in starred}
    flat |= {name: shapes.get(name) for name in tree[1] if name not in flat}
    for name in starred & shapes.keys():
        flat |= shapes[name] or {}
    return flat | {name: entry for name, entry in shapes.items() if name not in flat | dict.fromkeys(starred) and entry}


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten ``tree``, and teach pytree the dataclasses and caches that it meets on the way."""
    leaves, spec = pytree.tree_flatten(tree)
    while any(_register(type(leaf)) for leaf in leaves):
        leaves, spec = pytree.tree_flatten(tree)
    return leaves, spec


def _reorder(tree: Any, spec: pytree.TreeSpec) -> Any:
    """Put the keys of every dict of ``tree`` in the order of ``spec``, where they are the same keys."""
    children = spec.children()
    if spec.type is dict and type(tree) is dict and set(spec.context) == tree.keys():
        return {key: _reorder(tree[key], child) for key, child in zip(spec.context, children, strict=True)}
    if spec.type in (list, tuple) and type(tree) is spec.type and len(tree) == len(children):
        return spec.type(_reorder(item, child) for item, child in zip(tree, children, strict=True))
    return tree


def _paths(tree: Any) -> list[str]:
    """Name each leaf as a user writes it: ``input_ids``, ``batch['x']``, ``args[0]``."""
    names = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        key = path[1]
        head = str(key.key) if isinstance(key, pytree.MappingKey) else f"args{pytree.keystr((key,))}"
        names.append(head + pytree.keystr(path[2:]))
    return names


def _leaf(path: str, leaf: Any, value: Any) -> Leaf:
    if isinstance(leaf, torch.Tensor):
        shape = tuple(_expr(size) for size in (leaf if value is None else value).shape)
        return Leaf(path, shape, leaf.dtype, leaf.requires_grad)
    return Leaf(path, symbol=value.node.expr if isinstance(value, _SYMBOLIC) else None)


def _expr(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def _bounds(span: Any) -> tuple[float, float]:
    def number(value: Any) -> float:
        return int(value) if value.is_Integer else math.inf

    return number(span.lower), number(span.upper)


def _describe(dtype: torch.dtype | None, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value  # type: ignore[no-any-return]


def _check_leaves(captured: Captured, leaves: list[Any]) -> None:
    """Compare each leaf with what was captured; all that do not fit are named in one error."""
    sizes: dict[Any, int] = {}
    derived: list[tuple[Leaf, Any, int, str]] = []
    problems = []
    for index, (leaf, info) in enumerate(zip(leaves, captured.example_inputs, strict=True)):
        if info.shape is not None:
            problem = _check_tensor(leaf, info, sizes, derived, captured.ranges)
        elif info.symbol is not None:
            problem = _check_size(leaf, info.symbol, sizes, captured.ranges)
        else:
            problem = _check_constant(leaf, captured.constants[index])
        if problem:
            problems.append(f"{info.path}: {problem}")
    for info, expr, size, where in derived:
        expected = expr.subs(sizes)
        if expected.is_Integer and int(expected) != size:
            problems.append(f"{info.path}: {where} is {size}, expected {expr} = {expected}")
    if problems:
        raise InputError(
            "the inputs do not fit what was captured: " + "; ".join(problems),
            fix="give inputs of the captured shapes, capture again with these, or name the dims that vary in "
            "dynamic_shapes, in a range that has these sizes",
        )
    if problems := broken(captured.guards, sizes, _places(captured)):
        raise InputError(
            "the inputs do not fit what was captured: " + "; ".join(problems),
            fix="the model branches on that size: give sizes that take the captured branch, or make another program, "
            "from an example that takes this one",
        )


def _places(captured: Captured) -> dict[Any, tuple[str, int]]:
    """The first input and dim that each dynamic size is of."""
    found: dict[Any, tuple[str, int]] = {}
    for info in captured.example_inputs:
        for dim, size in enumerate(info.shape or ()):
            if getattr(size, "is_Symbol", False):
                found.setdefault(size, (info.path, dim))
    return found


def _check_tensor(
    leaf: Any,
    info: Leaf,
    sizes: dict[Any, int],
    derived: list[tuple[Leaf, Any, int, str]],
    ranges: Mapping[Any, tuple[float, float]],
) -> str:
    expected = _describe(info.dtype, info.shape)
    if not isinstance(leaf, torch.Tensor):
        return f"expected {expected}, got {leaf!r}"
    assert info.shape is not None
    if leaf.dtype != info.dtype or leaf.dim() != len(info.shape):
        return f"expected {expected}, got {_describe(leaf.dtype, leaf.shape)}"
    for dim, (size, want) in enumerate(zip(leaf.shape, info.shape, strict=True)):
        if isinstance(want, int):
            if size != want:
                return f"expected {expected}, got {_describe(leaf.dtype, leaf.shape)} (dim {dim})"
        elif want.is_Symbol:
            if problem := _check_size(size, want, sizes, ranges):
                return f"dim {dim} {problem}"
        else:
            derived.append((info, want, size, f"dim {dim}"))
    return ""


def _check_size(size: Any, symbol: Any, sizes: dict[Any, int], ranges: Mapping[Any, tuple[float, float]]) -> str:
    low, high = ranges.get(symbol, (0, math.inf))
    if not low <= size <= high:
        return f"is {size}, outside of its range {low} to {high}"
    if sizes.setdefault(symbol, size) != size:
        return f"is {size}, but the same dynamic size {symbol} is {sizes[symbol]} in another input"
    return ""


def _check_constant(leaf: Any, value: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"expected the constant {value!r}, got {_describe(leaf.dtype, leaf.shape)}"
    same = type(leaf) is type(value) and (leaf == value or (leaf != leaf and value != value))
    return "" if same else f"was {value!r} at capture, which the graph holds as a constant; got {leaf!r}"


def _structure_error(captured: Captured, tree: Any) -> InputError:
    given, known = _paths(tree), [info.path for info in captured.example_inputs]
    missing = [path for path in known if path not in given]
    extra = [path for path in given if path not in known]
    parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
    return InputError(
        "the inputs have another structure than what was captured: " + ("; ".join(parts) or "other container types"),
        fix=f"pass exactly {', '.join(map(str, captured.example_inputs))}, or capture again with these inputs",
    )


# --- types that pytree does not know ---------------------------------------------------------------------------------


class _Slot(NamedTuple):
    """The place of a leaf in the remembered state of an object."""

    position: int


class _Plain(NamedTuple):
    """The remembered state of an object: its class, and its attributes with tensors replaced by slots."""

    cls: type
    state: tuple[tuple[str, Any], ...]


def _register(cls: type) -> bool:
    """Register ``cls`` with pytree if it is a dataclass or a cache of transformers; say whether it was."""
    if cls in pytree.SUPPORTED_NODES or issubclass(cls, torch.Tensor):
        return False
    flatten: Callable[[Any], tuple[list[Any], Any]]
    unflatten: Callable[[Any, Any], Any]
    if dataclasses.is_dataclass(cls):
        flatten, unflatten = _flatten_dataclass, functools.partial(_unflatten_dataclass, cls)
    elif any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in cls.__mro__):
        flatten, unflatten = _flatten_object, _unflatten_object
    else:
        return False

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten(value)
        names = context if dataclasses.is_dataclass(cls) else [str(i) for i in range(len(leaves))]
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return True


def _flatten_dataclass(value: Any) -> tuple[list[Any], Any]:
    names = tuple(item.name for item in dataclasses.fields(value) if hasattr(value, item.name))
    return [getattr(value, name) for name in names], names


def _unflatten_dataclass(cls: type, leaves: Any, names: Any) -> Any:
    pairs = dict(zip(names, leaves, strict=True))
    if issubclass(cls, dict):
        return cls(**pairs)
    result = object.__new__(cls)  # __post_init__ ran when the user made it; to run it again may change it
    for name, leaf in pairs.items():
        object.__setattr__(result, name, leaf)
    return result


def _flatten_object(value: Any) -> tuple[list[Any], Any]:
    leaves: list[Any] = []
    return leaves, _template(value, leaves)


def _template(value: Any, leaves: list[Any]) -> Any:
    """Return ``value`` with its tensors moved to ``leaves``; two templates are equal if the rest is."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat):
        leaves.append(value)
        return _Slot(len(leaves) - 1)
    if type(value) in (list, tuple):
        return type(value)(_template(item, leaves) for item in value)
    if type(value) is dict:
        return {key: _template(item, leaves) for key, item in value.items()}
    if type(value).__module__.startswith("transformers.cache_utils"):
        return _Plain(type(value), tuple((name, _template(item, leaves)) for name, item in vars(value).items()))
    return value


def _unflatten_object(leaves: Any, template: Any) -> Any:
    leaves = list(leaves)

    def build(item: Any) -> Any:
        if isinstance(item, _Slot):
            return leaves[item.position]
        if isinstance(item, _Plain):
            result: Any = object.__new__(item.cls)
            vars(result).update((name, build(value)) for name, value in item.state)
            return result
        if type(item) in (list, tuple):
            return type(item)(build(value) for value in item)
        if type(item) is dict:
            return {key: build(value) for key, value in item.items()}
        return item

    return build(template)


# --- the export ------------------------------------------------------------------------------------------------------


class _Outputs:
    """A forward hook that gives export the tensors of an output, and keeps all else for us.

    So an output may be of any type that :func:`_flatten` takes apart, and hold constants of any type.
    """

    def __init__(self) -> None:
        self.spec: pytree.TreeSpec | None = None
        self.constants: dict[int, Any] = {}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> tuple[Any, ...]:
        leaves, self.spec = _flatten(output)
        traced = {i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat)}
        self.constants = {i: leaf for i, leaf in enumerate(leaves) if i not in traced}
        for leaf in self.constants.values():
            if _hides_tensors(leaf):
                raise CaptureError(
                    f"the model returns a {type(leaf).__qualname__}, whose tensors cannot be found",
                    fix="return tensors in tuples, lists, dicts or dataclasses, or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                )
        return tuple(leaves[i] for i in sorted(traced))

    def merge(self, traced: Any) -> tuple[Any, ...]:
        """Put the constants back among the values that export returned."""
        values = iter(traced)
        total = len(self.constants) + len(traced)
        return tuple(self._constant(i) if i in self.constants else next(values) for i in range(total))

    def _constant(self, index: int) -> Any:
        value = self.constants[index]
        return value if _fits_graph(value) else None


def _fits_graph(value: Any) -> bool:
    return type(value) in _GRAPH_CONSTANTS


def _hides_tensors(value: Any) -> bool:
    return any(isinstance(item, torch.Tensor) for item in getattr(value, "__dict__", {}).values())


def _export(model: nn.Module, tree: Any, shapes: Any, outputs: _Outputs) -> torch.export.ExportedProgram:
    """Run torch.export, with every error turned into one of ours, and all global state put back."""
    args, kwargs = _distinct(tree, on_meta=_has_meta(model))
    handle = model.register_forward_hook(outputs)
    drawn = random.getstate()
    try:
        with (
            quiet(),
            _uniform_device(model),
            _whole_functions(model),
            _flat_regions(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except FxshardError as error:
        raise error.with_traceback(None) from None
    except Exception as error:
        raise _capture_error(model, error) from None
    finally:
        handle.remove()
        drew, _ = random.getstate() != drawn, random.setstate(drawn)
    if drew:
        warnings.warn(
            "the model draws from Python's random module; the draw made at capture is frozen into the graph: draw "
            "with torch instead",
            stacklevel=3,
        )
    return program


def _distinct(tree: Any, *, on_meta: bool) -> Any:
    """Make every tensor an object of its own: export takes two inputs that are one tensor for one input."""
    seen: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if on_meta and not tensor.is_meta:
            return _to_meta(tensor)
        if id(tensor) in seen:
            return tensor.detach().requires_grad_(tensor.requires_grad)
        seen.add(id(tensor))
        return tensor

    return pytree.tree_map_only(torch.Tensor, own, tree)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log records of torch's exporter, and the graph that it prints; those of the user pass."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.(export|_export|fx|_dynamo|_functorch|_subclasses|_logging)")
        warnings.filterwarnings("ignore", module=r"(copyreg|contextlib|torch\.utils\._pytree)")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        exporter.print = _print_nothing  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del exporter.print  # type: ignore[attr-defined]
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _print_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``print`` in the exporter's module."""


def _has_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _uniform_device(model: nn.Module) -> Iterator[None]:
    """Of a model that is partly on meta, show export the rest on meta as well: no operator takes a mixture."""
    if not _has_meta(model):
        yield
        return
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and not tensor.is_meta:
                    swapped.append((table, name, tensor))
    stand_ins = {id(tensor): _like(tensor) for _, _, tensor in swapped}
    try:
        for table, name, tensor in swapped:
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _like(tensor: torch.Tensor) -> torch.Tensor:
    meta = _to_meta(tensor)
    return nn.Parameter(meta.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


@contextlib.contextmanager
def _whole_functions(model: nn.Module) -> Iterator[None]:
    """Keep a custom autograd.Function whole where a gradient would go through it: export records its forward only.

    The hook sits below ``Function.apply``, so that a reference to ``apply`` which was taken earlier meets it too.
    """
    inside = [False]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        own = super(_SingleLevelFunction, cls).apply  # type: ignore[misc]
        differentiable = torch.is_grad_enabled() and any(getattr(arg, "requires_grad", False) for arg in args)
        if inside[0] or not differentiable or cls.__module__.startswith(_HARMLESS_FUNCTIONS):
            return own(*args, **kwargs)
        inside[0] = True
        try:
            return call_whole(cls, own, args)
        except CaptureError as error:
            error.module, error.source = _where(model, _live_frames())
            raise
        finally:
            inside[0] = False

    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


@contextlib.contextmanager
def _flat_regions() -> Iterator[None]:
    """Let regions without gradient and of autocast stay what was traced: calls that enter and leave them.

    Export would make each a graph of its own. In doing so it forgets a ``no_grad`` inside of an autocast.
    """
    replaced = [(module, name, getattr(module, name)) for module, name in REGION_PASSES]
    for module, name, _ in replaced:
        setattr(module, name, lambda graph_module, signature: (graph_module, signature))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


# --- errors ----------------------------------------------------------------------------------------------------------

_FIXES = (
    (
        r"data-dependent|GuardOnDataDependent|\.item\(\)|is_nonzero",
        "the forward decides by values inside a tensor: use torch.where or torch.cond, or pass the value as a number",
    ),
    (
        r"[Cc]onstraints? violated|marked .* as dynamic|dynamic_shapes|Detected mismatch",
        "leave that dim out of dynamic_shapes, or change the forward so that it works for every size",
    ),
    (
        r"not a known type|Unsupported input type|pytree",
        "pass and return tensors in tuples, lists, dicts or dataclasses, or register the class with "
        "torch.utils._pytree.register_pytree_node",
    ),
    (r"assigned during export|registered as buffers", "keep that state in a buffer: self.register_buffer(...)"),
)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Say in one readable error why export failed: the cause's first line, the user's line, the module, a fix."""
    frames: list[tuple[types.FrameType, int]] = []
    link: BaseException | None = error
    while link is not None and not frames:
        trace = link.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
        link = link.__cause__ or link.__context__
    module, source = _where(model, reversed(frames))
    text = str(error)
    name = type(error).__name__
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, f"{name}: {text}")), None)
    return CaptureError(
        f"the model cannot be captured: {name}: {_first_lines(text)}",
        module=module,
        source=source,
        fix=fix
        or "check that the model runs on these inputs by itself; if it does, torch.export(strict=False) refuses"
        " what that line does",
    )


def _first_lines(text: str) -> str:
    """Return the first meaningful line, and the first reason that follows a heading."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [re.sub(r" ?For more information, run with TORCH_LOGS.*", "", line) for line in lines] or ["no message"]
    reason = next((line.removeprefix("- ") for line in lines[1:] if line.startswith("- ")), "")
    return f"{lines[0]} {reason}".strip()[:400]


def _live_frames() -> Iterator[tuple[types.FrameType, int]]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _where(model: nn.Module, frames: Any) -> tuple[str, str]:
    """Return the innermost module and the innermost line of the user, given frames from the innermost outwards."""
    names = {id(module): name for name, module in model.named_modules()}
    module = source = ""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if file == __file__ and frame.f_code.co_name == "_export":
            break
        if not source and not file.startswith((_TORCH_DIR, "<")) and file != __file__ and "contextlib" not in file:
            source = f"{file.rsplit('/', 1)[-1]}:{line} in {frame.f_code.co_name}"
        owner = frame.f_locals.get("self")
        if not module and isinstance(owner, nn.Module):
            module = names.get(id(owner), "")
    return module, source


# --- the graph -------------------------------------------------------------------------------------------------------


def _flat_graph(
    model: nn.Module, program: torch.export.ExportedProgram, outputs: _Outputs
) -> tuple[fx.GraphModule, tuple[str, ...], dict[str, str]]:
    """Turn export's program into a flat graph over the original parameters, each under one name."""
    with quiet():
        lifted = program.module(check_guards=False)
    assert isinstance(lifted, fx.GraphModule)
    names, aliases = _canonical_names(model)
    graph = lifted.graph
    graph.set_codegen(CodeGen())
    with quiet():
        unmap(graph)
    first: dict[str, fx.Node] = {}
    attributes: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            target = aliases.get(node.target, node.target)
            if target in first:
                node.replace_all_uses_with(first[target])
                graph.erase_node(node)
                continue
            first[target] = node
            attributes[target] = names[target] if target in names else _attribute(lifted, node.target)
            node.target = target
        elif node.op == "output":
            node.args = (outputs.merge(node.args[0]),)
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        if is_vmapped(node.meta.get("val")):
            raise CaptureError(
                "the model calls torch.vmap, and export records its values without the mapped dims",
                op=str(node.target),
                module=module_of(node),
                source=source_of(node),
                fix="write the mapped dims out with broadcasting",
            )
    placeholders = graph.find_nodes(op="placeholder")
    for node in reversed(placeholders):
        next(iter(graph.nodes)).prepend(node)
    graph_module = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    _mark_non_persistent(graph_module, _non_persistent(model))
    graph_module.train(model.training)
    return graph_module, tuple(node.name for node in placeholders), aliases


def _canonical_names(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by their first name, and every other name with the first it stands for."""
    first: dict[int, str] = {}
    names: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    listings: tuple[Callable[..., Iterator[tuple[str, torch.Tensor]]], ...] = (
        model.named_parameters,
        model.named_buffers,
    )
    for listing in listings:
        for name, tensor in listing(remove_duplicate=False):
            if first.setdefault(id(tensor), name) == name:
                names[name] = tensor
            else:
                aliases[name] = first[id(tensor)]
    return names, aliases


def _attribute(root: nn.Module, target: str) -> Any:
    return functools.reduce(getattr, target.split("."), root)


def _non_persistent(model: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    )


def _mark_non_persistent(graph_module: fx.GraphModule, names: frozenset[str]) -> None:
    for target in names:
        prefix, _, name = target.rpartition(".")
        with contextlib.suppress(AttributeError):
            owner = graph_module.get_submodule(prefix)
            if name in owner._buffers:
                owner._non_persistent_buffers_set.add(name)


def _replace_meta_device(graph_module: fx.GraphModule, leaves: list[Any]) -> None:
    """Where a meta model was captured with real inputs, tensors made in the graph go to the inputs' device."""
    real = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta), None)
    if real is None:
        return
    meta = torch.device("meta")
    nested = [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    for module in nested:
        for node in module.graph.nodes:
            node.args = tuple(real if arg == meta else arg for arg in node.args)
            if "device" in node.kwargs and node.kwargs["device"] == meta:
                node.kwargs = {**node.kwargs, "device": real}
        module.recompile()
