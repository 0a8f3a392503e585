"""Plans in the words of other libraries: Hugging Face's ``tp_plan`` styles and torch's ``ParallelStyle`` objects.

Both name modules and say how each is split. Here that becomes what a ``Plan`` says: placements of parameters, and of
what modules return. Nothing else is needed, because the compiler finds the rest and gets it right for any placement:

    a style says                                         the plan gets
    colwise, ColwiseParallel                             weight split by output features, and its bias
    rowwise, RowwiseParallel                             weight split by input features; its bias is whole
    embedding_rowwise, rowwise of an nn.Embedding        the table split along the vocabulary
    packed_*                                             as unpacked: the compiler finds the blocks from their readers
    *_rep, *_gather_output, *_split_input, all_reduce    nothing more: collectives come where readers need them
    sequence_parallel, SequenceParallel                  what the module returns is split along the sequence
    output_layouts=..., PrepareModuleOutput              what the module returns
    input_layouts=...                                    nothing: the compiler knows what arrives

A glob's ``*`` stands for one component of a name, as in both libraries (``layers.*.mlp`` is not ``layers.0.x.mlp``).
What cannot be said in a ``Plan`` is refused, all offenders at once.

Reference: ``transformers.distributed.tensor_parallel``; ``torch.distributed.tensor.parallel.style``.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import Placement

from fxshard.errors import MeshError, PlanError
from fxshard.mesh import Mesh
from fxshard.placement import REPLICATE, Replicate, Shard, describe

logger = logging.getLogger("fxshard")

Parts: TypeAlias = "dict[str, Any]"
"""The arguments of a ``Plan``: its params, activations and outputs."""


@dataclass(frozen=True)
class Ask:
    """What a style asks of a module, or of a parameter.

    Args:
        weights: ``"columns"`` (output features), ``"rows"`` (input features), ``"whole"``, or None: nothing.
        returns: how what the module returns lies; None where that is left to the compiler.
        table: the weight is a table ``[entries, features]``, not ``[out, in]``.
        packed: several weights in one; such a bias stays whole where its weight is split by rows.
    """

    weights: str | None = None
    returns: Placement | None = None
    table: bool = False
    packed: bool = False


COLUMNS, ROWS, NOTHING = Ask("columns"), Ask("rows"), Ask()

HF_STYLES: Mapping[str, Ask] = {
    "colwise": COLUMNS,
    "colwise_gather_output": COLUMNS,
    "colwise_rep": COLUMNS,
    "local_colwise": COLUMNS,
    "rowwise": ROWS,
    "rowwise_split_input": ROWS,
    "rowwise_rep": ROWS,
    "local_rowwise": ROWS,
    "embedding_rowwise": Ask("rows", table=True),
    "embedding_colwise": Ask("columns", table=True),
    "packed_colwise": Ask("columns", packed=True),
    "packed_rowwise": Ask("rows", packed=True),
    "local_packed_rowwise": Ask("rows", packed=True),
    "sequence_parallel": Ask(returns=Shard(1)),
    "replicate": Ask("whole"),
    # These place nothing: they patch by hand what the compiler derives from the placements, gradients included.
    "replicated_with_grad_allreduce": NOTHING,
    "mla_kv_a_proj": NOTHING,
    "all_reduce": NOTHING,
    "moe_tp_experts": NOTHING,
    "moe_identity_expert": NOTHING,
    "local_params": NOTHING,
    "local": NOTHING,
    "gather": NOTHING,
}
"""The styles of ``transformers`` 4.5x to 5.x that split tensors. Those of expert parallelism are not among them."""

EXPERT_STYLES = ("grouped_gemm", "ep_dispatch_experts", "ep_router")
"""Styles of ``transformers`` that send tokens to experts on other ranks: not built yet."""


def is_style(value: Any) -> bool:
    """Whether a value of a plan's dict is another library's style."""
    return isinstance(value, (str, ParallelStyle))


def axis_for(mesh: Any, axis: str | None = None) -> str:
    """The mesh axis that styles split: the one asked for, the only one, or ``"tp"``.

    >>> axis_for({"model": 4}), axis_for({"dp": 2, "tp": 4}), axis_for(None)
    ('model', 'tp', 'tp')

    Raises:
        MeshError: when the mesh has no such axis, or several and none named ``"tp"``.
    """
    if mesh is None:
        return axis or "tp"
    mesh = Mesh.of(mesh)
    if axis is not None:
        mesh.index(axis)
        return axis
    if mesh.ndim > 1 and "tp" not in mesh.names:
        raise MeshError(
            f"the mesh {mesh} has several axes, and none is named 'tp'",
            fix=f"say which one the styles split: Plan.from_hf(model, mesh, axis={mesh.names[-1]!r}), or name it 'tp'",
        )
    return mesh.names[0] if mesh.ndim == 1 else "tp"


def read_hf(model: nn.Module, axis: str) -> Parts:
    """What the model's own ``tp_plan`` says. See ``Plan.from_hf``."""
    plan = hf_plan(model)
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no tp_plan",
            fix="use fxshard.tensor_parallel(n), or give {module glob: 'colwise' or 'rowwise'} to parallelize",
        )
    reader = _Reader(model, axis)
    used = {glob: style for glob, style in plan.items() if reader.match(glob)}
    unused = sorted(plan.keys() - used.keys())
    if not used:
        raise PlanError(
            f"the tp_plan of {type(model).__name__} matches none of its modules: {', '.join(map(repr, unused))}",
            fix="set model.tp_plan, or give {module glob: style} to parallelize",
        )
    if unused:  # of modules that other configurations have: transformers warns, too, and goes on
        logger.warning("tp_plan rules that match nothing in %s are left out: %s", type(model).__name__, unused)
    return reader.read(used)


