"""The trees of a model's inputs and outputs: their leaves, and the names of these.

Dataclasses and the caches of transformers, which pytree does not know, are taught to it where they are met.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fxshard.torch_internals import pytree

__all__ = ["UNCHANGED", "flatten", "paths", "put_back", "reorder", "teach", "without_unchanged"]


class Unchanged(enum.Enum):
    """Stands for what is as it was."""

    VALUE = 0


UNCHANGED = Unchanged.VALUE


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten ``tree``, and teach pytree the dataclasses and caches that it meets on the way."""
    leaves, spec = pytree.tree_flatten(tree)
    while any(_register(type(leaf)) for leaf in leaves):
        leaves, spec = pytree.tree_flatten(tree)
    return leaves, spec


def teach(spec: pytree.TreeSpec) -> None:
    """Teach pytree the types of a tree that another process flattened."""
    if not spec.is_leaf():
        _register(spec.type)
        for child in spec.children():
            teach(child)


def reorder(tree: Any, spec: pytree.TreeSpec) -> Any:
    """Put the keys of every dict of ``tree`` in the order of ``spec``, where they are the same keys."""
    children = spec.children()
    if spec.type is dict and type(tree) is dict and set(spec.context) == tree.keys():
        return {key: reorder(tree[key], child) for key, child in zip(spec.context, children, strict=True)}
    if spec.type in (list, tuple) and type(tree) is spec.type and len(tree) == len(children):
        return spec.type(reorder(item, child) for item, child in zip(tree, children, strict=True))
    return tree


