"""What code names: the globals, classes and closures that it may read, and the functions that it calls.

It is found in the code of a model's methods, and in all of the user's code that ran while the model was traced
(``watched``). Code of torch and of Python's library is taken to be what its version says; of other installed packages
the numbers and texts that the first functions name are noted, and no functions.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import gc
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fxshard.capture.held_values import holder_of, is_plain

__all__ = [
    "Named",
    "Place",
    "Ran",
    "is_installed",
    "is_settled",
    "named_by",
    "content_of",
    "place_at",
    "places_of",
    "begin_running",
    "end_running",
    "watched",
]

_EMPTY = object()
_current = threading.local()


class Place(NamedTuple):
    """Where functions find values.

    Attributes:
        where: it is, for a person.
        get: gives the values, by names.
        names: those that are named.
        key: a module's name, and that of a class in it or nothing: the same place in another process. None where no
            name leads there.
    """

    where: str
    get: Callable[[], Any]
    names: tuple[str, ...]
    key: tuple[str, str] | None = None


class Named(NamedTuple):
    """What functions name.

    Attributes:
        places: where they find values.
        words: all names in their code.
    """

    places: tuple[Place, ...]
    words: frozenset[str]


_Found = tuple[str, Callable[[], Any], dict[str, None]]


class Ran:
    """The user's code that ran.

    Attributes:
        spaces: each code object -> the globals of its module.
        cells: of those with closures, what each run found in them.
    """

    def __init__(self) -> None:
        self.spaces: dict[types.CodeType, dict[str, Any]] = {}
        self.cells: dict[types.CodeType, set[tuple[int, ...]]] = {}
        self._functions: list[weakref.ref[types.FunctionType]] | None = None

    def forget(self) -> None:
        """Empties the caches of what was cached meanwhile (``functools.cache``): it has tensors of the trace."""
        spaces = list({id(space): space for space in self.spaces.values()}.values())
        classes = [vars(each) for space in spaces for each in space.values() if isinstance(each, type)]
        for space in (*spaces, *classes):
            for held in space.values():
                code = getattr(getattr(held, "__wrapped__", None), "__code__", None)
                if isinstance(held, functools._lru_cache_wrapper) and code in self.spaces:
                    held.cache_clear()

    @property
    def compares_identity(self) -> bool:
        """Whether code asks if two of its own values are one object: ``context is x``."""
        return any(map(_compares_identity, self.spaces))

    def functions(self) -> list[types.FunctionType]:
        """The functions that have the closures which were found, as far as they are still there."""
        if self._functions is None:  # all objects of the process are looked through
            there = gc.get_referrers(*self.cells) if self.cells else []
            functions = [each for each in there if isinstance(each, types.FunctionType) and each.__code__ in self.cells]
            self._functions = [weakref.ref(each) for each in functions if self._ran_with(each)]
        return [each for ref in self._functions if (each := ref()) is not None]

    def _ran_with(self, function: types.FunctionType) -> bool:
        closure = function.__closure__ or ()
        return tuple(id(content_of(cell)) for cell in closure) in self.cells[function.__code__]


@functools.cache
def _compares_identity(code: types.CodeType) -> bool:
    before = ""
    for each in dis.get_instructions(code):
        if each.opname == "IS_OP" and before not in ("LOAD_CONST", "LOAD_GLOBAL"):
            return True
        before = each.opname
    return False


def _is_made_up(code: types.CodeType, module_name: str | None) -> bool:
    """Whether torch or Python generated some code, which has no module of its own."""
    return code.co_filename[0] == "<" and (module_name is None or module_name.startswith("namedtuple_"))


@contextmanager
def watched() -> Iterator[Ran]:
    """Notes the user's code that this thread runs between ``begin_running`` and ``end_running``."""
    ran, seen, before = Ran(), set[types.CodeType](), sys.gettrace()

    def note(frame: types.FrameType, event: Any, arg: Any) -> Any:
        code = frame.f_code
        if code not in seen:
            name = frame.f_globals.get("__name__")
            if _is_made_up(code, name) or is_settled(name) or is_installed(str(name)):
                seen.add(code)
            else:
                ran.spaces[code] = frame.f_globals
                if code.co_freevars and code.co_freevars != ("__class__",):
                    values = frame.f_locals
                    ran.cells.setdefault(code, set()).add(tuple(id(values.get(n, _EMPTY)) for n in code.co_freevars))
                else:
                    seen.add(code)
        return None if before is None else before(frame, event, arg)

    outer, _current.tracers = getattr(_current, "tracers", None), (note, before)
    try:
        yield ran
    finally:
        sys.settrace(before)
        _current.tracers = outer
        ran.forget()


def begin_running() -> None:
    """From now on this thread runs the model's code: what ``watched`` notes."""
    if (tracers := getattr(_current, "tracers", None)) is not None:
        sys.settrace(tracers[0])


def end_running() -> bool:
    """From now on it runs other code, in which every call would cost as much again; whether it ran the model's."""
    tracers = getattr(_current, "tracers", None)
    if tracers is None or sys.gettrace() is not tracers[0]:
        return False
    sys.settrace(tracers[1])
    return True


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


