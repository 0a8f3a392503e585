"""Is the sharded program the model? Outputs, and all gradients, against the original on one device.

The reference is the original module itself, run eagerly with the program's weights: nothing of the compiler is in it.
Compared with it is the generated code, as the ranks run it.
Where something differs, the captured graph and every rank's graph are interpreted side by side, and the first node
whose value (or, going backward, whose gradient) differs is named with its module and source line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import fx, nn
from torch.func import functional_call

from fxshard.capture.fidelity import loss_of, other_precision, tolerance_of, weight_of
from fxshard.codegen.spelling import is_ours
from fxshard.ir.info import has_info, info_of
from fxshard.ir.origins import module_of, source_of
from fxshard.ir.root import Interpreter
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placements, Replicate, Varying, cut_all, is_partial, join_all
from fxshard.program import ParallelModule
from fxshard.ranks.devices import RandomState, random_state, set_random_state
from fxshard.ruler import Compared, Row, compare
from fxshard.runtime.autocast import using
from fxshard.runtime.collectives import Axis
from fxshard.runtime.lockstep import Turns, lockstep_axes, run_ranks
from fxshard.runtime.module import find, joined
from fxshard.torch_internals import pytree
from fxshard.weights.gathering import gather_whole


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        ok: whether outputs and gradients are equal within the tolerance of their dtypes.
        max_output_error: the largest absolute difference of an output.
        max_grad_error: the largest absolute difference of a parameter's gradient.
        first_divergence: the first node, or gradient, that differs, with module and source line; None where all agree.
        rows: for every output and gradient, of parameters and of inputs, what came of the comparison.
    """

    ok: bool
    max_output_error: float
    max_grad_error: float
    first_divergence: str | None
    rows: tuple[Compared, ...] = field(repr=False, default=())

    def __bool__(self) -> bool:
        """As ``ok``: ``assert fxshard.verify(program, x)`` says what it seems to."""
        return self.ok

    def __str__(self) -> str:
        worst = sorted(self.rows, key=lambda row: (row.ok, -row.error))[:10]
        shown = [(r.name, r.shape, f"{r.error:.1e}", "equal" if r.ok else "DIFFERENT") for r in worst]
        lines = [tabulate(shown, headers=("tensor", "shape", "max error", "verdict"), disable_numparse=True)]
        if len(self.rows) > len(worst):
            lines.append(f"... and {len(self.rows) - len(worst)} more with smaller errors")
        verdict = "the program equals the model" if self.ok else f"NOT EQUAL, first at {self.first_divergence}"
        return "\n".join([*lines, verdict])


