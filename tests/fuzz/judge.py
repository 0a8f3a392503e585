"""What becomes of one program under one plan: four calls, each compared with the original model on one device.

    first        in the program's mode, with gradients
    other        other values of the same shapes
    no_grad      without gradients
    other mode   train -> eval, or eval -> train, with gradients

Compared are outputs and their types, the gradients of all parameters and inputs, buffers and inputs afterwards, and the
random stream. The original is the unmodified model, never its capture.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxshard
from fxshard.errors import FxshardError
from fxshard.ruler import compare
from tests.fuzz.plans import read
from tests.fuzz.program import Program, doubles

ZEROS = "is zeros, and should be none"
CALLS = ("first", "other", "no_grad", "other mode")
FLOOR = 1e-15
"""What numbers of about one, which all programs begin with, may leave of a zero."""
NUDGE = 1e-14
"""How far weights and inputs are moved to find out whether a program can be compared at all."""


@dataclass(frozen=True)
class Verdict:
    """What became of it.

    Attributes:
        kind: right, refused, silent, raw error, hang, unstable (rounding alone moves it so far), or invalid (one device
            does not run it). Zeros: a gradient is zeros where PyTorch gives none, or an output has none where it would
            be zero.
        call: which of the calls showed it.
        details: the differences, or the error.
    """

    kind: str
    plan: str = ""
    call: str = ""
    details: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether it must not be."""
        return self.kind in ("silent", "raw error", "hang")


