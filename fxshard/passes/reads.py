"""What a capture reads of Python, and whether that is still as it was.

A model decides by its attributes (``self.alpha``, ``self.config.layers``, ``self.options["act"]``), by what its
functions find in their modules and closures, and by what all of these hold. A capture has the decisions in it. So
whatever was read while it was made is kept beside it, and a call is served by it only while all of that is the same:
numbers, texts and the like by value, all else by being the same object.

    self.scale * x          attribute "scale" of that module
    self.config.act         the object "config", and all that it holds
    FLAGS["causal"]         the global "FLAGS" of the function's module, and all that it holds

What is compared is found in two ways. Attributes of modules are noted as they are read. What functions name is found in
their code, before anything runs. Code of torch and of Python's library is taken to be what its version says; of other
installed packages the numbers and texts that the model's classes name are compared.
"""

from __future__ import annotations

import enum
import functools
import logging
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn

__all__ = ["OF_MODULES", "Content", "Guard", "Reading", "Reads", "contents", "is_data", "is_plain", "reading", "same"]

PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""What is compared by value."""
_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
           types.MethodType, logging.Logger, torch.Generator)  # fmt: skip
"""What is compared by being the same object."""
OF_MODULES = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
"""What every module has, and the passes look at in their own way."""
LIMIT = 5000
"""Of how many objects the content is compared; of more only that they are the same."""


def is_plain(value: Any) -> bool:
    """Whether a value is compared by value.

    >>> is_plain(1.5), is_plain((1, "a")), is_plain([1])
    (True, True, False)
    """
    if isinstance(value, tuple | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)


def is_data(value: Any) -> bool:
    """Whether a value holds nothing but what is compared by value.

    >>> is_data({"a": [1, 2]}), is_data([torch.ones(1)])
    (True, False)
    """
    if type(value) is dict:
        return all(is_data(key) and is_data(item) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return all(map(is_data, value))
    return is_plain(value)


def same(now: Any, then: Any) -> bool:
    """Whether a value is what it was: the same object, or equal, where it is plain."""
    if now is then:
        return True
    return type(now) is type(then) and is_plain(then) and (now == then or (now != now and then != then))


class Read:
    """Values that were read from one place.

    Attributes:
        where: the place, for a person.
        names: of the values there.
        keys: of attributes of modules: the module's name, and theirs.

    >>> place = {"alpha": 1.0, "other": 2}
    >>> read = Read("the model", lambda: place, ("alpha",))
    >>> place["other"] = 3
    >>> read.holds()
    True
    >>> place["alpha"] = 2.0
    >>> read.holds(), read.changed()
    (False, ['the model.alpha was 1.0, and is 2.0'])
    """

    __slots__ = ("_get", "_take", "_then", "keys", "names", "where")

    def __init__(
        self,
        where: str,
        get: Callable[[], Mapping[str, Any] | None],
        names: tuple[str, ...],
        module: str | None = None,
    ) -> None:
        self.where, self._get, self.names = where, get, names
        self.keys = tuple((module, name) for name in names) if module is not None else ()
        self._take = itemgetter(*names) if len(names) > 1 else lambda place: (place[names[0]],)
        place = get()
        assert place is not None
        self._then: tuple[Any, ...] = self._take(place)

    def holds(self) -> bool:
        """Whether they are as they were; what is gone cannot have changed."""
        place = self._get()
        if place is None:
            return True
        try:
            now = self._take(place)
        except KeyError:
            return False
        if all(map(is_, now, self._then)):
            return True
        if all(map(same, now, self._then)):
            self._then = now  # so that the next look is quick
            return True
        return False

    def changed(self) -> list[str]:
        """What is not as it was, a line each."""
        place = self._get() or {}
        return [
            f"{self.where}.{name} was {_short(then)}, and is {_short(place[name]) if name in place else 'gone'}"
            for name, then in zip(self.names, self._then, strict=True)
            if name not in place or not same(place[name], then)
        ]


class Content:
    """What a list, a dict, or an object held when it was read.

    Attributes:
        where: it is, for a person.
        holder: the list or the dict, or that of the object's attributes.
        steps: from an attribute to it: keys of dicts and lists, and names of attributes.
    """

    __slots__ = ("_keys", "_values", "holder", "keys", "steps", "where")

    def __init__(self, where: str, holder: Any, steps: tuple[Any, ...] = ()) -> None:
        self.where, self.holder, self.keys, self.steps = where, holder, (), steps
        self._keys = tuple(holder) if isinstance(holder, Mapping) else None
        self._values = tuple(holder.values()) if isinstance(holder, Mapping) else tuple(holder)

    def holds(self) -> bool:
        """Whether it holds the same."""
        holder = self.holder
        if len(holder) != len(self._values):
            return False
        if self._keys is not None and not all(map(same, holder, self._keys)):
            return False
        values = holder.values() if self._keys is not None else holder
        return all(map(is_, values, self._values)) or all(map(same, values, self._values))

    def changed(self) -> list[str]:
        """That it is not as it was."""
        return [] if self.holds() else [f"what {self.where} holds has changed"]

    def assigned(self) -> dict[Any, Any] | None:
        """The keys that were given other values since then; None where it changed in another way."""
        if self._keys is None or list(self.holder)[: len(self._keys)] != list(self._keys):
            return None
        then = dict(zip(self._keys, self._values, strict=True))
        return {key: value for key, value in self.holder.items() if key not in then or not same(value, then[key])}

    def restore(self) -> None:
        """Puts back what it held."""
        if self.holds():
            return
        holder = self.holder
        holder.clear()
        if self._keys is not None:
            holder.update(zip(self._keys, self._values, strict=True))
        else:
            (holder.update if isinstance(holder, set) else holder.extend)(self._values)


Guard = Read | Content


def _short(value: Any) -> str:
    text = repr(value) if is_plain(value) else f"a {type(value).__qualname__}"
    return text if len(text) < 60 else text[:57] + "..."


def _holder_of(value: Any) -> Any:
    """The mutable thing whose content tells a value: itself, or what an object's attributes are kept in."""
    if isinstance(value, dict | list | tuple | deque | set):
        return value
    if isinstance(value, _OPAQUE) or is_plain(value) or type(value).__module__.partition(".")[0] == "torch":
        return None
    held = getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else None


