"""What a capture reads of Python, and whether that is still as it was.

A model decides by its attributes (``self.alpha``, ``self.config.layers``, ``self.options["act"]``), by what its
functions find in their modules and closures, and by what all of these hold. A capture has the decisions in it. So
whatever was read while it was made is kept beside it, and a call is served by it only while all of that is the same:
numbers, texts and the like by value, all else by being the same object.

    self.scale * x          attribute "scale" of that module
    self.config.act         the object "config", and all that it holds
    FLAGS["causal"]         the global "FLAGS" of the function's module, and all that it holds

What is compared is found in two ways. Attributes of modules are noted as they are read. What functions name is found in
their code (``named.py``). How it is compared: ``values.py``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

from torch import nn

from fxshard.passes.named import Named, is_installed, is_settled, named_by
from fxshard.passes.values import Content, contents, is_plain, same
from fxshard.runtime.module import joined

__all__ = ["OF_MODULES", "Guard", "Read", "Reading", "Reads", "reading"]

OF_MODULES = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
"""What every module has, and the passes look at in their own way."""
_MISSING = object()


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


def _short(value: Any) -> str:
    text = repr(value) if is_plain(value) else f"a {type(value).__qualname__}"
    return text if len(text) < 60 else text[:57] + "..."


Guard = Read | Content


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

    def named(self, model: nn.Module) -> Named:
        """What the methods among what was read name."""
        modules = dict(model.named_modules())
        return named_by({(type(modules[path]), name) for path, names in self.inherited.items() for name in names})

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
                values += [(joined(path, name), vars(modules[path])[name]) for name in kept]
        guards += [_of_children(path, each) for path, each in modules.items() if each._modules]
        for path, names in self.inherited.items():
            for name in names:
                if _is_own_value(type(modules[path]), name) and (path, name) not in but:
                    guards.append(_of_class(path, modules[path], name))
        for where, get, names in self.named(model).places:
            guards.append(Read(where, get, names))
            values += [(f"{where}.{name}", get()[name]) for name in names if not is_installed(where)]
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
    if owner is None or is_settled(owner.__module__) or is_installed(owner.__module__):
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
        return None if module is None else {name: getattr(module, name, _MISSING)}

    return Read(path or type(module).__name__, get, (name,), path)
