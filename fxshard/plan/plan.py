"""Plans: what the user asks for.

A ``Plan`` says, by name or glob, how parameters, inputs, module results and outputs lie on the mesh. Presets ask by
intention (``tensor_parallel(4)``); against a captured graph they become the explicit names and placements, and the
result, ``program.plan``, is a plan like any other: it can be printed, edited, saved and passed back in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from fxshard.errors import PlanError
from fxshard.mesh import Mesh
from fxshard.placement import describe, shard
from fxshard.plan.formats import axis_for, read_hf

Entry: TypeAlias = "Placement | Mapping[str, Placement]"
"""One placement (on a one-axis mesh), or one an axis."""

PARTS = ("params", "uses", "inputs", "activations", "outputs")
"""What a plan speaks of."""


MEASURE: list[Any] = []
"""What measures the coverage of a plan: it needs the whole compiler, which stands above plans and puts it here."""


@dataclass(frozen=True)
class Plan:
    """How a model's tensors lie on a mesh.

    Args:
        mesh: the axes and their sizes: a ``Mesh``, a dict, a torch ``DeviceMesh``.
        params: globs of parameter or buffer names -> placements. What is not named is replicated.
        inputs: globs of input names -> placements: how an input, given whole to every rank, is split for use.
        activations: globs of module paths -> placements of what those modules return; ``"%name"`` is the result of
            that node of the graph.
        uses: globs of parameter names -> placements as which they are read, where that is not how they are stored:
            ``{"*": {"dp": Replicate()}}`` gathers every parameter that ``params`` splits over ``dp`` before its use.
        outputs: placements of the model's outputs; on an axis that is not named an output comes back whole. Or globs of
            output positions (``"0"``) -> placements.
        presets: intentions that are resolved against the captured graph: (preset, axis) pairs.
        ring: axes along which attention passes keys and values round from rank to rank, where queries, keys and values
            arrive split along the sequence. Along others it gathers keys and values there.

    A placement is torch's ``Shard(dim)`` or ``Replicate()``, or a dict from axis names to them.

    >>> from fxshard import Shard
    >>> plan = Plan({"tp": 2}, params={"up.weight": Shard(0), "down.weight": Shard(1)})
    >>> print(plan)
    Plan on {tp: 2}
      params       up.weight    tp: Shard(0)
      params       down.weight  tp: Shard(1)
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    mesh: Any = None
    params: Mapping[str, Entry] = field(default_factory=dict)
    inputs: Mapping[str, Entry] = field(default_factory=dict)
    activations: Mapping[str, Entry] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    uses: Mapping[str, Entry] = field(default_factory=dict)
    presets: tuple[tuple[str, str], ...] = ()
    ring: tuple[str, ...] = ()

    def coverage(self, model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """How much of a model's weights this plan splits, and why the rest lies whole on every rank: print it.

        Args:
            model: any module; it may be on the meta device.
            args: example inputs.
            kwargs: likewise, by name.

        >>> import torch
        >>> from fxshard import tensor_parallel
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> print(tensor_parallel(2).coverage(model, (torch.randn(4, 8),)))
        100.0% of the bytes of matrices are split (2,048 of 2,048); none is whole on every rank
        """
        return MEASURE[0](self, model, args, kwargs)

    def __post_init__(self) -> None:
        if self.mesh is not None:
            object.__setattr__(self, "mesh", Mesh.of(self.mesh))
        for part in ("params", "uses", "inputs", "activations"):
            entries = {name: self._entry(entry, f"{part}[{name!r}]") for name, entry in getattr(self, part).items()}
            object.__setattr__(self, part, entries)
        object.__setattr__(self, "outputs", self._outputs(self.outputs))
        object.__setattr__(self, "presets", tuple(map(tuple, self.presets)))
        object.__setattr__(self, "ring", tuple(self.ring))

    def _entry(self, entry: Any, where: str) -> dict[str, Placement]:
        if isinstance(entry, Placement):
            if self.mesh is None:
                return {"": entry}
            if self.mesh.ndim > 1:
                raise PlanError(
                    f"{where} is {describe(entry)}, but the mesh {self.mesh} has several axes",
                    fix=f"say which: {{{self.mesh.names[0]!r}: {describe(entry)}}}",
                )
            return {self.mesh.names[0]: entry}
        if not isinstance(entry, Mapping) or not all(isinstance(p, Placement) for p in entry.values()):
            raise PlanError(f"{where} is {entry!r}", fix="give Shard(dim), Replicate(), or {axis: placement}")
        return dict(entry)

    def _outputs(self, outputs: Any) -> dict[str, Any]:
        if isinstance(outputs, Placement):
            return {"*": self._entry(outputs, "outputs")}
        if not isinstance(outputs, Mapping):
            raise PlanError(f"outputs is {outputs!r}", fix="give {axis: placement}")
        if outputs and all(isinstance(p, Placement) for p in outputs.values()):
            axes = self.mesh.names if self.mesh is not None else ()
            if all(name in axes for name in outputs) or not all(name.isdigit() or name == "*" for name in outputs):
                return {"*": dict(outputs)}
        return {name: self._entry(entry, f"outputs[{name!r}]") for name, entry in outputs.items()}

    def on(self, mesh: Mesh) -> Plan:
        """This plan on a mesh: bare placements take its one axis."""
        plan = replace(self, mesh=mesh if self.mesh is None else self.mesh | mesh)
        for part in PARTS:
            entries = {
                name: plan._entry(entry[""], f"{part}[{name!r}]") if "" in entry else entry
                for name, entry in getattr(self, part).items()
            }
            object.__setattr__(plan, part, entries)
        return plan

    def __or__(self, other: Plan) -> Plan:
        """Both plans together, on the axes of both; where both name an axis of one tensor they must agree."""
        if not isinstance(other, Plan):
            return NotImplemented
        mesh = other.mesh if self.mesh is None else self.mesh if other.mesh is None else self.mesh | other.mesh
        merged: dict[str, Any] = {}
        for part in PARTS:
            merged[part] = {name: dict(entry) for name, entry in getattr(self, part).items()}
            for name, entry in getattr(other, part).items():
                mine = merged[part].setdefault(name, {})
                for axis, placement in entry.items():
                    if repr(mine.setdefault(axis, placement)) != repr(placement):
                        raise PlanError(
                            f"the plans disagree on {part} {name!r}, axis {axis!r}: "
                            f"{describe(mine[axis])} and {describe(placement)}",
                            fix="name it in one of them only",
                        )
        presets = self.presets + tuple(p for p in other.presets if p not in self.presets)
        return Plan(mesh, presets=presets, ring=tuple(dict.fromkeys(self.ring + other.ring)), **merged)

    def to_json(self) -> str:
        """The plan as JSON text, which ``Plan.from_json`` reads back."""
        mesh = None if self.mesh is None else dict(zip(self.mesh.names, self.mesh.sizes, strict=True))
        parts = {
            part: {
                name: {axis: describe(p) for axis, p in entry.items()} for name, entry in getattr(self, part).items()
            }
            for part in PARTS
        }
        return json.dumps({"mesh": mesh, **parts, "presets": self.presets, "ring": self.ring}, indent=2)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that ``to_json`` wrote."""
        data = json.loads(text)
        parts = {
            part: {
                name: {a: parse_placement(p) for a, p in entry.items()} for name, entry in data.get(part, {}).items()
            }
            for part in PARTS
        }
        return Plan(data["mesh"], presets=tuple(map(tuple, data["presets"])), ring=data.get("ring", ()), **parts)

    @staticmethod
    def from_hf(model: nn.Module, mesh: Any = None, axis: str | None = None) -> Plan:
        """The tensor-parallel plan that a Hugging Face model brings along, made explicit.

        Rules for modules that this model does not have are left out with a warning, as ``transformers`` does. To change
        a rule, give the rules to ``parallelize``: ``{**model.tp_plan, "lm_head": "replicate"}``.

        Args:
            model: it, or a module in it, has a ``tp_plan``, or a ``config.base_model_tp_plan``.
            mesh: the mesh; without one it is to be given to ``parallelize``.
            axis: the mesh axis to split; else the mesh's only one, or ``"tp"``.

        Raises:
            PlanError: when the model has no plan, or one with styles that cannot be expressed.

        >>> class Net(nn.Sequential):
        ...     tp_plan = {"0": "colwise", "2": "rowwise"}
        >>> print(Plan.from_hf(Net(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), {"tp": 2}))
        Plan on {tp: 2}
          params       0.weight  tp: Shard(0)
          params       0.bias    tp: Shard(0)
          params       2.weight  tp: Shard(1)
        """
        return Plan(mesh, **read_hf(model, axis_for(mesh, axis)))

    def __str__(self) -> str:
        lines = [f"Plan on {self.mesh}"]
        rows = [
            (part, name, ", ".join(f"{a}: {describe(p)}" if a else describe(p) for a, p in entry.items()))
            for part in PARTS
            for name, entry in getattr(self, part).items()
        ] + [("preset", name, axis) for name, axis in self.presets]
        rows += [("ring", "attention", axis) for axis in self.ring]
        width = max((len(name) for _, name, _ in rows), default=0)
        return "\n".join(lines + [f"  {part:<12} {name:<{width}}  {text}" for part, name, text in rows])


def parse_placement(text: str) -> Placement:
    """A placement from the text that ``describe`` gives.

    >>> parse_placement("Shard(0, blocks=(2, 1, 1))")
    Shard(0, blocks=(2, 1, 1))
    >>> parse_placement("Shard(1, shares=(3, 2))")
    Shard(1, shares=(3, 2))
    """
    if text == "Replicate":
        return Replicate()
    found = re.fullmatch(r"Partial\((\w+)\)", text)
    if found:
        return Partial(found[1])
    numbers = r"\(([\d, ]+)\)"
    found = re.fullmatch(rf"Shard\((-?\d+)(?:, blocks={numbers})?(?:, shares={numbers})?\)", text)
    if found is None:
        raise PlanError(f"cannot read the placement {text!r}", fix="write Shard(dim) or Replicate")
    blocks, shares = ([int(n) for n in (part or "").split(",") if n.strip()] for part in found.groups()[1:])
    return shard(int(found[1]), blocks or (1,), shares)


def data_parallel(size: int, axis: str = "dp") -> Plan:
    """Splits the batch: inputs on dim 0, weights replicated, gradients summed, outputs gathered and concatenated.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.

    >>> data_parallel(4).mesh
    Mesh(names=('dp',), sizes=(4,))
    """
    return Plan({axis: size}, presets=(("data_parallel", axis),))


def tensor_parallel(size: int, axis: str = "tp") -> Plan:
    """Splits the weights: column/row pairs found from the dataflow, and the vocabulary of embedding and head.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.

    >>> print(data_parallel(2) | tensor_parallel(4))
    Plan on {dp: 2, tp: 4}
      preset       data_parallel    dp
      preset       tensor_parallel  tp

    Reference: Megatron-LM (Shoeybi et al., 2019).
    """
    return Plan({axis: size}, presets=(("tensor_parallel", axis),))


def sequence_parallel(size: int, axis: str = "tp") -> Plan:
    """Tensor parallelism whose residual stream, norms included, is split along the sequence: less activation memory.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.

    Reference: Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., 2022).
    """
    return Plan({axis: size}, presets=(("tensor_parallel", axis), ("sequence_parallel", axis)))


def context_parallel(size: int, axis: str = "cp", method: str = "ulysses") -> Plan:
    """Splits the sequence everywhere, weights replicated; attention sees all of it.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.
        method: ``"ulysses"``: around an attention, positions are exchanged for heads, which must be as many as ranks.
            ``"ring"``: every rank keeps its queries, and keys and values go round the ranks.

    >>> print(context_parallel(4, method="ring"))
    Plan on {cp: 4}
      preset       context_parallel  cp
      ring         attention         cp

    Reference: DeepSpeed Ulysses (Jacobs et al., 2023); Ring Attention (Liu et al., 2023).
    """
    if method not in ("ulysses", "ring"):
        raise PlanError(f"context_parallel: there is no method {method!r}", fix="give 'ulysses' or 'ring'")
    return Plan({axis: size}, presets=(("context_parallel", axis),), ring=(axis,) if method == "ring" else ())


def expert_parallel(size: int, axis: str = "ep") -> Plan:
    """Splits experts over the ranks: each has whole matrices of some experts, and computes the rows routed to these.

    Weights of experts are found from the dataflow; routers, and what is not an expert, stay whole. On the axis that
    splits the batch too, ``data_parallel(4) | expert_parallel(4, "dp")``, tokens are gathered for the experts, and what
    these make of them is summed and scattered back.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.

    >>> print(expert_parallel(2) | tensor_parallel(2))
    Plan on {ep: 2, tp: 2}
      preset       expert_parallel  ep
      preset       tensor_parallel  tp

    Reference: GShard (Lepikhin et al., 2020).
    """
    return Plan({axis: size}, presets=(("expert_parallel", axis),))


def zero(size: int, axis: str = "dp") -> Plan:
    """Data parallelism whose parameters, with their gradients and optimizer states, are stored in parts.

    Each parameter is gathered where it is used, and its gradient reduce-scattered. The smallest ones stay whole.

    Args:
        size: the number of ranks along the axis.
        axis: the mesh axis.

    Reference: ZeRO (Rajbhandari et al., 2020), stage 3; PyTorch FSDP (Zhao et al., 2023).
    """
    return Plan({axis: size}, presets=(("data_parallel", axis), ("zero", axis)))
