"""What all ranks must agree on before they run a capture, as text to compare: see ``fxshard.ranks.meeting``."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import fx, nn

from fxshard.codegen.types import describe_value
from fxshard.ir.conversions import CONVERSIONS
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Compiled
from fxshard.ranks.meeting import Section
from fxshard.ranks.position import type_text
from fxshard.runtime.process_groups import checksum

SAME_INPUTS = (
    "give every rank the same whole inputs: no DistributedSampler, one seed for what is shuffled or drawn; the program "
    "takes each rank's part itself"
)
ROWS = "; compare='metadata' if each rank loads only the rows that its part reads"
MODE = "call train() or eval(), and enter autocast and no_grad, on every rank alike"
SEED = "seed every rank alike (torch.manual_seed) before the model is made, or load one checkpoint on all"
NOTE = "the ranks were given models with different weights: {count} tensors differ, first {item!r}"


def fingerprint(
    compiled: Compiled,
    model: nn.Module,
    leaves: list[Any] | None,
    checksums: Mapping[str, int],
    modes: Mapping[str, bool],
) -> dict[str, Section]:
    """The sections, in the order in which they are compared: causes before what follows from them.

    Args:
        compiled: what this rank is about to run.
        model: the user's.
        leaves: the inputs; None where they are not known yet.
        checksums: of the whole weights, while they are those that the model came with; else empty.
        modes: of the program's modules.
    """
    sections = {
        "versions": Section(versions(), "runs", "install the same versions on every host"),
        "mesh": Section({"mesh": str(compiled.mesh)}, "has", "give every rank the same mesh"),
        "model": Section(dict(_tensors(model)), "has", "make the same model on every rank"),
        "options": Section(_fields(compiled.options), "has", "give parallelize the same options on every rank"),
        "mode": Section(_mode(compiled, modes), "has", MODE),
        "inputs": Section(_inputs(compiled, leaves), "was given", SAME_INPUTS),
        "plan": Section(_plan(compiled), "has the plan", "give every rank the same plan"),
        "program": Section(
            dict(_program(compiled.graph, compiled.mesh)),
            "has",
            "the model computes something else on that rank: look for what in its code, or in its settings, depends on "
            "the rank",
        ),
        "weights": Section({n: f"{c:016x}" for n, c in checksums.items()}, "has", SEED, NOTE),
    }
    if leaves is not None and compiled.options.compare != "metadata":
        sections["values"] = Section(_values(compiled, leaves), "was given", SAME_INPUTS + ROWS)
    return sections


def versions() -> dict[str, str]:
    """What runs on this rank."""
    try:
        own = metadata.version("fxshard")
    except metadata.PackageNotFoundError:  # run from a checkout
        own = "of a checkout"
    return {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__, "fxshard": own}


def _tensors(model: nn.Module) -> Iterator[tuple[str, str]]:
    yield "model", type(model).__qualname__
    for listing in (model.named_parameters, model.named_buffers):
        for name, tensor in listing(remove_duplicate=False):
            frozen = "" if tensor.requires_grad or listing == model.named_buffers else ", frozen"
            yield name, type_text(tensor.dtype, tuple(tensor.shape)) + frozen


def _fields(options: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(options).items()}


def _mode(compiled: Compiled, modes: Mapping[str, bool]) -> dict[str, str]:
    modules = {f"training of {name}": str(mode) for name, mode in modes.items() if name}
    autocast = str(compiled.captured.autocast)
    return {"training": str(modes[""]), "autocast": autocast, "gradients": str(torch.is_grad_enabled()), **modules}


def _inputs(compiled: Compiled, leaves: list[Any] | None) -> dict[str, str]:
    if leaves is None:
        return {info.path: str(info) for info in compiled.captured.example_inputs}
    out = {}
    for info, leaf in zip(compiled.captured.example_inputs, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            text = type_text(leaf.dtype, tuple(leaf.shape)) + ", with gradient" * leaf.requires_grad
        else:
            text = re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))[:200]
        out[info.path] = text
    return out


def _values(compiled: Compiled, leaves: list[Any]) -> dict[str, str]:
    named = zip(compiled.captured.example_inputs, leaves, strict=True)
    return {f"values of {i.path}": _value(x) for i, x in named if isinstance(x, torch.Tensor)}


def _value(tensor: torch.Tensor) -> str:
    """A tensor's values in a few characters: the first ones, and a checksum of all."""
    flat = tensor.detach().reshape(-1)
    first = "" if tensor.is_meta else ", ".join(f"{x:.4g}" for x in flat[:3].tolist()) + ", ..." * (flat.numel() > 3)
    return f"[{first}] (checksum {checksum(tensor):016x})"


def _plan(compiled: Compiled) -> dict[str, str]:
    parts = json.loads(compiled.resolved.plan.to_json())
    return {
        f"{part} {name}": ", ".join(f"{axis}: {placement}" for axis, placement in entry.items())
        for part in ("params", "inputs", "activations", "outputs")
        for name, entry in parts[part].items()
    }


def _program(graph: fx.Graph, mesh: Mesh) -> Iterator[tuple[str, str]]:
    """The collectives, in order, and how often every operator is called; of rank 0, whoever asks."""
    converting = [n for n in graph.nodes if n.target in CONVERSIONS]
    for index, node in enumerate(converting):
        rest = "".join(f", {a}" for a in node.args[2:])
        value = describe_value(node, mesh)
        yield f"collective {index + 1}", f"{node.target.__name__} over {node.args[1]}{rest} to {value}"
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_function" and n.target not in CONVERSIONS)
    for name, count in sorted(calls.items()):
        yield re.sub(r" at 0x[0-9a-f]+", "", name), f"{count} times"
