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

import copy
import inspect
import threading
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.graph import CodeGen

from fxshard.capture.branches import with_branches
from fxshard.capture.calls import (
    bounds_of,
    canonical_call,
    free_of,
    leaf_of,
    named_dynamic_shapes,
    pattern_of,
)
from fxshard.capture.captured import Captured
from fxshard.capture.decisions import Decisions
from fxshard.capture.export import Outputs, export, fits_graph, has_meta, quiet
from fxshard.capture.guards import guards_of
from fxshard.capture.host_random import replaced_draws
from fxshard.capture.queries import in_inference_mode
from fxshard.capture.reads import Reads, reading
from fxshard.capture.traces import Trace, check_drawn
from fxshard.capture.trees import flatten, paths
from fxshard.capture.vmaps import unmap
from fxshard.capture.writes import check_lost
from fxshard.errors import CaptureError, InputError
from fxshard.ir.origins import SOURCE_META, where
from fxshard.ir.root import Root
from fxshard.rules.effects import is_mutating
from fxshard.runtime.autocast import ambient
from fxshard.runtime.module import find, joined, place
from fxshard.torch_internals import is_vmapped

__all__ = ["capture", "number_constants", "signature_key"]

_COPY = torch.ops.aten.copy_.default
# Only these reach a reader of the graph; export's own provenance records would double its size.
_KEPT_META = ("val", *SOURCE_META)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    device: torch.device | None = None,
) -> Captured:
    """Capture ``model`` as it computes on these inputs, in its present training mode.

    Args:
        model: any module; it is not changed.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: sizes that may differ at run time, as ``torch.export.export`` takes them.
        device: where the program will run. Under autocast the model is captured as if it were there: what autocast
            does depends on the device, and on meta it does nothing.

    Raises:
        CaptureError: the model cannot be exported, or its export would not compute what the model computes.
        InputError: the inputs do not fit the model's ``forward``.

    Example:
        >>> captured = capture(nn.Linear(3, 2), (torch.ones(4, 3),))
        >>> [str(node.target) for node in captured.root.graph.nodes]
        ['input', 'weight', 'bias', 'aten.linear.default', 'output']
    """
    with LOCK:
        return _capture(model, args, kwargs or {}, dynamic_shapes, device)


LOCK = threading.RLock()
"""``torch.export`` is not made for several threads, and modules are changed while a model is captured."""


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    device: torch.device | None,
) -> Captured:
    signature = inspect.signature(model.forward)
    tree = canonical_call(signature, args, kwargs)
    leaves, in_spec = flatten(tree)
    shapes = named_dynamic_shapes(dynamic_shapes, signature, args, kwargs, tree)
    place, with_grad = _seen_on(model, device), torch.is_grad_enabled() and not in_inference_mode()
    exporter = _Exporter(model, tree, shapes, place)
    try:
        with reading() as noted:
            exported = exporter.run()
        reads = noted.of(model)
    except CaptureError as error:
        if "Unsupported input type" in error.what:
            raise _unknown_input(tree, leaves, error) from None
        if "HigherOrderOp" not in error.what:
            raise
        exported = exporter.run()  # torch.cond and its like do not run where attributes are watched
        reads = Reads.all_of(model)
    words = reads.named(model).words
    asked = exported.outputs.questions
    asks_needs = asked.needs or not words.isdisjoint(("requires_grad", "grad_fn", "is_leaf"))
    asks_grad = asks_needs or asked.grad
    if "is_inference" in words and (in_inference_mode() or any(map(_is_inference, leaves))):
        raise CaptureError(
            "the model asks which tensors are of inference mode, in which none is traced",
            fix="call the program under torch.no_grad()",
        )
    asks_grad = asks_grad or not words.isdisjoint(("is_grad_enabled", "is_inference_mode_enabled", "is_inference"))
    if asks_grad and not with_grad:
        exported = exporter.run(grad=False)
    outputs, program, root = exported.outputs, exported.program, exported.trace.root
    check_lost(outputs.written, reads)
    guards = guards_of(program)
    if has_meta(model):
        _replace_meta_device(root, leaves)
    ranges = {symbol: bounds_of(span) for symbol, span in program.range_constraints.items()}
    values = [node.meta.get("val") for node in root.graph.find_nodes(op="placeholder")]
    info = tuple(leaf_of(path, leaf, value) for path, leaf, value in zip(paths(tree), leaves, values, strict=True))
    return Captured(
        root=root,
        in_spec=in_spec,
        out_spec=outputs.spec or program.call_spec.out_spec,  # of a GraphModule, export calls no hooks
        placeholders=exported.placeholders,
        aliases=exported.aliases,
        training=model.training,
        constants={i: leaf for i, leaf in enumerate(leaves) if info[i].shape is None and info[i].symbol is None},
        example_inputs=info,
        ranges=ranges,
        free_sizes=free_of(ranges, shapes),
        guards=guards,
        output_constants={i: value for i, value in outputs.constants.items() if not fits_graph(value)},
        non_persistent=_non_persistent(model),
        signature=signature,
        autocast=ambient(),
        reads=replace(reads, asked=tuple(asked.tensors.values())),
        written=outputs.written,
        changes_inputs=outputs.changes_inputs,
        asks_grad=asks_grad,
        asks_needs=outputs.asks_needs or asks_needs,
        asks_layout=asked.layout,
        pattern=pattern_of(leaves) if reads.ran.compares_identity else None,
    )


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_inference()


