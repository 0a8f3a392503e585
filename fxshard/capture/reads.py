"""What a capture reads of Python, and whether that is still as it was.

A model decides by its attributes (``self.alpha``, ``self.config.layers``, ``self.options["act"]``), by what its
functions find in their modules and closures, and by what all of these hold. A capture has the decisions in it. So
whatever was read while it was made is kept beside it, and a call is served by it only while all of that is the same:
numbers, texts and the like by value, all else by being the same object.

    self.scale * x             attribute "scale" of that module
    getattr(self, "k", 1)      that it has none, where it has none
    self.config.act            the object "config", and all that it holds
    FLAGS["causal"]            the global "FLAGS" of the function's module, and all that it holds
    type(self).depth           the attribute of the class

What is compared is found in two ways. Attributes of modules are noted as they are read. What code names is found in the
code: of the methods, and of all of the user's functions that ran (``named.py``). How it is compared: ``values.py``. And
a module is what it was while it has the class, the children and the hooks that it had.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn

from fxshard.capture.code_names import (
    Named,
    Place,
    Ran,
    is_installed,
    is_settled,
    named_by,
    place_at,
    places_of,
    watched,
)
from fxshard.capture.held_values import Content, contents, is_plain, kinds_of, same
from fxshard.errors import CaptureError
from fxshard.runtime.module import joined
from fxshard.torch_internals import FakeTensor

__all__ = ["OF_MODULES", "Guard", "Read", "Reading", "Reads", "check_kept", "check_unread", "reading"]

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


class Absent:
    """That a module lacks attributes which were asked for.

    >>> module = nn.Linear(1, 1)
    >>> absent = Absent("", module, ("gain",))
    >>> absent.holds()
    True
    >>> module.gain = 2.0
    >>> absent.changed()
    ['Linear has gain, which it had not']
    """

    __slots__ = ("_there", "keys", "names", "where")

    def __init__(self, path: str, module: nn.Module, names: tuple[str, ...]) -> None:
        self.where, self.names = path or type(module).__name__, names
        self.keys = tuple((path, name) for name in names)
        self._there = weakref.ref(module)

    def _found(self) -> list[str]:
        module = self._there()
        return [] if module is None else [name for name in self.names if _has(module, name)]

    def holds(self) -> bool:
        """Whether it still does."""
        return not self._found()

    def changed(self) -> list[str]:
        """What it has, a line each."""
        return [f"{self.where} has {name}, which it had not" for name in self._found()]


def _has(module: nn.Module, name: str) -> bool:
    tables = (vars(module), module._parameters, module._buffers, module._modules)
    return any(name in table for table in tables) or hasattr(type(module), name)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


class Structure:
    """Which modules a model consists of, of which classes, and with which hooks, those of all modules included.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> structure = Structure(model)
    >>> structure.holds()
    True
    >>> handle = model[0].register_forward_hook(print)
    >>> structure.changed()
    ['hooks of 0: not as it was']
    """

    keys: tuple[tuple[str, str], ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._paths = [path for path, _ in model.named_modules()]
        self._then = [(weakref.ref(module), *_structure_of(module)) for module in model.modules()]
        self._hooks = _hooks_of(vars(nn.modules.module), _GLOBAL_HOOKS)

    def holds(self) -> bool:
        """Whether all is as it was; what is gone cannot have changed."""
        if self._model() is None:
            return True
        for there, cls, children, forward, hooks in self._then:  # written out: it is asked at every call
            module = there()
            if module is None:
                continue
            held = module.__dict__
            if type(module) is not cls or held.get("forward") is not forward:
                return False
            inside = held["_modules"]
            if (inside or children) and tuple(map(id, inside.values())) != children:
                return False
            hooked = held["_forward_hooks"] or held["_forward_pre_hooks"]
            hooked = hooked or held["_backward_hooks"] or held["_backward_pre_hooks"]
            if (hooked or hooks) and _hooks_of(held, _HOOKS) != hooks:
                return False
        return _hooks_of(vars(nn.modules.module), _GLOBAL_HOOKS) == self._hooks

    def changed(self) -> list[str]:
        """What is not as it was, a line each."""
        if self._model() is None:
            return []
        found = [
            f"{word} of {path or 'the model'}: not as it was"
            for path, (there, *then) in zip(self._paths, self._then, strict=True)
            if (module := there()) is not None
            for word, a, b in zip(("class", "children", "forward", "hooks"), _structure_of(module), then, strict=True)
            if a != b
        ]
        same_hooks = _hooks_of(vars(nn.modules.module), _GLOBAL_HOOKS) == self._hooks
        return found if same_hooks else [*found, "hooks of all modules: not as they were"]


def _structure_of(module: nn.Module) -> tuple[type, tuple[int, ...], Any, tuple[int, ...]]:
    held = vars(module)
    return type(module), tuple(map(id, held["_modules"].values())), held.get("forward"), _hooks_of(held, _HOOKS)


def _hooks_of(held: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(id(hook) for name in names if held[name] for hook in held[name].values())


class Asked:
    """Values inside tensors that are no inputs, which the model decided by."""

    keys: tuple[tuple[str, str], ...] = ()

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._then = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def holds(self) -> bool:
        """Whether nobody wrote to them since."""
        return all(tensor._version == version for tensor, version in self._then)

    def changed(self) -> list[str]:
        """Of which size those are that were written to, a line each."""
        shapes = [list(tensor.shape) for tensor, version in self._then if tensor._version != version]
        return [f"a tensor of shape {shape}, by which forward decides, was written to" for shape in shapes]


def check_kept(guards: Iterable[Guard]) -> None:
    """Raises where forward kept tensors of the trace in what it reads, and takes them out.

    Raises:
        CaptureError: a list or a dict outside of the model's modules holds what was put there while it was traced.
    """
    where = ""
    for guard in (each for each in guards if isinstance(each, Content)):
        holder = guard.holder
        if isinstance(holder, dict):
            for key in [key for key, value in holder.items() if isinstance(value, FakeTensor)]:
                del holder[key]
                where = guard.where
        elif isinstance(holder, list) and any(isinstance(value, FakeTensor) for value in holder):
            holder[:] = [value for value in holder if not isinstance(value, FakeTensor)]
            where = guard.where
    if where:
        raise CaptureError(
            f"forward keeps tensors in {where}, where later calls would find them: a program does not",
            fix="return them from forward, or keep them in buffers; a table that is always the same can be a buffer "
            "made in __init__",
        )


def check_unread(guards: Iterable[Guard]) -> None:
    """Raises where a run of the model changed what it reads: the program would not.

    Raises:
        CaptureError: then.
    """
    changed = [line for guard in guards for line in guard.changed()]
    if changed:
        raise CaptureError(
            f"forward changes what it reads outside of the model's modules: {changed[0]}",
            fix="count in an attribute of a module (self.calls += 1) or in a buffer, or outside of forward",
        )


Guard = Read | Content | Absent | Structure | Asked


@dataclass(frozen=True)
class Reads:
    """What a capture read.

    Attributes:
        attributes: a module's name -> the attributes that it holds itself, and were read.
        inherited: a module's name -> what was read of its class.
        absent: a module's name -> what was asked for, and it has not.
        ran: the user's code that ran.
        asked: the tensors whose values were read.
        spaces: of a stored capture, in the place of the code that ran, what that named: the key of a place, and names.
    """

    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inherited: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ran: Ran = field(default_factory=Ran, compare=False)
    asked: tuple[torch.Tensor, ...] = field(default=(), compare=False)
    spaces: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict, compare=False)

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

    def outside(self, model: nn.Module, held: Iterable[Content] = ()) -> list[Place]:
        """Where the code that ran found values outside of the model's modules.

        Raises:
            LookupError: a place of a stored capture is not there.
        """
        if self.spaces:
            found = [(key, place_at(key, names)) for key, names in self.spaces.items()]
            if gone := [key for key, place in found if place is None]:
                raise LookupError(f"there is no {'.'.join(filter(None, gone[0]))} any more, or it lacks what it had")
            return [place for _, place in found if place is not None]
        classes = {type(module) for module in model.modules()} | kinds_of(held)
        return list(places_of(self.ran, classes).places)

    def by_names(self, model: nn.Module) -> Reads:
        """The same, as another process can read it: without the code, but with what that named."""
        places = self.outside(model)
        return replace(self, ran=Ran(), spaces={place.key: place.names for place in places if place.key is not None})

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
        guards.append(Structure(model))
        guards += [Absent(path, modules[path], names) for path, names in self.absent.items()]
        guards += [Asked(self.asked)] * bool(self.asked)
        for path, names in self.inherited.items():
            for name in names:
                if _is_own_value(type(modules[path]), name) and (path, name) not in but:
                    guards.append(_of_class(path, modules[path], name))
        for where, get, names, _ in (*self.named(model).places, *self.outside(model, contents(values))):
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
        self.ran = Ran()

    def of(self, model: nn.Module) -> Reads:
        """What was read of a model and its modules."""
        attributes, inherited, absent = {}, {}, {}
        for path, module in model.named_modules():
            names = self.names.get(id(module), set()) - OF_MODULES - self.assigned.get(id(module), set())
            held = vars(module).keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
            attributes[path] = tuple(sorted(names & vars(module).keys()))
            inherited[path] = tuple(sorted(name for name in names - held if hasattr(type(module), name)))
            absent[path] = tuple(sorted(name for name in names if not name.startswith("__") and not _has(module, name)))
        return Reads(_filled(attributes), _filled(inherited), _filled(absent), self.ran)


def _filled(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {path: each for path, each in names.items() if each}


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
        with watched() as noted.ran:
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


def _of_class(path: str, module: nn.Module, name: str) -> Read:
    """An attribute of a module's class, as the module has it."""
    there = weakref.ref(module)

    def get() -> Mapping[str, Any] | None:
        module = there()
        return None if module is None else {name: getattr(module, name, _MISSING)}

    return Read(path or type(module).__name__, get, (name,), path)