def paths(tree: Any) -> list[str]:
    """Name each leaf as a user writes it: ``input_ids``, ``batch['x']``, ``args[0]``."""
    return [name_of_path(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def name_of_path(path: tuple[Any, ...]) -> str:
    """Name a place within ``(args, kwargs)`` as a user writes it."""
    key = path[1]
    head = str(key.key) if isinstance(key, pytree.MappingKey) else f"args{pytree.keystr((key,))}"
    return head + pytree.keystr(path[2:])


def given_twice(tree: Any) -> str | None:
    """What is in two places of a tree, and can be changed: the first such dict, list or object; None where none is.

    >>> state = {"n": 1}
    >>> given_twice(((state,), {"memory": [state]})), given_twice(((state,), {"memory": [dict(state)]}))
    ('args[0] and memory[0] are one dict', None)
    """
    met: dict[int, str] = {}
    pending: list[tuple[Any, tuple[Any, ...]]] = []
    for top in tree:
        pending += [(value, (None, key)) for key, value in _items_of(top) or ()]
    while pending:
        value, path = pending.pop(0)
        items = _items_of(value)
        if items is None:
            continue
        if not isinstance(value, tuple):
            where = name_of_path(path)
            if id(value) in met:
                return f"{met[id(value)]} and {where} are one {type(value).__name__}"
            met[id(value)] = where
        pending += [(item, (*path, key)) for key, item in items]
    return None


def _items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, one level of it, each with its key; None of what is none."""
    if type(value) not in pytree.SUPPORTED_NODES:
        return None
    return [(path[0], item) for path, item in pytree.tree_flatten_with_path(value, lambda x: x is not value)[0]]


def without_unchanged(after: Any, before: Any, is_same: Callable[[Any, Any], bool]) -> Any:
    """``after``, with ``UNCHANGED`` for every leaf that ``before`` has in the same place."""
    was = dict(pytree.tree_flatten_with_path(before)[0])
    leaves, spec = pytree.tree_flatten_with_path(after)
    kept = [UNCHANGED if path in was and is_same(leaf, was[path]) else leaf for path, leaf in leaves]
    return pytree.tree_unflatten(kept, spec)


def put_back(target: Any, changed: Any) -> None:
    """Make the containers of ``target`` hold what those of ``changed`` hold, but for what is ``UNCHANGED``.

    >>> state = {"n": 1, "seen": [1]}
    >>> seen = state["seen"]
    >>> put_back(state, {"n": 2, "seen": [UNCHANGED, 5], "more": (3,)})
    >>> state, seen is state["seen"]
    ({'n': 2, 'seen': [1, 5], 'more': (3,)}, True)
    """
    if isinstance(target, dict):
        _put_items(target, changed)
    elif isinstance(target, list | deque):
        made = [_merged(target[i], item) if i < len(target) else item for i, item in enumerate(changed)]
        if len(made) != len(target) or any(a is not b for a, b in zip(made, target, strict=True)):
            target.clear()
            target.extend(made)
    elif isinstance(target, tuple):
        for old, new in zip(target, changed, strict=True):
            _merged(old, new)
    else:
        _put_items(vars(target), vars(changed))


def _put_items(target: dict[Any, Any], changed: dict[Any, Any]) -> None:
    made = {key: _merged(target[key], item) if key in target else item for key, item in changed.items()}
    if list(made) != list(target):
        target.clear()
    for key, item in made.items():
        if key not in target or target[key] is not item:
            target[key] = item


def _merged(old: Any, new: Any) -> Any:
    """What takes the place of ``old``: itself, changed, where it is a container as ``new`` is."""
    if new is UNCHANGED or new is old:
        return old
    is_object = hasattr(old, "__dict__") and not isinstance(old, torch.Tensor | type)
    if type(old) is type(new) and isinstance(old, tuple) and len(old) == len(new):
        made = [_merged(a, b) for a, b in zip(old, new, strict=True)]
        same = all(a is b for a, b in zip(made, old, strict=True))
        return old if same else type(old)._make(made) if hasattr(old, "_make") else type(old)(made)
    if type(old) is type(new) and (isinstance(old, dict | list | deque) or is_object):
        put_back(old, new)
        return old
    return new


class _Slot(NamedTuple):
    """The place of a leaf in the remembered state of an object."""

    position: int


class _Plain(NamedTuple):
    """The remembered state of an object: its class, and its attributes with tensors replaced by slots."""

    cls: type
    state: tuple[tuple[str, Any], ...]


def _register(cls: type) -> bool:
    """Register ``cls`` with pytree if it is a dataclass or a cache of transformers; say whether it was."""
    if cls in pytree.SUPPORTED_NODES or issubclass(cls, torch.Tensor):
        return False
    take: Callable[[Any], tuple[list[Any], Any]]
    make: Callable[[Any, Any], Any]
    if dataclasses.is_dataclass(cls):
        take, make = _flatten_dataclass, functools.partial(_unflatten_dataclass, cls)
    elif any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in cls.__mro__):
        take, make = _flatten_object, _unflatten_object
    elif issubclass(cls, dict | list | tuple) and cls not in (dict, list, tuple) and not hasattr(cls, "_fields"):
        take, make = _flatten_container, functools.partial(_unflatten_container, cls)
    else:
        return False

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        leaves, context = take(value)
        names = context if dataclasses.is_dataclass(cls) else [str(i) for i in range(len(leaves))]
        if issubclass(cls, dict) and not dataclasses.is_dataclass(cls):
            keys = [*map(pytree.MappingKey, context[0]), *map(pytree.GetAttrKey, context[1])]
            return list(zip(keys, leaves, strict=True)), context
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context

    pytree.register_pytree_node(
        cls,
        take,
        make,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return True


def _flatten_dataclass(value: Any) -> tuple[list[Any], Any]:
    fields = [item.name for item in dataclasses.fields(value) if hasattr(value, item.name)]
    names = tuple(dict.fromkeys([*fields, *getattr(value, "__dict__", ())]))  # it may have been given others
    return [getattr(value, name) for name in names], names


def _unflatten_dataclass(cls: Any, leaves: Any, names: Any) -> Any:
    pairs = dict(zip(names, leaves, strict=True))
    if issubclass(cls, dict):
        known = {item.name for item in dataclasses.fields(cls)}
        result: Any = cls(**{name: leaf for name, leaf in pairs.items() if name in known})
        pairs = {name: leaf for name, leaf in pairs.items() if name not in known}
    else:
        result = object.__new__(cls)  # __post_init__ ran when the user made it; to run it again may change it
    for name, leaf in pairs.items():
        object.__setattr__(result, name, leaf)
    return result


def _flatten_container(value: Any) -> tuple[list[Any], Any]:
    """What a user's own kind of dict, list or tuple holds, and its attributes."""
    state = getattr(value, "__dict__", {})
    keys = tuple(value) if isinstance(value, dict) else tuple(range(len(value)))
    items = value.values() if isinstance(value, dict) else value
    return [*items, *state.values()], (keys, tuple(state))


def _unflatten_container(cls: type, leaves: Any, context: Any) -> Any:
    leaves, (keys, names) = list(leaves), context
    items = leaves[: len(keys)]
    made: Any = tuple.__new__(cls, items) if issubclass(cls, tuple) else cls.__new__(cls)
    if issubclass(cls, dict):
        dict.update(made, zip(keys, items, strict=True))
    elif issubclass(cls, list):
        list.extend(made, items)
    if names:
        vars(made).update(zip(names, leaves[len(keys) :], strict=True))
    return made


def _flatten_object(value: Any) -> tuple[list[Any], Any]:
    leaves: list[Any] = []
    return leaves, _template(value, leaves)


def _template(value: Any, leaves: list[Any]) -> Any:
    """Return ``value`` with its tensors moved to ``leaves``; two templates are equal if the rest is."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat):
        leaves.append(value)
        return _Slot(len(leaves) - 1)
    if type(value) in (list, tuple):
        return type(value)(_template(item, leaves) for item in value)
    if type(value) is dict:
        return {key: _template(item, leaves) for key, item in value.items()}
    if type(value).__module__.startswith("transformers.cache_utils"):
        return _Plain(type(value), tuple((name, _template(item, leaves)) for name, item in vars(value).items()))
    return value


def _unflatten_object(leaves: Any, template: Any) -> Any:
    leaves = list(leaves)

    def build(item: Any) -> Any:
        if isinstance(item, _Slot):
            return leaves[item.position]
        if isinstance(item, _Plain):
            result: Any = object.__new__(item.cls)
            vars(result).update((name, build(value)) for name, value in item.state)
            return result
        if type(item) in (list, tuple):
            return type(item)(build(value) for value in item)
        if type(item) is dict:
            return {key: build(value) for key, value in item.items()}
        return item

    return build(template)