@dataclass
class Outcome:
    """What one call gave: tensors by name, and everything else by name."""

    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Everything in a tree of values."""
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value.detach().clone()
        elif isinstance(value, Mapping):
            self.facts[f"{name} is"] = (type(value).__name__, list(value))
            for key, item in value.items():
                self.note(f"{name}[{key!r}]", item)
        elif isinstance(value, list | tuple):
            self.facts[f"{name} is"] = (type(value).__name__, len(value))
            for index, item in enumerate(value):
                self.note(f"{name}[{index}]", item)
        else:
            self.facts[name] = value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a tree."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def loss_of(output: Any) -> torch.Tensor:
    """A scalar that every element of every differentiable output moves by a weight of its own."""
    terms = [torch.zeros(())]
    for index, tensor in enumerate(tensors_in(output)):
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            weights = torch.linspace(-1 - index, 1, real.numel(), dtype=real.dtype).cos().reshape(real.shape)
            terms.append((real * weights).sum().to(torch.float64) / max(1, real.numel()) ** 0.5)
    return torch.stack(terms).sum()


def _differentiable(output: Any) -> bool:
    return any(t.requires_grad for t in tensors_in(output))


@dataclass
class Trial:
    """A program's module, and the inputs of its four calls."""

    program: Program

    def __post_init__(self) -> None:
        made = self.program.load()
        torch.manual_seed(1)
        self.model: nn.Module = made.Net().train(self.program.training)
        self.given = []
        for seed in (2, 3, 4, 2):
            torch.manual_seed(seed)
            self.given.append(made.inputs())

    def shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the parameters and buffers, and of the inputs that are tensors."""
        params = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        inputs = {name: tuple(v.shape) for name, v in self.given[0].items() if isinstance(v, torch.Tensor)}
        return params, inputs

    def original(self, nudge: float = 0.0, single: bool = False) -> list[Outcome]:
        """The outcome of each call on one device; ``single``: in float32."""
        model, given = copy.deepcopy((self.model, self.given))
        if single:
            torch.set_default_dtype(torch.float32)  # ``doubles`` puts it back
            model, given = model.float(), [{n: _single(v) for n, v in inputs.items()} for inputs in given]
        if nudge:
            _move([*model.parameters(), *model.buffers(), *tensors_in(given)], nudge)
        out = []
        for call, inputs in zip(CALLS, given, strict=True):
            with self._prepared(call, model):
                outputs = model(**inputs)
                out.append(_outcome([outputs], inputs, call))
                if call != "no_grad" and _differentiable(outputs):
                    loss_of(outputs).backward()
                _gradients(out[-1], {n: p.grad for n, p in model.named_parameters()}, inputs)
                buffers = dict(model.named_buffers())
            out[-1].note("buffer", buffers)
            out[-1].tensors["random stream"] = torch.get_rng_state()
        return out

    def simulated(self, text: str, out: list[Outcome]) -> None:
        """Appends the outcome of each call under a plan."""
        plan, options = read(text)
        given = copy.deepcopy(self.given)
        model = copy.deepcopy(self.model)
        names = [name for name, _ in model.named_buffers()]
        program = fxshard.parallelize(model, plan, (), dict(copy.deepcopy(given[0])), **options)
        for call, inputs in zip(CALLS, given, strict=True):
            with self._prepared(call, program):
                run = fxshard.simulate(program, **inputs)
                made = _outcome(run.outputs, inputs, call)
                grads: Mapping[str, torch.Tensor] = {}
                if call != "no_grad" and _differentiable(run.outputs[0]):
                    run.backward(loss_of)
                    grads = run.full_grads()
                state = program.full_state_dict()
                _gradients(made, {n: grads.get(n) for n, _ in self.model.named_parameters()}, inputs)
                shown = dict(program.named_buffers())
                buffers = {name: state[name] if name in state else shown[name] for name in names}
            made.note("buffer", buffers)
            made.tensors["random stream"] = torch.get_rng_state()
            out.append(made)

    @contextlib.contextmanager
    def _prepared(self, call: str, model: nn.Module) -> Iterator[None]:
        if call == "other" and self.program.gain:
            for module in model.modules():
                if hasattr(module, "gain"):
                    module.gain, module.options["act"] = 0.75, "sin"  # type: ignore[assignment, operator, index]
        if call == "other mode":
            model.train(not self.program.training)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with torch.set_grad_enabled(call != "no_grad"):
            yield


def _single(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().float().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _single(item) for key, item in value.items()}
    return [_single(item) for item in value] if isinstance(value, list) else value


def _move(tensors: list[torch.Tensor], nudge: float) -> None:
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(index)
                tensor.mul_(1 + nudge * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def _outcome(outputs: list[Any], inputs: Any, call: str) -> Outcome:
    """What every rank returned (one device is one rank), and what the inputs hold now."""
    made = Outcome()
    for rank, output in enumerate(outputs):
        made.note(f"output of rank {rank}", output)
        needs = [] if call == "no_grad" else [t.requires_grad for t in tensors_in(output)]  # views keep theirs at times
        made.facts[f"differentiable, rank {rank}"] = needs
    made.note("input afterwards", inputs)
    return made


def _gradients(made: Outcome, params: Mapping[str, torch.Tensor | None], inputs: Any) -> None:
    made.tensors |= {f"gradient of {n}": None if g is None else g.detach().clone() for n, g in params.items()}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_leaf:
            grad = value.grad
            made.tensors[f"gradient of input {name}"] = None if grad is None else grad.detach().clone()


def differences(
    got: Outcome, want: Outcome, single: Callable[[], Outcome | None] = lambda: None
) -> list[tuple[str, str]]:
    """The names of what differs, and how; ``single`` gives what is wanted in float32, to tell what is rounding."""
    ranks = sum(name.startswith("differentiable, rank") for name in got.facts)
    rows = [(n, got.tensors.get(n), w) for n, w in _of_ranks(want.tensors, ranks).items()]

    def again() -> list[Any] | None:
        made = single()
        tensors = None if made is None else _of_ranks(made.tensors, ranks)
        return None if tensors is None else [tensors.get(name) for name, _, _ in rows]

    found = [
        (row.name, f"off by {row.error:.1e}, {'it should be none' if row.shape == 'none' else f'of shape {row.shape}'}")
        for row in compare(rows, again=again, floor=FLOOR) if not row.ok
    ]  # fmt: skip
    known = {name for name, _ in found}
    found += [(n, ZEROS) for n, g, w in rows if g is not None and w is None and n not in known]
    facts = _of_ranks(want.facts, ranks)
    found += [(n, f"{got.facts.get(n)!r}, not {w!r}") for n, w in facts.items() if got.facts.get(n) != w]
    extra = (got.tensors.keys() | got.facts.keys()) - _of_ranks(want.tensors | want.facts, ranks).keys()
    return found + [(n, "is not of the original") for n in sorted(extra)]


def _of_ranks(found: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """What one device returned, as what every rank should return."""
    out = {}
    for name, value in found.items():
        for rank in range(ranks) if "rank 0" in name else (0,):
            out[name.replace("rank 0", f"rank {rank}")] = value
    return out


def judge(program: Program, choose: Callable[[Trial], list[str]]) -> list[Verdict]:
    """A verdict for each of the plans that ``choose`` gives."""
    with doubles():
        try:
            trial = Trial(program)
            want = trial.original()
            plans = choose(trial)
        except Exception as error:
            return [Verdict("invalid", details=(f"{type(error).__name__}: {error}",))]
        return [_judge(trial, want, plan) for plan in plans]


def _judge(trial: Trial, want: list[Outcome], plan: str) -> Verdict:
    got: list[Outcome] = []
    error: Exception | None = None
    try:
        trial.simulated(plan, got)
    except Exception as raised:
        error = raised
    for place, (call, mine, theirs) in enumerate(zip(CALLS, got, want, strict=False)):
        found = differences(mine, theirs, lambda place=place: _in_single(trial, place))  # type: ignore[misc]
        if found:
            kind = "silent"
            if all(how == ZEROS or name.startswith("differentiable") for name, how in found):
                kind = "zeros"
            elif _unstable(trial, want, {name for name, _ in found}) or _rounding(trial, place, mine, theirs, found):
                kind = "unstable"
            return Verdict(kind, plan, call, tuple(f"{name}: {how}" for name, how in found))
    if error is None:
        return Verdict("right", plan)
    where = traceback.extract_tb(error.__traceback__)[-4:]
    lines = (f"{type(error).__name__}: {error}", *(f"{f.filename}:{f.lineno} in {f.name}" for f in where))
    return Verdict("refused" if isinstance(error, FxshardError) else "raw error", plan, CALLS[len(got)], lines)


def _in_single(trial: Trial, place: int) -> Outcome | None:
    try:
        with doubles():
            return trial.original(single=True)[place]
    except Exception:  # it asks for float64 by name
        return None


class _Rounded(TorchDispatchMode):
    """What every operator reads, backward too, is moved by ``NUDGE``, each number by a draw of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if all(value.alias_info is None for value in (*func._schema.returns, *func._schema.arguments)):
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._moved, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return value * (1 + NUDGE * torch.randn(value.shape, generator=self.generator, dtype=value.dtype))


