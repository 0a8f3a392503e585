"""Programs at random, as Python text: a module, its inputs, and what is returned.

A statement is tried on values of one device as soon as it is drawn, and dropped where it fails, is too large or not
finite. So shapes need no second description, and each program is made of its seed and index alone.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.fuzz import arguments
from tests.fuzz.forms import EXPRESSIONS, MODULES, STATE, STATEMENTS
from tests.fuzz.program import HEADER, Program, Statement, doubles

SHAPES = (
    (4, 6, 8), (12, 24), (6, 8), (5, 7, 8), (2, 3, 4, 4), (8,), (4, 12, 6), (3, 5), (2, 4, 8), (6, 4, 4, 4), (1, 6, 8),
    (7, 12),
)  # fmt: skip
MAX_ELEMENTS = 3000
LARGEST = 1e4


@dataclass
class Maker:
    """A program being made: the statements so far, and the values that they gave."""

    rng: random.Random
    inputs: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.env: dict[str, Any] = {}
        exec(HEADER, self.env)
        self.env["self"] = nn.Module()

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def give(self, name: str, text: str) -> None:
        """An argument of the program."""
        self.inputs[name] = text
        self.env[name] = self.values[name] = eval(text, self.env)

    def floats(self, dims: int | None = None, shape: Any = None) -> list[str]:
        """Values that are floating-point tensors, the latest last."""
        return [
            name for name, v in self.values.items()
            if isinstance(v, torch.Tensor) and v.dtype == torch.float64 and (dims is None or v.dim() == dims)
            and (shape is None or v.shape == shape)
        ]  # fmt: skip

    def pick(self, names: list[str]) -> str | None:
        """One of the names, often the latest."""
        return self.rng.choice(names + names[-1:] * 2) if names else None

    def add(self, text: str, init: str = "") -> bool:
        """Appends a statement if one device can run it."""
        before = {name: v for name, v in self.env.items() if isinstance(v, torch.Tensor)}
        try:
            exec(init, self.env)
            exec(text, self.env)
        except Exception:
            self.env.update(before)
            return False
        statement = Statement(text, init)
        made = {name: self.env[name] for name in statement.names if name in self.env}
        if not all(_fits(value) for value in made.values()):
            return False
        self.statements.append(statement)
        self.values.update(made)
        return True


def _fits(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    if value.numel() > MAX_ELEMENTS or value.dim() > 6 or value.is_sparse:
        return False
    if not value.numel() or not (value.is_floating_point() or value.is_complex()):
        return True
    return bool(value.detach().isfinite().all() and value.detach().abs().max() < LARGEST)


def make(seed: int, index: int) -> Program:
    """Program ``index`` of a seed; it runs on one device."""
    rng = random.Random(f"{seed}-{index}")
    with doubles():
        maker = Maker(rng)
        torch.manual_seed(rng.randrange(2**31))
        _inputs(maker)
        wanted, tries = rng.randint(2, 9), 0
        while len(maker.statements) < wanted and tries < 40:
            tries += 1
            rng.choices((_form, _operator), (3, 1))[0](maker)
        if not maker.statements:
            maker.add("v1 = x + 1")
        return _finish(maker, f"{seed}-{index}")


def _inputs(maker: Maker) -> None:
    rng = maker.rng
    shape = rng.choice(SHAPES)
    grad = ", requires_grad=True" if rng.random() < 0.4 else ""
    maker.give("x", f"torch.randn({', '.join(map(str, shape))}{grad})")
    if rng.random() < 0.3:
        other = shape if rng.random() < 0.6 else shape[1:] or (1,)
        maker.give(
            "y", f"torch.randn({', '.join(map(str, other))}{', requires_grad=True' if rng.random() < 0.3 else ''})"
        )
    if rng.random() < 0.4:
        maker.give("ids", f"torch.randint(0, 16, {(shape * 2)[:2]})")
    if rng.random() < 0.12:
        maker.give("state", rng.choice(("{'h': torch.ones(()), 'n': 0}", "[torch.ones(1), torch.zeros(())]")))


def _finish(maker: Maker, name: str) -> Program:
    rng = maker.rng
    made = [n for n in maker.values if n[0] == "v" and isinstance(maker.values[n], torch.Tensor)]
    text = "\n".join(s.text for s in maker.statements)
    unread = [n for n in made if len(re.findall(rf"\b{n}\b", text)) == 1]
    returned = [n for n in made if rng.random() < (0.75 if n in unread else 0.15)]
    returned = list(dict.fromkeys([*returned, made[-1]])) if made else ["x"]
    form = rng.choices(("tuple", "one", "dict", "list"), (3, 3, 1, 1))[0]
    scaled = "Scaled()" in "".join(s.init for s in maker.statements)
    return Program(name, maker.inputs, tuple(maker.statements), tuple(returned), form, rng.random() < 0.7, scaled)


def _form(maker: Maker) -> bool:
    """A statement of ``forms.py``."""
    rng, state = maker.rng, maker.values.get("state")
    kind = rng.choices((EXPRESSIONS, MODULES, STATEMENTS), (4, 3, 2))[0]
    if state is not None and rng.random() < 0.3:
        kind = STATE["dict" if isinstance(state, dict) else "list"]
    form = rng.choice(kind)
    init, _, call = form.rpartition(" | ") if kind is MODULES else ("", "", form)
    fields = _fields(maker, form)
    if fields is None:
        return False
    text = call.format(**fields)
    if "{o}" not in call:
        text = f"{fields['o']} = {text}"
    inits = [f"{fields['M']} = {init.format(**fields)}"] if init else []
    inits += [t for key, t in fields["inits"].items() if "{" + key + "}" in form]
    done = maker.add(text, "\n".join(inits))
    value = maker.env.get(fields["o"])
    if done and isinstance(value, tuple | list):
        maker.values.pop(fields["o"])
        piece = maker.fresh("v")
        done = maker.add(f"{piece} = {fields['o']}[{rng.randrange(len(value))}]") if value else False
    return done


def _fields(maker: Maker, form: str) -> dict[str, Any] | None:
    """What may stand in a form's braces; None where the program has no value that fits."""
    rng = maker.rng
    wanted = re.search(r"\{a(\d)\}", form)
    a = maker.pick(maker.floats(dims=int(wanted[1]) if wanted else None))
    if a is None or ("{ids}" in form and "ids" not in maker.values):
        return None
    value = maker.values[a]
    shape, ndim = list(value.shape), value.dim()
    d = rng.randrange(ndim) if ndim else 0
    if re.search(r"Norm|Conv|PReLU", form) and ndim > 2:
        d = 1
    n = shape[d] if ndim else 1
    last, out, o = shape[-1] if ndim else 1, rng.choice((4, 8, 6, 3, 5, 12)), maker.fresh("v")
    count = maker.count
    tensors = {"w": f"self.w{count}", "W": f"self.ww{count}", "p": f"self.p{count}", "buf": f"self.buf{count}"}
    inits = {
        "w": f"{tensors['w']} = nn.Parameter(torch.randn({last}))",
        "W": f"{tensors['W']} = nn.Parameter(torch.randn({out}, {last}) / 2)",
        "p": f"{tensors['p']} = nn.Parameter(torch.randn({shape}))",
        "buf": f"self.register_buffer('buf{count}', torch.zeros({last}))",
    }
    broadcasts = [m for m in maker.floats() if _broadcasts(maker.values[m].shape, value.shape)]
    return {
        **tensors,
        **dict.fromkeys(("a", "a1", "a2", "a3", "a4"), a),
        "M": f"self.m{count}",
        "b": maker.pick(maker.floats(shape=value.shape)),
        "c": maker.pick(broadcasts),
        "d": d if rng.random() < 0.5 else d - ndim,
        "e": rng.randrange(-ndim, ndim) if ndim else 0,
        "n": n,
        "k": rng.randrange(n) if n else 0,
        "m": rng.choice((1, 2, 3, 4, max(1, n // 2))),
        "dims": rng.sample(range(ndim), rng.randint(1, ndim)) if ndim else [],
        "last": last,
        "out": out,
        "f": rng.choice((0.25, 0.5, 1.0)),
        "s": shape,
        "ids": "ids",
        "o": o,
        "inits": inits,
    }


def _broadcasts(a: Any, b: Any) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def _operator(maker: Maker) -> bool:
    """A call of one operator, as a sample calls it, on values of the program."""
    rng = maker.rng
    kind = rng.choice(("rules", "known"))
    found = arguments.names()[kind == "known"]
    state = torch.get_rng_state()
    given = arguments.calls(kind, rng.choice(found))
    torch.set_rng_state(state)
    if not given:
        return False
    call, inits, before = rng.choice(given), list[str](), list[str]()
    try:
        args = [_operand(maker, value, inits, before) for value in call.args]
        args += [f"{name}={_operand(maker, value, inits, before)}" for name, value in call.kwargs.items()]
    except arguments.UnfitError:
        return False
    out = maker.fresh("v")
    done = maker.add("\n".join([*before, f"{out} = {call.function}({', '.join(args)})"]), "\n".join(inits))
    value = maker.env.get(out)
    if done and isinstance(value, tuple | list):
        maker.values.pop(out)
        picked = [i for i, v in enumerate(value) if isinstance(v, torch.Tensor)]
        done = maker.add(f"{maker.fresh('v')} = {out}[{rng.choice(picked)}]") if picked else False
    return done


def _operand(maker: Maker, value: Any, inits: list[str], before: list[str]) -> str:
    rng = maker.rng
    if isinstance(value, list | tuple):
        made = ", ".join(_operand(maker, each, inits, before) for each in value)
        return f"[{made}]" if isinstance(value, list) else f"({made},)" if value else "()"
    if not isinstance(value, torch.Tensor):
        return arguments.literal(value)
    if value.layout != torch.strided or value.numel() > MAX_ELEMENTS:
        raise arguments.UnfitError("layout")
    if not value.is_floating_point() and not value.is_complex():
        name = maker.fresh("i")
        inits.append(f"self.register_buffer('{name}', {arguments.integers(value)})")
        return f"self.{name}"
    if value.is_complex():
        half = torch.zeros(value.shape)
        return f"torch.complex({_operand(maker, half, inits, before)}, {_operand(maker, half, inits, before)})"
    text = _like(maker, list(value.shape), inits, before)
    cast = "" if value.dtype == torch.float64 else f".to({value.dtype})"
    return arguments.in_range(text, value) + cast if rng.random() < 0.97 else text + cast


def _like(maker: Maker, shape: list[int], inits: list[str], before: list[str]) -> str:
    """A value of a shape: one of the program's, a part of one, or a weight."""
    rng, same = maker.rng, maker.floats(shape=torch.Size(shape))
    if same and rng.random() < 0.7:
        return str(maker.pick(same))
    count = int(torch.Size(shape).numel())
    large = [n for n in maker.floats() if maker.values[n].numel() >= count]
    if large and rng.random() < 0.6:
        name = maker.fresh("v")
        before.append(f"{name} = {maker.pick(large)}.flatten()[:{count}].reshape({shape})")
        return name
    name = maker.fresh("p")
    kind = "nn.Parameter" if rng.random() < 0.8 else "nn.Buffer"
    inits.append(f"self.{name} = {kind}(torch.randn({shape}))")
    return f"self.{name}"