def verify(program: ParallelModule, *args: Any, **kwargs: Any) -> VerifyReport:
    """Compares the program's outputs and all its gradients with the original model's, and prints a table.

    Without a process group all ranks are simulated; under torchrun the ranks compare what they really computed, each
    running the original model for itself, and compute checkpointed calls anew. The loss is a fixed random weighting of
    all outputs. Gradients of inputs that require one are compared, and one that should not be there is a difference.
    The program's weights, buffers and gradients are left as they were. How far apart is equal: see ``fxshard.ruler``.

    Args:
        program: what ``parallelize`` returned.
        args: the model's inputs.
        kwargs: likewise.

    >>> import fxshard
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).double()
    >>> x = torch.randn(4, 8, dtype=torch.float64)
    >>> report = fxshard.verify(fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,)), x)  # doctest: +ELLIPSIS
    tensor ...
    the program equals the model
    >>> report.ok, report.first_divergence
    (True, None)
    """
    state = random_state(program.computes_on)
    compiled, _ = program.compile_call(args, kwargs)
    tolerance = tolerance_of(compiled.graph)
    weights = program.full_state_dict()
    distributed = dist.is_available() and dist.is_initialized() and program.mesh.world_size > 1
    ranks = [program.rank] if distributed else list(range(program.mesh.world_size))
    with _Untouched([program.rank_module(r) for r in ranks]):
        model, changes = program._original.get(), program._captures.changes

        def reference(dtype: torch.dtype | None = None) -> tuple[list[Any], dict[str, torch.Tensor]]:
            set_random_state(program.computes_on, state)
            with changes.on(model):
                return _reference(model, weights, args, kwargs, dtype)

        want, want_grads = reference()
        set_random_state(program.computes_on, state)
        if distributed:
            trace = None
            got, got_grads = _on_ranks(program, compiled, args, kwargs)
        else:
            try:
                trace = _Run(program, compiled, args, kwargs)
            except Exception:
                set_random_state(program.computes_on, state)
                _Trace(program, compiled, args, kwargs)  # fails at the same call, and names it
                raise
            got, got_grads = trace.outputs, trace.grads
        differing = trace.disagreements() if trace is not None else []
    pairs: list[Row] = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))]
    pairs = [pair for pair in pairs if isinstance(pair[2], torch.Tensor)]
    outputs = len(pairs)  # the rows before are outputs, those behind are gradients
    pairs += [(f"grad of {n}", got_grads.get(n), want_grads.get(n)) for n in {**want_grads, **got_grads}]

    def again() -> list[Any] | None:
        with _Untouched([program.rank_module(r) for r in ranks]):
            values = other_precision(weights.values(), reference)
        if values is None:
            return None
        named = {f"output {i}": value for i, value in enumerate(values[0])}
        named |= {f"grad of {name}": grad for name, grad in values[1].items()}
        return [named.get(name) for name, _, _ in pairs]

    rows = compare(pairs, tolerance, again) + differing
    ok = all(row.ok for row in rows)
    where = None
    if not ok:
        if trace is not None:
            with _Untouched([program.rank_module(r) for r in ranks]):
                set_random_state(program.computes_on, state)
                where = _Trace(program, compiled, args, kwargs).first_divergence(state)
        where = where or next(row.name for row in rows if not row.ok)
    report = VerifyReport(
        ok,
        max((row.error for row in rows[:outputs]), default=0.0),
        max((row.error for row in rows[outputs:]), default=0.0),
        where,
        tuple(rows),
    )
    set_random_state(program.computes_on, state)
    if program.rank == 0 or not distributed:
        print(report)  # noqa: T201
    return report