def _rounding(trial: Trial, place: int, got: Outcome, want: Outcome, found: list[tuple[str, str]]) -> bool:
    """Whether one device differs as much by the rounding of its own operators (a norm of equal numbers is none but
    rounding, however its inputs are moved)."""
    if "torch.cond(" in trial.program.source():  # under a mode of ours it fails, and fails from then on
        return False
    try:
        with _Rounded():
            rounded = trial.original()[place].tensors
    except Exception:  # what an operator cannot bear to be moved
        return False
    ranks = sum(name.startswith("differentiable, rank") for name in got.facts)
    wanted, moved = _of_ranks(want.tensors, ranks), _of_ranks(rounded, ranks)
    errors = [(_apart(got.tensors.get(n), wanted.get(n)), _apart(moved.get(n), wanted.get(n))) for n, _ in found]
    return all(mine <= 20 * noise < float("inf") for mine, noise in errors)


def _apart(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """How far two tensors are apart at most, or infinity."""
    if mine is None or theirs is None or mine.shape != theirs.shape or not theirs.is_floating_point():
        return float("inf")
    return float((mine - theirs).abs().max().nan_to_num(float("inf"))) if mine.numel() else 0.0


def _unstable(trial: Trial, want: list[Outcome], names: set[str]) -> bool:
    """Whether moving everything by rounding alone moves one of these tensors as well."""
    for mine, theirs in zip(trial.original(NUDGE), want, strict=True):
        if {name for name, _ in differences(mine, theirs)} & names:
            return not all(name.startswith(("input afterwards", "random")) for name in names)
    return False