def places_of(ran: Ran, classes: Iterable[type]) -> Named:
    """What the code that ran names.

    Args:
        ran: the code.
        classes: those of the objects that it may read; of the user's, what of them is named.
    """
    found: dict[int, _Found] = {}
    words = frozenset[str]().union(*map(_names_of, ran.spaces))
    for code, space in ran.spaces.items():
        _note(str(space.get("__name__")), space, _names_of(code), found)
    for function in ran.functions():
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            value = content_of(cell)
            if value is not _EMPTY and name != "__class__":
                found[id(cell)] = (
                    f"{function.__qualname__}.<closure>",
                    functools.partial(_cell, cell, name),
                    {name: None},
                )
                _note_value(name, value, words, found)
    for each in classes:
        _note_class(each, words, found)
    if not words.isdisjoint(("environ", "getenv")):
        found[id(os.environ)] = "os", functools.partial(dict, environ=os.environ), {"environ": None}
    places = tuple(Place(w, get, tuple(names), _key_of(get)) for w, get, names in found.values() if names)
    return Named(places, words)


def place_at(key: tuple[str, str], names: tuple[str, ...]) -> Place | None:
    """The place that has a key in this process; None where there is none."""
    space: Any = sys.modules.get(key[0])
    for part in key[1].split(".") if key[1] else ():
        space = getattr(space, part, None)
    if space is None or not set(names) <= vars(space).keys():
        return None
    return Place(key[1] or key[0], functools.partial(vars, space), names, key)


def _key_of(get: Any) -> tuple[str, str] | None:
    """How another process finds the same place; None where it would not."""
    if get.func is dict:
        return "os", ""
    held = get.args[0]
    if isinstance(held, type):
        return (held.__module__, held.__qualname__) if _is_named(held) else None
    name = held.get("__name__") if isinstance(held, dict) else None
    module = sys.modules.get(name) if isinstance(name, str) else None
    return (str(name), "") if module is not None and vars(module) is held else None


def _is_named(cls: type) -> bool:
    space: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        space = getattr(space, part, None)
    return space is cls


def _note(where: str, space: Mapping[str, Any], names: frozenset[str], found: dict[int, _Found]) -> None:
    """Notes what code finds under its names in a module or in a class, and in what it finds there."""
    here = found.setdefault(id(space), (where, functools.partial(_itself, space), {}))[2]
    for name in sorted(n for n in names & space.keys() if not n.startswith("__") and n not in here):
        value = space[name]
        if not isinstance(value, types.ModuleType):
            here[name] = None
        _note_value(f"{where}.{name}", value, names, found)


def _note_value(where: str, value: Any, names: frozenset[str], found: dict[int, _Found]) -> None:
    if isinstance(value, types.ModuleType):
        if not is_settled(value.__name__) and not is_installed(value.__name__):
            _note(value.__name__, vars(value), names, found)
    elif isinstance(value, type):
        _note_class(value, names, found)
    elif isinstance(value, contextvars.ContextVar):
        found[id(value)] = where, functools.partial(_in_context, value), {"value": None}
    elif isinstance(value, types.FunctionType) and not is_settled(value.__module__):
        attributes: Any = value.__dict__
        if "registry" in attributes and "_clear_cache" in attributes:  # of functools.singledispatch, which has a cache
            attributes = {"registry": attributes["registry"]}
        kept = {"attributes": attributes, "defaults": (value.__defaults__, value.__kwdefaults__)}
        if value.__dict__ or not is_plain(value.__defaults__) or value.__kwdefaults__:
            found[id(value)] = where, functools.partial(_itself, kept), dict.fromkeys(kept)


def _note_class(cls: type, names: frozenset[str], found: dict[int, _Found]) -> None:
    for each in cls.__mro__:
        if not is_settled(each.__module__) and not is_installed(each.__module__):
            held = sorted(n for n in names & vars(each).keys() if not n.startswith("__"))
            place = each.__qualname__, functools.partial(vars, each), dict[str, None]()
            found.setdefault(id(each), place)[2].update(dict.fromkeys(held))


def _in_context(variable: contextvars.ContextVar[Any]) -> dict[str, Any]:
    return {"value": variable.get(None)}


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
        value = content_of(cell)
        if value is not _EMPTY and name != "__class__":
            where = f"{function.__qualname__}.<closure>"
            found[id(cell)] = where, functools.partial(_cell, cell, name), {name: None}
            called += [inner] if (inner := _function_of(value)) is not None else []
    return called


def _tells(value: Any) -> bool:
    return is_plain(value) or holder_of(value) is not None


def _itself(place: Mapping[str, Any]) -> Mapping[str, Any]:
    return place


def _cell(cell: types.CellType, name: str) -> dict[str, Any]:
    return {name: content_of(cell)}


def content_of(cell: types.CellType) -> Any:
    """What a closure's cell holds; a mark of its own where it holds nothing yet."""
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
