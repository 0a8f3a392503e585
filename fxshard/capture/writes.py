"""What forward assigns to the attributes of the model's modules: kept from the model, and done again at each call.

    self.steps += 1                 a number: each call of the program does the same
    self.last = x                   a tensor: lost, which is said; a call that would read it is refused
    self.mean = 0.9 * self.mean     a buffer, by one like it: written into it, as by copy_
    self.table = torch.arange(n)    a buffer of another size: refused by name
    self.seen.append(x)             what a list holds: refused by name

The model itself is left as it was before the capture.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fxshard.capture.calls import in_words
from fxshard.capture.held_values import contents, is_data, is_plain
from fxshard.capture.reads import OF_MODULES, Reads
from fxshard.errors import CaptureError
from fxshard.runtime.module import joined

__all__ = ["LOST", "Before", "Written", "check_lost", "unchanged"]

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _TABLES)
_MISSING = object()


class Lost(enum.Enum):
    """Stands for a value that was assigned, and that no later call can be given."""

    VALUE = 0


LOST = Lost.VALUE
_APART = OF_MODULES | {"_flat_weights", "_flat_weight_refs"}
"""What is not looked at: recurrent layers note their weights anew whenever one is set."""


class Written(NamedTuple):
    """An attribute that forward assigned a plain value.

    Attributes:
        module: the name of the module that has it.
        steps: its name, and the keys and names that lead on from it: ``("config", "problem_type")``.
        value: what it is now.
    """

    module: str
    steps: tuple[Any, ...]
    value: Any

    def again(self, modules: nn.Module) -> None:
        """Assigns it where these modules have it."""
        target: Any = vars(modules.get_submodule(self.module))
        for step in self.steps[:-1]:
            inner = target[step]
            target = inner if isinstance(inner, dict | list) else vars(inner)
        target[self.steps[-1]] = copy.deepcopy(self.value)


class Before:
    """What the modules of a model hold at some moment."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules())
        self._attributes = [dict(vars(module)) for _, module in self.modules]
        self._tables = [[dict(vars(module)[table]) for table in _TABLES] for _, module in self.modules]
        self._hooks = [[dict(vars(module)[name]) for name in _HOOKS] for _, module in self.modules]
        held = [
            (path, name, value)
            for (path, _), attributes in zip(self.modules, self._attributes, strict=True)
            for name, value in attributes.items()
            if name not in _APART and not is_plain(value)
        ]
        named = [(joined(path, name), value) for path, name, value in held]
        self._contents = contents(named, [(path, name) for path, name, _ in held])

    def written(self) -> tuple[Written, ...]:
        """What was assigned since then; of a value that no later call can be given, that it is ``LOST``.

        Raises:
            CaptureError: where it is something that no later call can be given again.
        """
        found = []
        for (path, module), before, tables in zip(self.modules, self._attributes, self._tables, strict=True):
            for kind, was in zip(_TABLES, tables, strict=True):
                now = vars(module)[kind]
                if kind == "_modules" and now != was and self._has_the_same_tensors():
                    found += [Written(path, (name,), LOST) for name in now if now[name] is not was.get(name)]
                else:
                    self._check_table(path, kind, now, was)
            for name, value in vars(module).items():
                if name in _APART or before.get(name, _MISSING) is value:
                    continue
                found.append(Written(path, (name,), value if is_data(value) else LOST))
            if gone := [name for name in before if name not in vars(module) and name not in _APART]:
                raise _refused(path, gone[0], "deletes")
        for each in self._contents:
            if not each.holds():
                assigned = each.assigned()
                if assigned is None or not all(map(is_data, assigned.values())):
                    raise _refused("", each.where, "changes what is held by")
                module, *steps = each.steps
                found += [Written(module, (*steps, key), value) for key, value in assigned.items()]
        return tuple(found)

    def _has_the_same_tensors(self) -> bool:
        """Whether the modules, replaced or not, hold what they held."""
        model = self.modules[0][1]
        held = {id(each) for tables in self._tables for table in tables[:2] for each in table.values()} - {id(None)}
        return held == {id(each) for each in (*model.parameters(), *model.buffers())}

    @staticmethod
    def _check_table(path: str, kind: str, now: dict[str, Any], was: dict[str, Any]) -> None:
        for name in now.keys() | was.keys():
            a, b = now.get(name), was.get(name)
            if a is b:
                continue
            if kind != "_buffers" or not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                raise _refused(path, name, "replaces, adds or deletes")
            if a.shape != b.shape or a.dtype != b.dtype:
                types = f"{in_words(b.dtype, b.shape)} becomes {in_words(a.dtype, a.shape)}"
                raise _refused(path, name, f"gives another size to ({types})")

    def write_back(self, leaves: list[Any]) -> tuple[list[Any], list[str]]:
        """Writes what replaces a buffer into it, so that a graph has it as a write.

        Args:
            leaves: what the model returns.

        Returns:
            The leaves, with copies of those that show what a buffer held before; and the names of the buffers.
        """
        found = [
            (joined(path, name), was[name], now[name])
            for (path, module), (_, was, _) in zip(self.modules, self._tables, strict=True)
            for now in (vars(module)["_buffers"],)
            for name in now
            if was.get(name) is not now[name] and isinstance(was.get(name), torch.Tensor)
        ]
        memory = {_memory(was) for _, was, _ in found}
        kept = [x.clone() if isinstance(x, torch.Tensor) and _memory(x) in memory else x for x in leaves]
        values = [now.clone() if _memory(now) in memory else now for _, _, now in found]
        for (_, was, _), value in zip(found, values, strict=True):
            was.copy_(value.detach() if value.requires_grad else value)
        return kept, [name for name, _, _ in found]

    def restore(self) -> None:
        """Puts all back."""
        rows = zip(self.modules, self._attributes, self._tables, self._hooks, strict=True)
        for (_, module), attributes, tables, hooks in rows:
            for kind, was in zip((*_TABLES, *_HOOKS), (*tables, *hooks), strict=True):
                table = attributes[kind]
                if table.keys() != was.keys() or any(table[name] is not was[name] for name in was):
                    table.clear()
                    table.update(was)
            own = vars(module)
            if own.keys() != attributes.keys() or any(own[name] is not attributes[name] for name in attributes):
                own.clear()
                own.update(attributes)
        for each in self._contents:
            each.restore()


def _memory(x: torch.Tensor) -> Any:
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever is done to the modules of a model within it, to their attributes, tables and hooks, is put back.

    >>> model = nn.Linear(2, 2)
    >>> with unchanged(model):
    ...     model.note = 1
    >>> hasattr(model, "note")
    False
    """
    before = Before(model)
    try:
        yield
    finally:
        before.restore()


def check_lost(written: Iterable[Written], reads: Reads) -> None:
    """Raises where what is lost is read before it is assigned: by the next call."""
    for each in written:
        if each.value is LOST and each.steps[0] in reads.attributes.get(each.module, ()):
            raise _refused(each.module, str(each.steps[0]), "keeps tensors or objects in")


def _refused(module: str, name: str, what: str) -> CaptureError:
    return CaptureError(
        f"forward {what} {joined(module, name)}, which later calls would read: a program keeps no such state",
        module=module,
        fix="keep state in a buffer that is changed in place (self.register_buffer, copy_), or return it from forward",
    )
