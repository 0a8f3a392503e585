"""Values that are held against later ones: by value where they are plain, else by being the same object.

Of lists, dicts and plain objects it is their content, and that of what they hold, that is compared.
"""

from __future__ import annotations

import enum
import logging
import types
from collections import deque
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

import torch
from torch import nn

__all__ = ["Content", "contents", "holder_of", "is_data", "is_plain", "same"]

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
    return type(now) is type(then) and is_plain(then) and (now == then or (now != now and then != then))


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


def holder_of(value: Any) -> Any:
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
        holder = holder_of(value)
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
