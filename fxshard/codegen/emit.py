"""The Python source that a rank runs: the user's tree of modules, as classes over this rank's weights.

In: the final graph.   Out: source such as

    class Mlp:
        def __init__(self, m):
            self.up, self.down = ...

        def __call__(self, x):
            # mlp.py:6: y = self.down(F.relu(self.up(x)))
            up = F.linear(x, self.up.weight)  # f32[8, 64]  tp: Shard(1)
            ...

Calls that compute the same are one class: equal operators on equal types, with the weights of their own modules. The
statements stand in the order of the graph, so that all ranks issue the same collectives in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap

from torch import fx

from fxshard.codegen.body import Body, File
from fxshard.codegen.classes import Classes
from fxshard.codegen.members import made
from fxshard.codegen.naming import RESERVED
from fxshard.codegen.regions import regions_of
from fxshard.codegen.spelling import OURS, is_ours
from fxshard.codegen.text import WIDTH, in_docstring, quoted, statement
from fxshard.mesh import Mesh
from fxshard.runtime.module import is_word

_WORD = re.compile(r"(?<![\w.\"'])[A-Za-z_]\w*")
HELPERS = {
    "checkpoint": "fxshard.runtime.recompute",
    "find": "fxshard.runtime.module",
    "overwrite": "fxshard.runtime.hidden_writes",
}
"""Functions that generated code calls, beside those of its nodes, and where they are."""
WORDS = {"self", "m", "aten", "torch", "F", "operator", "math", "device", "axes", "build", *HELPERS}
WORDS |= {word for module in OURS.values() for word in dir(module)}


def emit(graph: fx.Graph, mesh: Mesh, title: str, is_uneven: bool = False) -> str:
    """The source of a module with a function ``build(m)``: the model over the local weights ``m``, to be called.

    Every statement says what it gives: local type and placement; above it stands the user's line that it comes from.
    Mesh axes and ``device`` are names that ``runtime.module.load`` supplies.
    """
    taken = WORDS | RESERVED | set(mesh.names)
    classes = Classes(regions_of(graph), mesh, taken)
    file = File(
        mesh,
        classes,
        {a: a if is_word(a) and a not in RESERVED | WORDS else f"axes[{quoted(a)}]" for a in mesh.names},
        frozenset(taken | {each.name for each in classes.all}),
        graph.find_nodes(op="placeholder"),
        next(iter(reversed(graph.nodes))),
        is_uneven=is_uneven,
    )
    body = [line for each in classes.all for line in ("", "", *Body(file, each).lines())]
    body += ["", "", "def build(m):", '    """The model over one rank\'s weights."""']
    body += [f"    return {made(classes.all[-1], 'm')}"]
    return "\n".join([*_head(title, graph, file, body), *body]) + "\n"


def _head(title: str, graph: fx.Graph, file: File, body: Sequence[str]) -> Iterator[str]:
    """The lines above the classes: the title, what is imported, where the other names come from."""
    code = [line.partition("  # ")[0] for line in body if not line.lstrip().startswith(("#", '"""'))]
    words = {word for line in code for word in _WORD.findall(line)}
    yield f'"""{in_docstring(title)}"""'
    modules = file.imports | ({"torch"} if words & {"torch", "aten"} else set())
    for at, group in enumerate((sorted(modules - {"torch"}), sorted(modules & {"torch"}))):
        lines = [f"import {name}" for name in group]
        lines += ["from torch.nn import functional as F"] if at and "F" in words else []
        yield from ["", *lines] if lines else ()
    used = {module: {name} for name, module in HELPERS.items() if name in words}
    for node in graph.nodes:
        if is_ours(node.target):
            used.setdefault(node.target.__module__, set()).add(node.target.__name__)
    yield from [""] if used else ()
    for module in sorted(used):
        names = ", ".join(sorted(used[module]))
        line = f"from {module} import {names}"
        yield from [line] if len(line) <= WIDTH else statement(0, f"from {module} import ({names})")
    if "aten" in words:
        yield from ["", "aten = torch.ops.aten"]
    given = [
        f"{name}, the Axis of {size} ranks" + (f" of mesh dimension {axis}" if name != axis else "")
        for (axis, name), size in zip(file.axes.items(), file.mesh.sizes, strict=True)
        if _WORD.findall(name)[0] in words
    ]
    given += ["device, where this rank computes"] if "device" in words else []
    if given:
        yield ""
        yield from (f"# {line}" for line in wrap(f"fxshard.runtime.module.load gives: {'; '.join(given)}.", WIDTH - 2))