def hf_plan(model: nn.Module) -> dict[str, str]:
    """The ``tp_plan`` that a model carries, with the names of its modules as they are in ``model``.

    A model that wraps others has the plans of all of them.
    """
    found: dict[str, str] = {}
    owners: list[str] = []
    for name, module in model.named_modules():
        if any(not owner or name.startswith(f"{owner}.") for owner in owners):
            continue  # its owner's plan speaks for it
        plan = _own_plan(module)
        if plan:
            owners.append(name)
            found |= {f"{name}.{key}" if name else key: style for key, style in plan.items()}
    return found


def _own_plan(module: nn.Module) -> dict[str, str]:
    own = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
    if own:
        return dict(own)
    base = getattr(getattr(module, "config", None), "base_model_tp_plan", None) or {}
    prefix = getattr(module, "base_model_prefix", "")
    inside = bool(prefix) and isinstance(getattr(module, prefix, None), nn.Module)
    return {f"{prefix}.{key}" if inside else key: style for key, style in base.items()}


def read_styles(model: nn.Module, entries: Mapping[str, Any], axis: str) -> Parts:
    """What a dict from module or parameter globs to styles says; placements among them stay as they are.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> read_styles(model, {"0": "colwise", "2": RowwiseParallel(output_layouts=Shard(1))}, "tp")["activations"]
    {'2': {'tp': Shard(dim=1)}}

    Raises:
        PlanError: listing every style that is not known or cannot be applied, and every glob that matches nothing.
    """
    parts = _Reader(model, axis).read({glob: style for glob, style in entries.items() if is_style(style)})
    parts["params"] |= {
        glob: {axis: entry} if isinstance(entry, Placement) else entry
        for glob, entry in entries.items()
        if not is_style(entry)
    }
    return parts


