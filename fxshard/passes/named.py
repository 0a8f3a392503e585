"""What functions name: the globals and closures that they may read, and the functions that they call.

It is found in their code, and nothing runs. Code of torch and of Python's library is taken to be what its version says;
of other installed packages the numbers and texts that the first functions name are noted, and no functions.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fxshard.passes.values import holder_of, is_plain

__all__ = ["Named", "Place", "is_installed", "is_settled", "named_by"]

_EMPTY = object()


class Place(NamedTuple):
    """Where functions find values.

    Attributes:
        where: it is, for a person.
        get: gives the values, by names.
        names: those that are named.
    """

    where: str
    get: Callable[[], Any]
    names: tuple[str, ...]


class Named(NamedTuple):
    """What functions name.

    Attributes:
        places: where they find values.
        words: all names in their code.
    """

    places: tuple[Place, ...]
    words: frozenset[str]


_Found = tuple[str, Callable[[], Any], dict[str, None]]


def is_settled(module_name: str | None) -> bool:
    """Whether a module is torch's, Python's or ours."""
    package = (module_name or "").partition(".")[0]
    return package in ("torch", "fxshard") or package in sys.stdlib_module_names


@functools.cache
def is_installed(module_name: str) -> bool:
    """Whether a module is of a package that an installer put where it is."""
    path = getattr(sys.modules.get(module_name), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def named_by(methods: Iterable[tuple[type, str]]) -> Named:
    """What methods name, and the functions which these call.

    Args:
        methods: classes, and names of their methods.
    """
    found: dict[int, _Found] = {}
    met: set[types.FunctionType] = set()
    pending: list[types.FunctionType] = []
    for cls, name in methods:
        for each in cls.__mro__:
            function = _function_of(vars(each).get(name))
            if function is not None and not is_settled(each.__module__):
                pending.append(function)
                if not is_installed(each.__module__):
                    place = each.__qualname__, functools.partial(vars, each), dict[str, None]()
                    found.setdefault(id(each), place)[2][name] = None
    while pending:
        function = pending.pop()
        if function not in met and not is_settled(function.__module__):
            met.add(function)
            called = _globals_of(function, found) + _cells_of(function, found)
            pending += [] if is_installed(function.__module__) else called
    places = tuple(Place(where, get, tuple(names)) for where, get, names in found.values() if names)
    return Named(places, frozenset().union(*(_names_of(each.__code__) for each in met)))


def _globals_of(function: types.FunctionType, found: dict[int, _Found]) -> list[types.FunctionType]:
    """Notes what a function finds in modules; returns the functions among it."""
    names, space = _names_of(function.__code__), function.__globals__
    places = {str(space.get("__name__")): space}
    for value in [space[name] for name in names & space.keys()]:
        if isinstance(value, types.ModuleType) and not is_settled(value.__name__):
            places[value.__name__] = vars(value)
    called = []
    for where, place in places.items():
        for name in sorted(n for n in names & place.keys() if not n.startswith("__")):
            inner = _function_of(place[name])
            if inner is not None:
                called.append(inner)
            if is_plain(place[name]) or not (is_installed(where) or (inner is None and not _tells(place[name]))):
                found.setdefault(id(place), (where, functools.partial(_itself, place), {}))[2][name] = None
    return called


def _cells_of(function: types.FunctionType, found: dict[int, _Found]) -> list[types.FunctionType]:
    """Notes what a function finds in its closure; returns the functions among it."""
    called = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = _content(cell)
        if value is not _EMPTY and name != "__class__":
            where = f"{function.__qualname__}.<closure>"
            found[id(cell)] = where, functools.partial(_cell, cell, name), {name: None}
            called += [inner] if (inner := _function_of(value)) is not None else []
    return called


def _tells(value: Any) -> bool:
    return is_plain(value) or holder_of(value) is not None


def _itself(place: dict[str, Any]) -> dict[str, Any]:
    return place


def _cell(cell: types.CellType, name: str) -> dict[str, Any]:
    return {name: _content(cell)}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _EMPTY


def _function_of(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__wrapped__", value) if callable(value) and not isinstance(value, type) else value
    for inner in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        if isinstance(inner, types.FunctionType):
            return inner
    return None


@functools.cache
def _names_of(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_of(constant)
    return frozenset(names)