def _unknown_input(tree: Any, leaves: Sequence[Any], error: CaptureError) -> InputError:
    """The error for an argument that is neither a tensor, nor a plain value, nor a container of such."""
    given = zip(paths(tree), leaves, strict=True)
    path, leaf = next(((path, leaf) for path, leaf in given if str(type(leaf)) in error.what), ("an argument", None))
    return InputError(
        f"{path} is a {type(leaf).__qualname__}, of which a graph knows nothing",
        fix="give tensors, numbers, strings, and lists, tuples, dicts or dataclasses of them (torch.from_numpy, list); "
        "a class of your own is one after torch.utils._pytree.register_pytree_node, or as a dataclass",
    )


@dataclass
class _Exported:
    """One export of a model."""

    trace: Trace
    outputs: Outputs
    program: torch.export.ExportedProgram
    placeholders: tuple[str, ...]
    aliases: dict[str, str]


class _Exporter:
    """Exports a model, as often as there are ways through it."""

    def __init__(self, model: nn.Module, tree: Any, shapes: Any, device: torch.device | None) -> None:
        self.model, self.tree, self.shapes, self.device = model, tree, shapes, device

    def run(self, grad: bool = True) -> _Exported:
        """The model with all its ways; ``grad``: whether gradients are enabled, for a model that asks."""
        made: list[_Exported] = []

        def trace(decisions: Decisions) -> Trace:
            made.append(self._export(decisions, grad))
            if len(made) == 1:
                self._check_draws(made[0], decisions.answers, grad)
            return made[-1].trace

        base = with_branches(trace)
        return next(each for each in made if each.trace is base)

    def _check_draws(self, made: _Exported, answers: Mapping[int, bool], grad: bool) -> None:
        """Raises where a number that is drawn outside of torch decides what is computed."""
        for high in (False, True) if made.outputs.drew else ():
            with replaced_draws(high):
                check_drawn(made.trace, self._export(Decisions(answers), grad).trace, made.outputs.drew)

    def _export(self, decisions: Decisions, grad: bool) -> _Exported:
        outputs = Outputs()
        program = export(self.model, self.tree, self.shapes, outputs, self.device, grad, decisions)
        root, placeholders, aliases = _flat_graph(self.model, program, outputs)
        same = outputs.spec, outputs.constants, outputs.changes_inputs, outputs.written
        return _Exported(Trace(root, decisions.count, same), outputs, program, placeholders, aliases)


def _seen_on(model: nn.Module, device: torch.device | None) -> torch.device | None:
    """The device on which export is to see the model; None where it is."""
    kinds = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if device is not None and ambient() and kinds - {device.type}:
        return device
    return torch.device("meta") if "meta" in kinds else None


def number_constants(captured: Captured, number: int, names: Container[str]) -> None:
    """Name the constants that export lifted out of the code after the capture, of several captures of one model.

    Args:
        captured: it is changed.
        number: of the capture.
        names: those of the model's own tensors, which stay.
    """
    root = captured.root
    for node in root.graph.find_nodes(op="get_attr"):
        if node.target not in names:
            value = find(root, node.target)
            node.target = f"{node.target}_{number}"
            place(root, node.target, value, persistent=False)