@dataclass
class _Reader:
    """Reads the styles for one model, and gathers what is wrong with them."""

    model: nn.Module
    axis: str
    params: dict[str, Placement] = field(default_factory=dict)
    returns: dict[str, Placement] = field(default_factory=dict)
    by: dict[tuple[str, str], str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[PlanError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.tensors = dict(self.model.named_parameters(remove_duplicate=False))
        self.split_names = [(name, name.split(".")) for name in (*self.modules, *self.tensors)]

    def match(self, glob: str, anywhere: bool = False) -> list[str]:
        """The modules and parameters that a glob names.

        Args:
            glob: a name in which ``*`` stands for one component, or something in it.
            anywhere: where nothing is so named, ``*`` may stand for several components, as in our own plans.
        """
        if glob in self.modules or glob in self.tensors:
            return [glob]
        wanted = glob.split(".")
        found = [
            name
            for name, parts in self.split_names
            if name and len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
        ]
        if not found and anywhere:
            found = [name for name, _ in self.split_names if name and fnmatch.fnmatchcase(name, glob)]
        return found

    def read(self, entries: Mapping[str, Any]) -> Parts:
        """The parts of a plan that the entries ask for."""
        asked = {glob: found for glob, style in entries.items() if (found := self._ask(glob, style)) is not None}
        for glob, (names, ask) in asked.items():  # first: what names a parameter goes before what names its module
            for name in names:
                if name in self.tensors:
                    self._parameter(glob, entries[glob], name, ask)
        direct = frozenset(self.params)
        for glob, (names, ask) in asked.items():
            for name in names:
                if name in self.modules:
                    self._module(glob, entries[glob], name, ask, direct)
        self._raise()
        outputs = {self.axis: self.returns.pop("")} if "" in self.returns else {}
        return {
            "params": {name: {self.axis: placement} for name, placement in self.params.items()},
            "activations": {name: {self.axis: placement} for name, placement in self.returns.items()},
            "outputs": outputs,
        }

    def _ask(self, glob: str, style: Any) -> tuple[list[str], Ask] | None:
        """What an entry names, and what it asks for; None where its style is refused."""
        names = self.match(glob, anywhere=True)
        if not names:
            near = difflib.get_close_matches(glob, [n for n in self.modules if n], 3, 0.4)
            fix = f"the nearest names are {', '.join(map(repr, near))}" if near else "see model.named_modules()"
            self.problems.append(PlanError(f"{glob!r} matches no module or parameter of the model", fix=fix))
        if isinstance(style, str) and style in HF_STYLES:
            return names, HF_STYLES[style]
        reader = TORCH_STYLES.get(type(style))
        if reader is None:
            note = " (expert parallel, not built yet)" if style in EXPERT_STYLES else ""
            self.unknown.append(f"{glob!r}: {_word(style)}{note}")
            return None
        try:
            return names, reader(style)
        except PlanError as error:
            self.problems.append(PlanError(f"{glob!r}: {error.what}", fix=error.fix))
            return None

    def _parameter(self, glob: str, style: Any, name: str, ask: Ask) -> None:
        """An entry that names a parameter."""
        if ask.returns is not None:
            fix = "name the module, or give the parameter a placement such as Shard(0)"
            self.problems.append(
                PlanError(f"{glob!r}: {name} is a parameter, and {_word(style)} says what a module returns", fix=fix)
            )
            return
        owner, _, leaf = name.rpartition(".")
        placement = _placement(self.modules[owner], leaf, self.tensors[name].ndim, ask)
        if placement is not None:
            self._put(self.params, "parameter", name, placement, glob)

    def _module(self, glob: str, style: Any, name: str, ask: Ask, direct: frozenset[str]) -> None:
        """An entry that names a module: its own parameters, and what it returns."""
        module = self.modules[name]
        if ask.weights in ("columns", "rows") and not _can_split(module, ask):
            what = "an nn.Embedding" if ask.table else "linear layers and embeddings"
            self.problems.append(
                PlanError(
                    f"{glob!r}: {name or 'the model'} is a {type(module).__name__}, and {_word(style)} splits {what}",
                    fix="name the layers inside it, or give placements of its parameters: {'...weight': Shard(0)}",
                )
            )
            return
        for leaf, tensor in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            placement = _placement(module, leaf, tensor.ndim, ask) if full not in direct else None
            if placement is not None:
                self._put(self.params, "parameter", full, placement, glob)
        if ask.returns is not None and not isinstance(module, (nn.Dropout, nn.Identity)):
            # what these return lies as what they are given, and in evaluation they are not in the graph
            self._put(self.returns, "module", name, ask.returns, glob)

    def _put(self, into: dict[str, Placement], kind: str, name: str, placement: Placement, glob: str) -> None:
        have = into.setdefault(name, placement)
        first = self.by.setdefault((kind, name), glob)
        if have != placement:
            text = f"{first!r} and {glob!r} disagree on {name}: {describe(have)} and {describe(placement)}"
            self.problems.append(PlanError(text, fix=f"let one of them match the {kind}"))

    def _raise(self) -> None:
        problems = list(self.problems)
        if self.unknown:
            kinds = [kind.__name__ for kind in TORCH_STYLES]
            problems.insert(
                0,
                PlanError(
                    f"these styles are not supported: {', '.join(self.unknown)}",
                    fix=f"use {', '.join(HF_STYLES)}; or torch's {', '.join(kinds)}; or placements such as Shard(0)",
                ),
            )
        if len(problems) == 1:
            raise problems[0]
        if problems:
            text = "\n".join(f"{i}. {problem}" for i, problem in enumerate(problems, 1))
            raise PlanError(f"{len(problems)} entries of the plan cannot be applied:\n{text}")


def _word(style: Any) -> str:
    return repr(style) if isinstance(style, str) else type(style).__name__


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, ``transformers.pytorch_utils.Conv1D``, whose weight is ``[in, out]``."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf")


def _can_split(module: nn.Module, ask: Ask) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    return not ask.table and (is_linear or _is_conv1d(module))


def _placement(module: nn.Module, leaf: str, ndim: int, ask: Ask) -> Placement | None:
    """How a parameter lies under a style; None where nothing is asked, or it stays whole by itself.

    >>> [_placement(nn.Linear(2, 2), "weight", 2, ask) for ask in (COLUMNS, ROWS)]
    [Shard(dim=0), Shard(dim=1)]
    >>> [_placement(nn.Embedding(2, 2), "weight", 2, ask) for ask in (COLUMNS, ROWS)]
    [Shard(dim=1), Shard(dim=0)]
    """
    if ask.weights == "whole":
        return REPLICATE
    if ask.weights is None or ndim == 0:
        return None
    if ndim == 1:
        return None if ask.weights == "rows" and (leaf == "bias" or ask.packed) else Shard(0)
    is_turned = ask.table or isinstance(module, nn.Embedding) or _is_conv1d(module)  # [in, out]
    return Shard(ndim - 1 if (ask.weights == "rows") != is_turned else ndim - 2)


# --- torch's styles -------------------------------------------------------------------------------------------------


def _colwise(style: ColwiseParallel) -> Ask:
    (layout,) = style.output_layouts
    return replace(COLUMNS, returns=None if layout == Shard(-1) else _returned(layout))


def _rowwise(style: RowwiseParallel) -> Ask:
    (layout,) = style.output_layouts
    return replace(ROWS, returns=None if layout == REPLICATE else _returned(layout))


def _sequence(style: SequenceParallel) -> Ask:
    return Ask(returns=style.sequence_sharding[0])


def _prepare_input(style: PrepareModuleInput) -> Ask:
    """Inputs that should be whole need nothing; a plan cannot say that a module's input should be split."""
    pairs = [
        *zip(style.input_layouts or (), style.desired_input_layouts or (), strict=True),
        *((given, style.desired_input_kwarg_layouts.get(k)) for k, given in style.input_kwarg_layouts.items()),
    ]
    for given, wanted in pairs:
        if given is not None and wanted is not None and wanted != given and type(wanted) is not Replicate:
            raise PlanError(
                f"a plan cannot fix a module's input to be {describe(wanted)}, as desired_input_layouts asks",
                fix="place what the module before it returns: PrepareModuleOutput, or Plan(activations={...})",
            )
    return NOTHING


def _prepare_output(style: PrepareModuleOutput) -> Ask:
    return Ask(returns=_alike(style.desired_output_layouts))


def _prepare_both(style: PrepareModuleInputOutput) -> Ask:
    _prepare_input(style.prepare_module_input)
    return _prepare_output(style.prepare_module_output)


def _alike(layouts: Sequence[Placement | None]) -> Placement | None:
    """The one layout of all of a module's results."""
    found = [None if layout is None else _returned(layout) for layout in layouts]
    if any(layout != found[0] for layout in found):
        raise PlanError(
            f"a module's results are placed alike, but desired_output_layouts are {_list(layouts)}",
            fix="place single results by their names in the graph: Plan(activations={'%name': Shard(1)})",
        )
    return found[0] if found else None


def _returned(layout: Placement) -> Placement:
    if type(layout) not in (Shard, Replicate):
        text = describe(layout) if layout.is_partial() else repr(layout)
        raise PlanError(f"a module cannot be asked to return {text}", fix="use Shard(dim) or Replicate()")
    return layout


def _list(layouts: Iterable[Placement | None]) -> str:
    return "(" + ", ".join("None" if layout is None else describe(layout) for layout in layouts) + ")"


TORCH_STYLES: Mapping[type[ParallelStyle], Callable[[Any], Ask]] = {
    ColwiseParallel: _colwise,
    RowwiseParallel: _rowwise,
    SequenceParallel: _sequence,
    PrepareModuleInput: _prepare_input,
    PrepareModuleOutput: _prepare_output,
    PrepareModuleInputOutput: _prepare_both,
}
"""What each of torch's styles asks for. A subclass may do anything, so it is not taken for its base."""
