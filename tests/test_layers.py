"""Imports go one way: from the words of ``errors`` and ``placement`` up to the surface, as ``LAYERS`` says.

A module imports at its top, from its own layer and from lower ones. What stands under ``if TYPE_CHECKING:`` is for the
type checker and never runs, so it may name what is above it; but no cycle comes of that either.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "fxshard"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# Lowest first. The part is what follows `fxshard.` in a module's name; "" is the package itself.
LAYERS: list[set[str]] = [
    {"errors", "mesh", "placement", "ruler", "torch_internals"},
    {"ranks"},
    {"runtime"},
    {"weights"},
    {"training"},
    {"rules"},
    {"plan"},
    {"ir"},
    {"capture"},
    {"lowerings"},
    {"normal"},
    {"schedule"},
    {"passes"},
    {"cache", "codegen", "inspect"},
    {"program", "compiling", "captures", "parts", "rank_run", "standing_in"},
    {"checkpoint", "gradients", "proof"},
    {"api", "integrations"},
    {"", "__main__"},
]
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


@dataclass(frozen=True)
class Import:
    """One import of a module of fxshard: where it stands, and what it brings."""

    line: int
    target: str
    is_local: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk_running(node: ast.AST, is_local: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement that runs, and whether it stands inside a function."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, is_local
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children = list(node.orelse)
    for child in children:
        yield from walk_running(child, is_local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(
    source: str, name: str, is_package: bool, modules: frozenset[str], for_types: bool = False
) -> list[Import]:
    """The modules of fxshard that ``source`` imports when it runs.

    ``from fxshard.plan import presets`` brings the module ``fxshard.plan.presets`` if there is one, else something
    that ``fxshard.plan`` defines.
    """
    found = []
    tree = ast.parse(source)
    every = ((n, False) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
    for statement, is_local in every if for_types else walk_running(tree):
        targets = [alias.name for alias in statement.names]
        if isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                package = package[: len(package) - statement.level + 1]
                base = ".".join([*package, base] if base else package)
            targets = [f"{base}.{target}" if f"{base}.{target}" in modules else base for target in targets]
        found += [Import(statement.lineno, target, is_local) for target in dict.fromkeys(targets)]
    return [each for each in found if each.target.split(".")[0] == PACKAGE]


def level_of(module: str) -> int | None:
    return LEVELS.get(module.partition(".")[2].partition(".")[0])


def problems_of(name: str, imports: list[Import]) -> list[str]:
    """What breaks the layering, a line each."""
    level = level_of(name)
    if level is None:
        return [f"{name} is in no layer: add it to LAYERS in tests/test_layers.py"]
    problems = []
    for each in imports:
        where = f"{name}:{each.line} imports {each.target}"
        target_level = level_of(each.target)
        if target_level is None:
            problems.append(f"{where}, which is in no layer")
        elif target_level > level:
            problems.append(f"{where}, which is {target_level - level} layer(s) above it")
        if each.is_local:
            problems.append(f"{where} inside a function: import at the top, or under TYPE_CHECKING")
    return problems


def files() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def all_imports(for_types: bool = False) -> dict[str, list[Import]]:
    found, modules = files(), frozenset(files())
    return {
        name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", modules, for_types)
        for name, path in found.items()
    }


def test_every_module_imports_from_its_own_layer_and_lower_ones() -> None:
    problems = [line for name, imports in all_imports().items() for line in problems_of(name, imports)]
    assert not problems, "\n".join(["imports go one way, see docs/contributing.md:", *problems])


def test_there_are_no_import_cycles() -> None:
    graph = {name: {each.target for each in imports} - {name} for name, imports in all_imports(True).items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules import each other: {' <- '.join(error.args[1])}")


def test_the_package_is_found() -> None:
    assert {"fxshard", "fxshard.errors", "fxshard.rules", "fxshard.passes"} <= set(files())
    assert all_imports()["fxshard.mesh"][0].target == "fxshard.errors"


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        (
            "fxshard.mesh",
            "import fxshard.rules.table",
            ["fxshard.mesh:1 imports fxshard.rules.table, which is 5 layer"],
        ),
        ("fxshard.mesh", "from fxshard.rules import table", ["fxshard.mesh:1 imports fxshard.rules.table, which is 5"]),
        ("fxshard.mesh", "from .rules import table", ["fxshard.mesh:1 imports fxshard.rules.table, which is 5 layer"]),
        ("fxshard.mesh", "from . import rules", ["fxshard.mesh:1 imports fxshard.rules, which is 5 layer"]),
        ("fxshard.mesh", "from fxshard import Plan", ["fxshard.mesh:1 imports fxshard, which is 17 layer(s) above"]),
        ("fxshard.mesh", "try:\n  import fxshard\nexcept E: pass", ["fxshard.mesh:2 imports fxshard, which is 17"]),
        ("fxshard.rules.table", "from ..plan.core import Plan", ["fxshard.rules.table:1 imports fxshard.plan.core,"]),
        ("fxshard.api", "def f():\n  import fxshard.mesh", ["fxshard.api:2 imports fxshard.mesh inside a function"]),
        (
            "fxshard.api",
            "class A:\n  async def f(self):\n    from . import mesh",
            ["fxshard.api:3 imports fxshard.mesh"],
        ),
        ("fxshard.api", "from fxshard.misc import x", ["fxshard.api:1 imports fxshard.misc, which is in no layer"]),
        ("fxshard.misc", "", ["fxshard.misc is in no layer"]),
        ("fxshard.rules.table", "import torch, os\nfrom fxshard import mesh\nfrom . import notation", []),
        ("fxshard.mesh", "if TYPE_CHECKING:\n  from fxshard.api import A\nelse:\n  import os", []),
        ("fxshard.mesh", "import typing as t\nif t.TYPE_CHECKING:\n  from fxshard.api import A", []),
        ("fxshard.proof.simulate", "from fxshard.runtime import collectives\nfrom fxshard.passes import pipeline", []),
    ],
)
def test_the_checker_sees(name: str, source: str, expected: list[str]) -> None:
    modules = frozenset({name, "fxshard.mesh", "fxshard.rules", "fxshard.rules.table", "fxshard.rules.notation"})
    problems = problems_of(name, imports_of(source, name, is_package=False, modules=modules))
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)
