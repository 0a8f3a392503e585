"""What the tracing of a model took for granted of dynamic sizes.

A model may branch on a size: ``if x.shape[0] % 2 == 0``. The capture follows the branch that the example took, so it is
the model only where the same condition holds. Export refuses a named ``Dim`` of which it does not; of a ``Dim.AUTO`` it
keeps the condition beside the graph. A call whose sizes break it must not run the graph.

    x.shape[0] in 2..64                    a range: ``Captured.ranges``
    x.shape[0] % 2 == 0, x.shape[0] != 6   guards: here
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from fxshard.torch_internals import FakeTensor


def guards_of(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    """The conditions that tracing met, beyond the ranges of sizes; those that always hold are left out."""
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    shapes = next((mode.shape_env for mode in modes if mode.shape_env is not None), None)
    found = [shapes.simplify(guard.expr) for guard in shapes.guards] if shapes is not None else []
    return tuple(dict.fromkeys(guard for guard in found if guard.free_symbols))


def broken(guards: tuple[Any, ...], sizes: Mapping[Any, int], places: Mapping[Any, tuple[str, int]]) -> list[str]:
    """What these sizes break, a line each.

    Args:
        guards: the conditions.
        sizes: the symbols' values in a call.
        places: symbol -> the input whose size it is, and its dim.

    >>> a, b = sympy.symbols("a b")
    >>> broken((sympy.Ne(a, 6), a < b), {a: 6, b: 9}, {a: ("x", 0), b: ("y", 1)})
    ['x.shape[0] is 6, but the graph holds only where x.shape[0] != 6']
    """
    names = {symbol: f"{path}.shape[{dim}]" for symbol, (path, dim) in places.items()}
    problems = []
    for guard in guards:
        if guard.subs(sizes) == sympy.false:  # what cannot be decided is not false
            symbols = sorted(guard.free_symbols & names.keys(), key=str)
            given = " and ".join(f"{names[symbol]} is {sizes[symbol]}" for symbol in symbols)
            said = guard.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()})
            problems.append(f"{given}, but the graph holds only where {readable(said)}")
    return problems


def readable(guard: Any) -> str:
    """A condition as Python writes it.

    >>> a, b = sympy.symbols("a b", integer=True)
    >>> readable(sympy.Ne(a, 6)), readable(sympy.Eq(a % 2, 0)), readable(a + 1 < b)
    ('a != 6', 'a % 2 == 0', 'a + 1 < b')
    """
    signs = {sympy.Eq: "==", sympy.Ne: "!="}
    sign = next((sign for kind, sign in signs.items() if isinstance(guard, kind)), "")
    if type(guard).__name__ in ("Mod", "PythonMod"):
        sign = "%"
    return f" {sign} ".join(map(readable, guard.args)) if sign else str(guard)
