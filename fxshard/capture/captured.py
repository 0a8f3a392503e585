"""A model as a graph, and the way from a call to the graph's leaves and back.

A call is written in one way (``calls.py``) and its leaves are held against what was captured: all that do not fit are
named in one error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxshard.capture.calls import Leaf, canonical_call, in_words, is_declared, is_plain_default, pattern_of
from fxshard.capture.constants import as_declared
from fxshard.capture.guards import broken
from fxshard.capture.reads import Reads
from fxshard.capture.trees import flatten, given_twice, paths, put_back, reorder
from fxshard.capture.writes import Written
from fxshard.errors import InputError
from fxshard.ir.root import Root
from fxshard.runtime.autocast import State
from fxshard.torch_internals import pytree

__all__ = ["Captured", "Excluded"]


class Excluded(InputError):
    """Dynamic sizes that what was captured does not serve, though a capture of these very sizes would."""


@dataclass(frozen=True)
class Captured:
    """A model as a flat graph, and the way from a call to the graph's leaves and back.

    Attributes:
        root: the graph, and what it reads: ``root(*leaves)`` returns a tuple of leaves.
        in_spec: the tree of ``((args...), {kwargs...})`` in canonical order: by keyword wherever possible.
        out_spec: the tree of what the model returns.
        placeholders: the placeholders' names, one for each input leaf, in order.
        aliases: every other name of a tied parameter or buffer -> the name used in the graph.
        training: the model's mode at capture.
        constants: index of an input leaf that is not a tensor -> its value at capture.
        example_inputs: what is known of each input leaf.
        ranges: symbol of a dynamic size -> its (smallest, largest) value.
        free_sizes: the symbols whose range is the model's, and not one that was asked for.
        guards: what else the model's own branches assumed of dynamic sizes; where one is false the graph does not hold.
        output_constants: index of an output leaf that a graph cannot hold -> its value.
        non_persistent: names of buffers that are not part of the state dict.
        signature: the signature of the model's ``forward``.
        autocast: the autocast that surrounded the capture; the graph computes what the model does under the same.
        reads: what of the model's Python the capture depends on.
        written: what forward assigns to attributes of the model's modules.
        changes_inputs: whether forward changes what the containers hold that it is given; then the outputs' tree is
            the pair of what the model returns, and of the arguments as they are behind it.
        asks_grad: whether the model's code asks whether gradients are enabled; of a result, ``requires_grad`` tells.
        asks_needs: whether it asks what requires one.
        asks_layout: whether it asks how tensors lie in memory.
        pattern: which of the input leaves are one tensor (``calls.pattern_of``), where the model's code may ask.
    """

    root: Root
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    placeholders: tuple[str, ...]
    aliases: Mapping[str, str]
    training: bool
    constants: Mapping[int, Any]
    example_inputs: tuple[Leaf, ...]
    ranges: Mapping[Any, tuple[float, float]] = field(default_factory=dict)
    free_sizes: frozenset[Any] = frozenset()
    guards: tuple[Any, ...] = ()
    output_constants: Mapping[int, Any] = field(default_factory=dict)
    non_persistent: frozenset[str] = frozenset()
    signature: inspect.Signature = field(default_factory=inspect.Signature)
    autocast: State = ()
    reads: Reads = field(default_factory=Reads)
    written: tuple[Written, ...] = ()
    changes_inputs: bool = False
    asks_grad: bool = False
    asks_needs: bool = False
    asks_layout: bool = False
    pattern: tuple[int, ...] | None = None

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the leaves of a call in the order of the placeholders.

        Raises:
            InputError: the call does not fit what was captured.
        """
        tree = canonical_call(self.signature, args, kwargs)
        leaves, spec = flatten(tree)
        if spec != self.in_spec:
            leaves, spec = flatten(reorder(tree, self.in_spec))
        if spec != self.in_spec:
            raise structure_error(self, tree)
        if self.changes_inputs and (twice := given_twice(tree)):
            raise InputError(
                f"the model changes what it is given, and {twice}: the program would change each by itself",
                fix="give each place an object of its own",
            )
        leaves = [as_declared(leaf, self.constants.get(i)) for i, leaf in enumerate(leaves)]
        check_leaves(self, leaves)
        return leaves

    def unflatten_outputs(self, leaves: Any, call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None) -> Any:
        """Return ``leaves``, a result of the graph, as the type that the model returns.

        Args:
            leaves: what the graph returned.
            call: the arguments, whose containers are changed as the model changes them.
        """
        leaves = list(leaves)
        for index, value in self.output_constants.items():
            leaves[index] = value
        if self.out_spec.is_leaf():
            return leaves[0]
        made = pytree.tree_unflatten(leaves, self.out_spec)
        if not self.changes_inputs:
            return made
        out, after = made
        if call is not None:
            put_back(canonical_call(self.signature, *call), after)
        return out


