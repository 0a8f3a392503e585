"""What a capture depends on, as a key: equal keys, equal captures.

The key tells the inputs' types; the model's modules, and all that their attributes hold, but for the values of weights;
the code of their classes' methods, of the functions beside these classes and of ``torch.nn.functional``, as they are
now, patched or not; and the versions. ``files_loaded`` tells the state of all other code: the files that Python has
loaded, but for its own, torch's and fxshard's.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import sys
import types
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshard.cache.stored import NotStorable
from fxshard.capture.calls import pattern_of
from fxshard.capture.capture import signature_key
from fxshard.capture.code_names import Place
from fxshard.capture.serves import surroundings
from fxshard.capture.trees import flatten

PACKAGE = Path(__file__).parent.parent
SETTLED = sys.stdlib_module_names
"""Packages whose classes are what their version says."""
STANDARD = os.path.dirname(os.__file__)
SKIPPED = (str(Path(torch.__file__).parent), str(PACKAGE))

_PLAIN = (
    int, float, complex, str, bytes, type(None), type(Ellipsis), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


def key_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> str:
    """The key of a capture of ``model`` with these inputs, for a device; a hexadecimal number.

    Raises:
        NotStorable: where the model holds what cannot be told from another such thing in another process.
    """
    told = _Told()
    leaves, _ = flatten((args, dict(kwargs)))
    told.add("inputs", signature_key(model, args, kwargs), [_kind(x) for x in leaves if isinstance(x, torch.Tensor)])
    told.add("pattern", pattern_of(leaves))
    told.add("model", model)
    told.add("functional", [f for _, f in sorted(vars(nn.functional).items()) if isinstance(f, types.FunctionType)])
    told.add("versions", sys.version, torch.__version__, torch.version.git_version, _own_code())
    told.add("device", device.type, torch.get_default_device())
    told.add("state", *surroundings()[1:])
    return told.digest()


def digest_of(places: Iterable[Place]) -> str:
    """The number of all values at places outside of the model; it is the same in another process.

    Raises:
        NotStorable: where no name leads to a place, or nothing can be told of what is there.
    """
    told = _Told()
    for where, get, names, key in sorted(places, key=lambda place: (place.key or ("", ""), place.names)):
        if key is None:
            raise NotStorable(f"what {where} holds")
        space = get()
        for name in names:
            told.add(key, name, space[name])
    return told.digest()


def files_loaded() -> dict[str, list[int]]:
    """The files of the modules that are loaded now, but for torch's, Python's and fxshard's: size, and last change."""
    found = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or path.startswith(SKIPPED):
            continue
        if path.startswith(STANDARD) and not path.startswith(os.path.join(STANDARD, "site-packages")):
            continue
        try:
            stat = os.stat(path)
        except OSError:
            continue
        found[path] = [stat.st_size, stat.st_mtime_ns]
    return found


def files_as_they_were(files: Mapping[str, list[int]]) -> bool:
    """Whether none of the files changed."""
    try:
        return all([stat.st_size, stat.st_mtime_ns] == was for stat, was in ((os.stat(f), w) for f, w in files.items()))
    except OSError:
        return False


@functools.cache
def _own_code() -> str:
    """Of fxshard itself."""
    told = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        told.update(path.read_bytes())
    return told.hexdigest()


def _kind(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What a capture may depend on of a tensor, beside its values."""
    about = tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.requires_grad, tensor.layout
    return (*about, tensor.stride(), tensor.storage_offset()) if tensor.layout == torch.strided else about


class _Told:
    """Takes values one after the other: two of them end equal if they were told the same."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.met: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice
        self.told: set[Any] = set()

    def digest(self) -> str:
        """The number of all that was told."""
        return self.hash.hexdigest()

    def add(self, *values: Any) -> None:
        """Tells values.

        Raises:
            NotStorable: of what nothing can be told that holds in another process.
        """
        for value in values:
            self._add(value)

    def _say(self, *words: Any) -> None:
        self.hash.update(repr(words).encode())

    def _add(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._say(type(value).__qualname__, value.name)
        elif isinstance(value, _PLAIN):
            self._say(type(value).__name__, value)
        elif id(value) in self.met:
            self._say("again", self.met[id(value)])
        else:
            self.met[id(value)] = len(self.met)
            self.alive.append(value)
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.add("method", value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self.add("partial", value.func, value.args, value.keywords)
        elif isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            self._say(type(value).__name__, getattr(value, "__qualname__", value.__name__))
        elif isinstance(value, logging.Logger):
            self._say("logger", value.name)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, Mapping):
            self._say(type(value).__qualname__, len(value))
            self.add(*value.keys(), *value.values())
        elif isinstance(value, list | tuple):
            self._say(type(value).__qualname__, len(value))
            self.add(*value)
        elif isinstance(value, set | frozenset):
            self._say(type(value).__qualname__, sorted(map(repr, value)))
        else:
            self._object(value)

    def _tensor(self, value: torch.Tensor, values: bool = True) -> None:
        self._say(type(value).__qualname__, _kind(value))
        if values and not value.is_meta:
            self._say(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def _object(self, value: Any) -> None:
        """An instance of a class: the class, and what the instance holds."""
        state = getattr(value, "__dict__", None)
        slots = [name for each in type(value).__mro__ for name in _names(each.__dict__.get("__slots__", ()))]
        if state is None and not slots:
            raise NotStorable(f"a {type(value).__qualname__}, which may differ in another process")
        self._class(type(value))
        if isinstance(value, nn.Module):
            state = self._without_values(value)
        for name, held in sorted((state or {}).items(), key=lambda item: str(item[0])):
            is_hash = isinstance(held, int) and str(name).endswith("_hash")  # of strings: another one in every process
            if not is_hash:
                self._say(name)
                self._add(held)
        for name in sorted(slots):
            self._say(name)
            self._add(getattr(value, name, None))

    def _without_values(self, module: nn.Module) -> dict[str, Any]:
        """What a module holds, where of its parameters and buffers only their kind was told."""
        state = dict(vars(module))
        for listing in ("_parameters", "_buffers"):
            for name, tensor in state.pop(listing).items():
                self._say(listing, name, None if tensor is None else self.met.setdefault(id(tensor), len(self.met)))
                if tensor is not None:
                    self.alive.append(tensor)
                    self._tensor(tensor, values=False)
        return state

    def _class(self, cls: type) -> None:
        """A class: the code of its methods, and of the functions beside it in its file, which they may call."""
        for each in cls.__mro__:
            package, _, _ = each.__module__.partition(".")
            self._say("class", each.__module__, each.__qualname__)
            if each not in self.told and package not in SETTLED:
                self.told.add(each)
                self._codes(vars(each))
                beside = sys.modules.get(each.__module__)
                if package != "torch" and beside is not None and beside not in self.told:
                    self.told.add(beside)
                    self._codes({name: each for name, each in vars(beside).items() if not isinstance(each, str)})

    def _codes(self, members: Mapping[str, Any]) -> None:
        for name, value in sorted(members.items()):
            code = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(code, types.FunctionType):
                self._say(name)
                self._code(code.__code__)
            elif isinstance(value, bool | int | float | str):
                self._say(name, value)

    def _function(self, function: types.FunctionType) -> None:
        self._say(function.__module__, function.__qualname__)
        self._code(function.__code__)
        self.add(function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError:  # it is empty
                self._say("empty")

    def _code(self, code: types.CodeType) -> None:
        self._say(code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._say(sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))


def _names(slots: Iterable[str] | str) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)