def contents(values: Iterable[tuple[str, Any]], steps: Iterable[tuple[Any, ...]] | None = None) -> list[Content]:
    """The content of all that can be reached from values through lists, dicts and plain objects.

    Args:
        values: each with where it is, for a person.
        steps: each one's place, for ``Content.steps``.
    """
    found: list[Content] = []
    met: set[int] = set()
    values = list(values)
    pending = deque(zip(values, steps or [()] * len(values), strict=True))
    while pending and len(met) < LIMIT:
        (where, value), place = pending.popleft()
        holder = _holder_of(value)
        if holder is None or id(holder) in met:
            continue
        met.add(id(holder))
        if not isinstance(holder, tuple):
            found.append(Content(where, holder, place))
        if isinstance(holder, set):
            continue
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        attributes = holder is not value
        for key, item in items:
            name = f"{where}.{key}" if attributes else f"{where}[{key!r}]"
            pending.append(((name, item), (*place, key)))
    return found


# --- what modules are asked for -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a capture read, by names: the same in another process.

    Attributes:
        attributes: a module's name -> the attributes that it holds itself, and were read.
        inherited: a module's name -> what was read of its class.
    """

    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inherited: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def all_of(model: nn.Module) -> Reads:
        """All that there is to read."""
        modules = dict(model.named_modules())
        attributes = {path: tuple(sorted(vars(module).keys() - OF_MODULES)) for path, module in modules.items()}
        inherited = {
            path: tuple(sorted({n for c in type(m).__mro__ if c not in nn.Module.__mro__ for n in vars(c)}))
            for path, m in modules.items()
        }
        return Reads({k: v for k, v in attributes.items() if v}, inherited)

    def methods(self, model: nn.Module) -> set[tuple[type, str]]:
        """The classes and names of the methods among what was read."""
        modules = dict(model.named_modules())
        return {(type(modules[path]), name) for path, names in self.inherited.items() for name in names}

    def asks_for(self, model: nn.Module, *names: str) -> bool:
        """Whether code that ran names one of these."""
        return any(not _names_of(code).isdisjoint(names) for code in _walk(self.methods(model))[1])

    def guards(self, model: nn.Module, but: Container[tuple[str, str]] = ()) -> tuple[Guard, ...]:
        """What tells whether all is as it is now.

        Args:
            model: what was captured.
            but: modules' names, and attributes', that are not looked at.
        """
        modules = dict(model.named_modules())
        guards: list[Guard] = []
        values: list[tuple[str, Any]] = []
        for path, names in self.attributes.items():
            kept = tuple(name for name in names if (path, name) not in but)
            if kept:
                guards.append(_of_module(path, modules[path], kept))
                values += [(f"{path}.{name}".lstrip("."), vars(modules[path])[name]) for name in kept]
        guards += [_of_children(path, each) for path, each in modules.items() if each._modules]
        for path, names in self.inherited.items():
            for name in names:
                if _is_own_value(type(modules[path]), name) and (path, name) not in but:
                    guards.append(_of_class(path, modules[path], name))
        for where, get, names in _walk(self.methods(model))[0]:
            guards.append(Read(where, get, names))
            values += [(f"{where}.{name}", get()[name]) for name in names if not _is_installed(where)]
        return *guards, *contents(values)


class Reading:
    """Which attributes of which modules were read.

    Attributes:
        names: the id of a module -> the attributes that were read of it.
        assigned: likewise, those that were assigned before anything read them.
    """

    def __init__(self) -> None:
        self.names: dict[int, set[str]] = {}
        self.assigned: dict[int, set[str]] = {}

    def of(self, model: nn.Module) -> Reads:
        """What was read of a model and its modules."""
        attributes, inherited = {}, {}
        for path, module in model.named_modules():
            names = self.names.get(id(module), set()) - OF_MODULES - self.assigned.get(id(module), set())
            held = vars(module).keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
            attributes[path] = tuple(sorted(names & vars(module).keys()))
            inherited[path] = tuple(sorted(name for name in names - held if hasattr(type(module), name)))
        return Reads({k: v for k, v in attributes.items() if v}, {k: v for k, v in inherited.items() if v})


def _is_own_value(cls: type, name: str) -> bool:
    """Whether a class, one of the user's, gives its modules a plain value under a name."""
    owner = next((each for each in cls.__mro__ if name in vars(each)), None)
    if owner is None or _is_settled(owner.__module__) or _is_installed(owner.__module__):
        return False
    return is_plain(vars(owner)[name])