def _reference(
    model: nn.Module, weights: Mapping[str, torch.Tensor], args: Any, kwargs: Any, dtype: torch.dtype | None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The model's outputs and gradients with these weights, in its own precision or in another one."""

    def own(tensor: torch.Tensor, needs: bool) -> torch.Tensor:
        cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        return cast.detach().clone().requires_grad_(needs)

    parameters = {n: own(weights[n], p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: own(weights.get(n, b), False) for n, b in model.named_buffers()}
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: own(t, t.requires_grad), (args, kwargs))
    inputs = pytree.tree_leaves((args, kwargs))
    out = functional_call(model, _everywhere(model, {**parameters, **buffers}), args, kwargs, tie_weights=False)
    leaves = pytree.tree_leaves(out)
    loss = loss_of(leaves)
    if loss is not None:
        loss.backward()
    return leaves, {n: p.grad for n, p in parameters.items() if p.grad is not None} | _grads_of_inputs(inputs)


def _grads_of_inputs(leaves: list[Any]) -> dict[str, torch.Tensor]:
    grads = {f"input {i}": x.grad for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_leaf}
    return {name: grad for name, grad in grads.items() if grad is not None}


def _everywhere(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What to put in the place of every tensor of the model: once a module, though it may have several names.

    ``functional_call`` finds tied weights by itself, but leaves a module that it met twice with the new ones.
    """
    given = {id(tensor): tensors[name] for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        joined(path, name): given[id(tensor)]
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _on_ranks(
    program: ParallelModule, compiled: Compiled, args: Any, kwargs: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    args, kwargs = pytree.tree_map_only(torch.Tensor, _own, (args, kwargs))
    inputs = pytree.tree_leaves((args, kwargs))
    leaves = pytree.tree_leaves(program(*args, **kwargs))
    mesh, axes = program.mesh, program.axes
    whole = [
        gather_whole(leaf, compiled.output_placements(i), mesh, axes) if isinstance(leaf, torch.Tensor) else leaf
        for i, leaf in enumerate(leaves)
    ]
    loss = loss_of(whole)
    if loss is not None:
        loss.backward()
    return whole, program.full_grads() | _grads_of_inputs(inputs)


class _Untouched:
    """Puts gradients and buffers back as they were."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules

    def __enter__(self) -> None:
        self.grads = [[(p, p.grad) for p in m.parameters()] for m in self.modules]
        self.buffers = [[(b, b.clone()) for b in m.buffers()] for m in self.modules]
        for module in self.modules:
            module.zero_grad(set_to_none=True)

    def __exit__(self, *error: object) -> None:
        for pairs in self.grads:
            for parameter, grad in pairs:
                parameter.grad = grad
        with torch.no_grad():
            for saved in self.buffers:
                for buffer, value in saved:
                    if not torch.equal(buffer, value):  # constants never change, and may be expanded
                        buffer.copy_(value)


class _Recorder(Interpreter):
    """Runs a graph, and keeps every value that it makes, with its gradient."""

    def __init__(self, root: nn.Module, graph: fx.Graph, read: Callable[[str], Any], axes: Mapping[str, Axis]) -> None:
        super().__init__(root, graph, keep=True)
        self.read, self.axes = read, axes
        self.values: dict[str, Any] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.read(str(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if is_ours(target):
            args = tuple(self.axes.get(a, a) if isinstance(a, str) else a for a in args)
        return super().call_function(target, args, kwargs)

    def run(self, *args: Any, **options: Any) -> Any:
        with using(()):  # the casts are in the graph
            return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.values[n.name] = value
            if value.requires_grad and not value.is_leaf:
                value.retain_grad()
        return value


class _Run:
    """All ranks' programs, run forward and backward in lockstep."""

    def __init__(self, program: ParallelModule, compiled: Compiled, args: Any, kwargs: Any) -> None:
        self.compiled, self.mesh, self.program = compiled, program.mesh, program
        self.call = args, kwargs
        leaves = compiled.captured.flatten_inputs(args, kwargs)
        world = program.mesh.world_size
        self.inputs = [[_own(x) for x in leaves] for _ in range(world)]
        turns = Turns(world, program.computes_on)
        axes = lockstep_axes(program.mesh, turns, program.options.reduce_dtype)
        ranks = [self._runner(rank, axes[rank]) for rank in range(world)]
        self.outs = run_ranks(world, turns, lambda rank: ranks[rank](*self.inputs[rank]))
        joined = [self._join_output(i, [out[i] for out in self.outs]) for i in range(len(self.outs[0]))]
        self.outputs = pytree.tree_leaves(compiled.captured.unflatten_outputs(joined))
        loss = loss_of(self.outputs)
        if loss is not None:
            self._backward()
        self.grads = program.full_grads() | self._grads_of_inputs(0, args, kwargs)

    def _grads_of_inputs(self, rank: int, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
        """A rank's gradients of the inputs, numbered as in the call."""
        order = pytree.tree_leaves((args, kwargs))
        places = {id(x): i for i, x in enumerate(order)}
        given = self.compiled.captured.flatten_inputs(args, kwargs)
        return {
            f"input {places[id(x)]}": own.grad
            for x, own in zip(given, self.inputs[rank], strict=True)
            if isinstance(own, torch.Tensor) and own.grad is not None
        }

    def _runner(self, rank: int, axes: Mapping[str, Axis]) -> Callable[..., Any]:
        """What a rank runs: the generated code."""
        return functools.partial(self.program.function(self.compiled, rank, axes), self.program.rank_module(rank))

    def _join_output(self, index: int, parts: list[Any]) -> Any:
        if not isinstance(parts[0], torch.Tensor):
            return parts[0]
        return join_all(parts, self.compiled.output_placements(index), self.mesh.sizes)

    def disagreements(self) -> list[Compared]:
        """Where a rank holds something else than its part of the whole: what all hold alike must be alike."""
        rows: list[Compared] = []
        for index, whole in enumerate(self.outputs):
            parts = [out[index] for out in self.outs]
            if isinstance(whole, torch.Tensor) and isinstance(parts[0], torch.Tensor):
                placed = self.compiled.output_placements(index)
                rows += self._differing(f"output {index}", whole, parts, placed)
        modules = [dict(self.program.rank_module(r).named_parameters()) for r in range(self.mesh.world_size)]
        inputs = [self._grads_of_inputs(rank, *self.call) for rank in range(self.mesh.world_size)]
        everywhere = (Replicate(),) * len(self.mesh.sizes)
        for name, whole in self.grads.items():
            if name in modules[0]:
                grads, placed = [module[name].grad for module in modules], self.program.placements_of(name)
            else:
                grads, placed = [each.get(name) for each in inputs], everywhere
            rows += self._differing(f"grad of {name}", whole, grads, placed)
        return rows

    def _differing(self, name: str, whole: torch.Tensor, parts: list[Any], placed: Placements) -> list[Compared]:
        pairs: list[Row] = []
        for rank, part in enumerate(parts):
            own = cut_all(whole.detach(), placed, self.mesh.sizes, self.mesh.coordinate(rank))
            pairs.append((f"{name} on rank {rank}", part, own))
        return [row for row in compare(pairs, tolerance_of(self.compiled.graph)) if not row.ok]

    def _backward(self) -> None:
        """Every rank back-propagates its share of the loss, as ``loss_fn`` of a real run would."""
        total = torch.zeros(())
        for index, whole in enumerate(self.outputs):
            if not isinstance(whole, torch.Tensor) or not whole.requires_grad:
                continue
            parts = [_real(out[index]) for out in self.outs]
            placed = self.compiled.output_placements(index)
            weight = weight_of(index, _real(whole))
            for rank, part in enumerate(parts):
                local = cut_all(weight, placed, self.mesh.sizes, self.mesh.coordinate(rank))
                total = total + (part * local).sum()
        total.backward()


class _Trace(_Run):
    """The captured graph and all ranks' graphs, run node by node."""

    def __init__(self, program: ParallelModule, compiled: Compiled, args: Any, kwargs: Any) -> None:
        self.ranks: list[_Recorder] = []
        self.final = {n.name: n for n in compiled.graph.nodes}
        super().__init__(program, compiled, args, kwargs)

    def _runner(self, rank: int, axes: Mapping[str, Axis]) -> Callable[..., Any]:
        self.program.place_constants(self.compiled, rank)
        module = self.program.rank_module(rank)
        graph = self.compiled.graph_for(rank)
        self.ranks.append(_Recorder(self.compiled.root, graph, lambda name: find(module, name), axes))
        return self.ranks[-1].run

    def first_divergence(self, state: RandomState) -> str | None:
        """The first node whose value differs, or, backward, whose gradient does; ``state``: of the random generator."""
        set_random_state(self.program.computes_on, state)
        captured, root = self.compiled.captured, self.compiled.root
        graph = self.compiled.stages["normalize"]
        weights = self.program.full_state_dict()

        def read(name: str) -> Any:
            if name in weights:
                return weights[name].clone().requires_grad_(weights[name].is_floating_point())
            return find(root, name)

        single = _Recorder(root, graph, read, {})
        out = single.run(*(_own(x) for x in captured.flatten_inputs(*self.call)))
        for node in graph.nodes:
            if node.op == "call_function" and self._differs(node, single, grad=False):
                return self._name(node, "its value")
        loss = loss_of(list(out))
        if loss is not None:
            loss.backward()
        for node in reversed(graph.nodes):
            if node.op != "placeholder" and self._differs(node, single, grad=True):
                return self._name(node, "its gradient")
        return None

    def _differs(self, node: fx.Node, single: _Recorder, grad: bool) -> bool:
        local = self.final.get(node.name)
        want = single.values.get(node.name)
        parts: list[Any] = [rank.values.get(node.name) for rank in self.ranks]
        if local is None or want is None or any(p is None for p in parts) or not has_info(local):
            return False
        if grad:
            want, parts = want.grad, [p.grad for p in parts]
            if want is None or any(p is None for p in parts):
                return False
        placed = info_of(local).placements
        if grad:  # the gradient of a Partial value is whole on every rank
            placed = tuple(Replicate() if is_partial(p) or isinstance(p, Varying) else p for p in placed)
        got = join_all(parts, placed, self.mesh.sizes)
        return not compare([(node.name, got, want)], tolerance_of(self.compiled.graph))[0].ok

    def _name(self, node: fx.Node, what: str) -> str:
        place = ", ".join(x for x in (module_of(node), source_of(node)) if x)
        return f"%{node.name} = {node.target} ({place}): {what} differs" if place else f"%{node.name}: {what} differs"


def _own(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _real(value: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