def signature_key(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Return a key that is equal for two calls exactly when one capture serves both.

    It holds the tree of the inputs, each tensor's shape and dtype, each other leaf, the training mode of every
    submodule, and the autocast that surrounds the call.
    """
    tree = canonical_call(inspect.signature(model.forward), args, kwargs)
    leaves, spec = flatten(tree)
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), _hashable(leaf))
        for leaf in leaves
    )
    return repr(spec), described, tuple(module.training for module in model.modules()), ambient()


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value  # type: ignore[no-any-return]


def _flat_graph(
    model: nn.Module, program: torch.export.ExportedProgram, outputs: Outputs
) -> tuple[Root, tuple[str, ...], dict[str, str]]:
    """Turn export's program into a flat graph over the original parameters, each under one name."""
    names, aliases = tensors_of(model)
    graph, held = _unlifted(program)
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
            attributes[target] = names[target] if target in names else held(node.target)
            node.target = target
        elif node.op == "output":
            node.args = (outputs.merge(node.args[0]),)
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        if is_vmapped(node.meta.get("val")):
            raise CaptureError(
                "the model calls torch.vmap, and export records its values without the mapped dims",
                **where(node),
                fix="write the mapped dims out with broadcasting",
            )
    for name in outputs.assigned:
        _keep_read(graph, first[aliases.get(name, name)])
    placeholders = graph.find_nodes(op="placeholder")
    for node in reversed(placeholders):
        next(iter(graph.nodes)).prepend(node)
    return root_over(model, attributes, graph), tuple(node.name for node in placeholders), aliases


def _keep_read(graph: fx.Graph, buffer: fx.Node) -> None:
    """Let others read a copy of a buffer that is assigned: a backward pass may need what it held before."""
    if not buffer.meta["val"].is_floating_point():
        return
    readers = [user for user in buffer.users if not (user.target is _COPY and user.args[0] is buffer)]
    if not readers or any(is_mutating(user.target) for user in readers):  # of what it is by then
        return
    with graph.inserting_after(buffer):
        copied = graph.call_function(torch.ops.aten.clone.default, (buffer,))
    copied.meta = {key: buffer.meta[key] for key in _KEPT_META if key in buffer.meta}
    for reader in readers:
        reader.replace_input_with(buffer, copied)


def _unlifted(program: torch.export.ExportedProgram) -> tuple[fx.Graph, Callable[[str], Any]]:
    """Export's graph, reading the model's tensors by their names, where export has inputs; and what gives them.

    ``ExportedProgram.module()`` does the same, and generates Python code in which the names stand.
    """
    graph = copy.deepcopy(program.graph)
    graph.set_codegen(CodeGen())
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)
    outputs = [spec.kind for spec in program.graph_signature.output_specs]
    assert set(outputs) <= {OutputKind.USER_OUTPUT}, "the training form of export changes tensors in place"
    given = graph.find_nodes(op="placeholder")
    for node, spec in zip(given, program.graph_signature.input_specs, strict=True):
        if spec.kind in kinds:
            with graph.inserting_after(node):
                read = graph.create_node("get_attr", spec.target, name=spec.target.replace(".", "_"))
            read.meta = node.meta
            node.replace_all_uses_with(read)
            graph.erase_node(node)
    held = {**program.constants, **program.state_dict}

    def find_held(name: str) -> Any:
        return held[name] if name in held else find(program.graph_module, name)

    return graph, find_held


def root_over(model: nn.Module, attributes: dict[str, Any], graph: fx.Graph) -> Root:
    """A captured graph with what it reads: ``attributes``, under the names that it reads them by."""
    return Root(graph, attributes, type(model).__name__, _non_persistent(model))


def tensors_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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


def _non_persistent(model: nn.Module) -> frozenset[str]:
    return frozenset(
        joined(prefix, name) for prefix, module in model.named_modules() for name in module._non_persistent_buffers_set
    )


def _replace_meta_device(root: Root, leaves: list[Any]) -> None:
    """Where a meta model was captured with real inputs, tensors made in the graph go to the inputs' device."""
    real = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta), None)
    if real is None:
        return
    meta = torch.device("meta")
    nested = [module for module in root.modules() if isinstance(module, fx.GraphModule)]
    for graph in (root.graph, *(module.graph for module in nested)):
        for node in graph.nodes:
            node.args = tuple(real if arg == meta else arg for arg in node.args)
            if "device" in node.kwargs and node.kwargs["device"] == meta:
                node.kwargs = {**node.kwargs, "device": real}
    for module in nested:
        module.recompile()
