"""Values that are held against later ones: by value where they are plain, else by being the same object.

Of lists, dicts and plain objects it is their content, and that of what they hold, that is compared.
"""

from __future__ import annotations

import enum
import functools
import logging
import os
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Content", "contents", "holder_of", "is_data", "is_plain", "kinds_of", "same"]

logger = logging.getLogger("fxshard")

PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""What is compared by value."""
_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
           types.MethodType, logging.Logger, torch.Generator)  # fmt: skip
"""What is compared by being the same object."""
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
    if type(now) is float and type(then) is float:
        return now.hex() == then.hex()  # 0.0 == -0.0, and nan is none of both
    return type(now) is type(then) and is_plain(then) and now == then


class Slots(Mapping[str, Any]):
    """What an object holds that keeps its attributes in slots.

    >>> class Point:
    ...     __slots__ = ("x", "y")
    >>> point = Point()
    >>> point.x = 1
    >>> dict(Slots(point))
    {'x': 1}
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(name for name in _slots_of(type(self.owner)) if hasattr(self.owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Measured(Mapping[str, Any]):
    """What is told of a thing whose content is not compared item by item."""

    def __init__(self, tells: Callable[[], Any]) -> None:
        self._tells = tells

    def __getitem__(self, name: str) -> Any:
        return self._tells()

    def __iter__(self) -> Iterator[str]:
        return iter(("content",))

    def __len__(self) -> int:
        return 1


def _slots_of(cls: type) -> tuple[str, ...]:
    names: list[str] = []
    for each in cls.__mro__:
        slots = vars(each).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return tuple(name for name in names if not name.startswith("__"))


def _checksum(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.shape, array.dtype.str, zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _checksum_of_memory(value: Any) -> tuple[Any, ...]:
    """Of what shows its memory: a ``bytearray``, an ``array.array``."""
    with memoryview(value) as memory:
        return memory.shape, memory.format, zlib.crc32(memory.tobytes())


def _shows_memory(value: Any) -> bool:
    try:
        memoryview(value).release()
    except (TypeError, BufferError):
        return False
    return True


class Content:
    """What a list, a dict, or an object held when it was read.

    Attributes:
        where: it is, for a person.
        holder: the list or the dict, or that of the object's attributes.
        steps: from an attribute to it: keys of dicts and lists, and names of attributes.
        owner: the object whose attributes it holds; None where it is for itself.
    """

    __slots__ = ("_keys", "_values", "holder", "keys", "owner", "steps", "where")

    def __init__(self, where: str, holder: Any, steps: tuple[Any, ...] = (), owner: Any = None) -> None:
        self.where, self.holder, self.keys, self.steps, self.owner = where, holder, (), steps, owner
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
        holder = self.holder
        if self.holds() or isinstance(holder, tuple | _Measured | os._Environ | types.MappingProxyType):
            return
        if isinstance(holder, Slots):
            for name in set(holder) - set(self._keys or ()):
                delattr(holder.owner, name)
            for name, value in zip(self._keys or (), self._values, strict=True):
                setattr(holder.owner, name, value)
            return
        holder.clear()
        if self._keys is not None:
            holder.update(zip(self._keys, self._values, strict=True))
        else:
            (holder.update if isinstance(holder, set) else holder.extend)(self._values)


def holder_of(value: Any) -> Any:
    """The mutable thing whose content tells a value: itself, or what an object's attributes are kept in."""
    if isinstance(value, dict | list | tuple | deque | set | os._Environ | types.MappingProxyType):
        return value
    if isinstance(value, np.ndarray):
        return _Measured(functools.partial(_checksum, value)) if value.dtype != object else None
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, _OPAQUE) or is_plain(value) or type(value).__module__.partition(".")[0] == "torch":
        return None
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):
        return held
    if _slots_of(type(value)):
        return Slots(value)
    return _Measured(functools.partial(_checksum_of_memory, value)) if _shows_memory(value) else None


def kinds_of(found: Iterable[Content]) -> set[type]:
    """The classes of the objects whose attributes are compared."""
    return {type(each.owner) for each in found if each.owner is not None}


def contents(values: Iterable[tuple[str, Any]], steps: Iterable[tuple[Any, ...]] | None = None) -> list[Content]:
    """The content of all that can be reached from values through lists, dicts and plain objects.

    Args:
        values: each with where it is, for a person.
        steps: each one's place, for ``Content.steps``.
    """
    found: list[Content] = []
    met: dict[int, Any] = {}
    values = list(values)
    pending = deque(zip(values, steps or [()] * len(values), strict=True))
    while pending and len(met) < LIMIT:
        (where, value), place = pending.popleft()
        holder = holder_of(value)
        if holder is None or id(value) in met:
            continue
        met[id(value)] = value
        if holder is value and isinstance(getattr(value, "__dict__", None), dict):  # a list of a class of the user's
            pending.append(((f"{where}.__dict__", vars(value)), (*place, "__dict__")))
        attributes = holder is not value
        if not isinstance(holder, tuple):
            found.append(Content(where, holder, place, value if attributes else None))
        if isinstance(holder, set | _Measured):
            continue
        items = list(holder.items()) if isinstance(holder, Mapping) else list(enumerate(holder))
        for key, item in items:
            name = f"{where}.{key}" if attributes else f"{where}[{key!r}]"
            pending.append(((name, item), (*place, key)))
    if pending:
        logger.warning(
            f"what the model reads holds more than {LIMIT} lists, dicts and objects: changes of those beyond, such as "
            f"{pending[0][0][0]}, are not seen"
        )
    return found