@contextmanager
def reading() -> Iterator[Reading]:
    """Notes what this thread reads of modules."""
    noted, here = Reading(), threading.get_ident()
    names, assigned, own = noted.names, noted.assigned, nn.Module.__setattr__

    def get(self: nn.Module, name: str) -> Any:
        if here == threading.get_ident():
            names.setdefault(id(self), set()).add(name)
        return object.__getattribute__(self, name)

    def assign(self: nn.Module, name: str, value: Any) -> None:
        if here == threading.get_ident() and name not in names.get(id(self), ()):
            assigned.setdefault(id(self), set()).add(name)  # what is read from now on was made by forward itself
        own(self, name, value)

    nn.Module.__getattribute__ = get  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = assign  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = own  # type: ignore[method-assign]


# --- what functions name ------------------------------------------------------------------------------------------


_Found = tuple[str, Callable[[], Any], dict[str, None]]


def _is_settled(module_name: str | None) -> bool:
    """Whether a module is torch's, Python's or ours."""
    package = (module_name or "").partition(".")[0]
    return package in ("torch", "fxshard") or package in sys.stdlib_module_names


@functools.cache
def _is_installed(module_name: str) -> bool:
    """Whether a module is of a package that an installer put where it is."""
    path = getattr(sys.modules.get(module_name), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _walk(
    methods: Iterable[tuple[type, str]],
) -> tuple[list[tuple[str, Callable[[], Any], tuple[str, ...]]], list[types.CodeType]]:
    """The globals, and cells, that methods may read, and the functions which these call.

    Args:
        methods: classes, and names of their methods.

    Returns:
        Where each place is, what gives it, and the names there; and the code of the functions.
    """
    found: dict[int, _Found] = {}
    met: set[types.FunctionType] = set()
    pending: list[types.FunctionType] = []
    for cls, name in methods:
        for each in cls.__mro__:
            function = _function_of(vars(each).get(name))
            if function is not None and not _is_settled(each.__module__):
                pending.append(function)
                if not _is_installed(each.__module__):
                    place = each.__qualname__, functools.partial(vars, each), dict[str, None]()
                    found.setdefault(id(each), place)[2][name] = None
    while pending:
        function = pending.pop()
        if function not in met and not _is_settled(function.__module__):
            met.add(function)
            called = _globals_of(function, found) + _cells_of(function, found)
            pending += [] if _is_installed(function.__module__) else called
    places = [(where, get, tuple(names)) for where, get, names in found.values() if names]
    return places, [each.__code__ for each in met]


def _globals_of(function: types.FunctionType, found: dict[int, _Found]) -> list[types.FunctionType]:
    """Notes what a function finds in modules; returns the functions among it."""
    names, space = _names_of(function.__code__), function.__globals__
    places = {str(space.get("__name__")): space}
    for value in [space[name] for name in names & space.keys()]:
        if isinstance(value, types.ModuleType) and not _is_settled(value.__name__):
            places[value.__name__] = vars(value)
    called = []
    for where, place in places.items():
        for name in sorted(n for n in names & place.keys() if not n.startswith("__")):
            inner = _function_of(place[name])
            if inner is not None:
                called.append(inner)
            if is_plain(place[name]) or not (_is_installed(where) or (inner is None and not _tells(place[name]))):
                found.setdefault(id(place), (where, functools.partial(_itself, place), {}))[2][name] = None
    return called


def _cells_of(function: types.FunctionType, found: dict[int, _Found]) -> list[types.FunctionType]:
    """Notes what a function finds in its closure; returns the functions among it."""
    called = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = _content(cell)
        if value is not _OPAQUE and name != "__class__":
            where = f"{function.__qualname__}.<closure>"
            found[id(cell)] = where, functools.partial(_cell, cell, name), {name: None}
            called += [inner] if (inner := _function_of(value)) is not None else []
    return called


def _tells(value: Any) -> bool:
    return is_plain(value) or _holder_of(value) is not None


def _itself(place: dict[str, Any]) -> dict[str, Any]:
    return place


def _cell(cell: types.CellType, name: str) -> dict[str, Any]:
    return {name: _content(cell)}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _OPAQUE


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


def _of_module(path: str, module: nn.Module, names: tuple[str, ...]) -> Read:
    """Attributes of a module, which may go: then they cannot change."""
    there = weakref.ref(module)

    def get() -> Mapping[str, Any] | None:
        module = there()
        return None if module is None else vars(module)

    return Read(path or type(module).__name__, get, names, path)


def _of_children(path: str, module: nn.Module) -> Read:
    """Which modules a module consists of."""
    there = weakref.ref(module)

    def get() -> Mapping[str, Any] | None:
        module = there()
        return None if module is None else {"children": tuple(map(id, module._modules.values()))}

    return Read(path or type(module).__name__, get, ("children",))


def _of_class(path: str, module: nn.Module, name: str) -> Read:
    """An attribute of a module's class, as the module has it."""
    there = weakref.ref(module)

    def get() -> Mapping[str, Any] | None:
        module = there()
        return None if module is None else {name: getattr(module, name, _OPAQUE)}

    return Read(path or type(module).__name__, get, (name,), path)