def check_leaves(captured: Captured, leaves: list[Any]) -> None:
    """Compare each leaf with what was captured; all that do not fit are named in one error."""
    sizes = _Sizes(captured.ranges, captured.free_sizes)
    derived: list[tuple[Leaf, Any, int, str]] = []
    problems = []
    others = False  # values of a declared constant that were not captured yet, nor the sizes that go with them
    for index, (leaf, info) in enumerate(zip(leaves, captured.example_inputs, strict=True)):
        if info.shape is not None:
            problem = _check_tensor(leaf, info, sizes, derived)
        elif info.symbol is not None:
            problem = sizes.check(leaf, info.symbol)
        else:
            problem = _check_constant(leaf, captured.constants[index])
            others |= bool(problem) and is_declared(leaf)
        if problem:
            problems.append(f"{info.path}: {problem}")
    for info, expr, size, where in derived:
        expected = expr.subs(sizes.known)
        if expected.is_Integer and int(expected) != size:
            problems.append(f"{info.path}: {where} is {size}, expected {expr} = {expected}")
    if problems:
        raise (Excluded if others or len(problems) == sizes.excluded else InputError)(
            "the inputs do not fit what was captured: " + "; ".join(problems),
            fix="give inputs of the captured shapes, capture again with these, or name the dims that vary in "
            "dynamic_shapes, in a range that has these sizes",
        )
    if captured.pattern is not None and pattern_of(leaves) != captured.pattern:
        raise Excluded(
            "the inputs do not fit what was captured: which of them are one tensor differs",
            fix="clone what is given twice, or capture again with these",
        )
    if problems := broken(captured.guards, sizes.known, _places(captured)):
        raise Excluded(
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
    sizes: _Sizes,
    derived: list[tuple[Leaf, Any, int, str]],
) -> str:
    expected = in_words(info.dtype, info.shape)
    if not isinstance(leaf, torch.Tensor):
        return f"expected {expected}, got {leaf!r}"
    assert info.shape is not None
    if leaf.dtype != info.dtype or leaf.dim() != len(info.shape):
        return f"expected {expected}, got {in_words(leaf.dtype, leaf.shape)}"
    for dim, (size, want) in enumerate(zip(leaf.shape, info.shape, strict=True)):
        if isinstance(want, int):
            if size != want:
                return f"expected {expected}, got {in_words(leaf.dtype, leaf.shape)} (dim {dim})"
        elif want.is_Symbol:
            if problem := sizes.check(size, want):
                return f"dim {dim} {problem}"
        else:
            derived.append((info, want, size, f"dim {dim}"))
    return ""


class _Sizes:
    """The dynamic sizes of a call, as they are met.

    Attributes:
        known: symbol -> its value in the call.
        excluded: how many were outside of a range that nobody asked for: the model made it.
    """

    def __init__(self, ranges: Mapping[Any, tuple[float, float]], free: Container[Any]) -> None:
        self.known: dict[Any, int] = {}
        self.excluded = 0
        self._ranges, self._free = ranges, free

    def check(self, size: Any, symbol: Any) -> str:
        """What is wrong with a size; empty where nothing is."""
        low, high = self._ranges.get(symbol, (0, math.inf))
        if not low <= size <= high:
            self.excluded += symbol in self._free
            return f"is {size}, outside of its range {low} to {high}"
        if self.known.setdefault(symbol, size) != size:
            return f"is {size}, but the same dynamic size {symbol} is {self.known[symbol]} in another input"
        return ""


def _check_constant(leaf: Any, value: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"expected the constant {value!r}, got {in_words(leaf.dtype, leaf.shape)}"
    same = type(leaf) is type(value) and (leaf == value or (leaf != leaf and value != value))
    return "" if same else f"was {value!r} at capture, which the graph holds as a constant; got {leaf!r}"


def structure_error(captured: Captured, tree: Any) -> InputError:
    """Return the error for a call whose tree is another than the captured one."""
    given, known = paths(tree), [info.path for info in captured.example_inputs]
    missing = [path for path in known if path not in given]
    extra = [path for path in given if path not in known]
    parameters = captured.signature.parameters
    left_out = [path for path in extra if path in parameters and is_plain_default(parameters[path])]
    extra = [path for path in extra if path not in left_out]
    parts = [f"{path} was {parameters[path].default!r} at capture, its default" for path in left_out]
    parts += [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
    return InputError(
        "the inputs have another structure than what was captured: " + ("; ".join(parts) or "other container types"),
        fix=f"pass exactly {', '.join(map(str, captured.example_inputs))}, or capture again with these inputs",
    )
