"""What a generated class keeps: the ``__init__`` of a class, and how its forward reads what that made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxshard.codegen.classes import Class, Classes, own_weights
from fxshard.codegen.naming import RESERVED, identifier
from fxshard.codegen.regions import Region
from fxshard.codegen.text import is_index, quoted, statement
from fxshard.runtime.module import RankModule, is_word


class Members:
    """What a class keeps of its module: the calls inside it, and the modules whose weights it reads.

    Attributes:
        names: a call inside -> how it is written.
        listed: a call inside that is an item of a list -> (the list's path, the index).
        lists: a list's path -> (its name, its length).
    """

    def __init__(self, classes: Classes, region: Region) -> None:
        self.region = region
        self.prefix = len(region.path) + 1 if region.path else 0
        self.names: dict[int, str] = {}
        self.listed: dict[int, tuple[str, int]] = {}
        self.lists: dict[str, tuple[str, int]] = {}
        self._taken = {"m"}
        self._named: dict[str, str] = {}
        self._lines: list[str] = []
        self._owners: dict[str, str] = {}
        self._is_direct = False
        self._add_calls(classes)
        for name in own_weights(region):
            self._add_weight(name)

    def lines(self) -> Iterator[str]:
        """The body of ``__init__``."""
        if self._is_direct:
            yield "        self.m = m"
        for line in self._lines:
            yield from statement(8, line)

    def weight(self, name: str) -> str:
        """How a tensor is read."""
        owner, _, last = name[self.prefix :].rpartition(".")
        return access(self._owners[owner] if owner else "self.m", last, is_item=False)

    def _add_weight(self, name: str) -> None:
        owner, _, _ = name[self.prefix :].rpartition(".")
        if not owner:
            self._is_direct = True
        elif owner not in self._owners:
            attribute = self._name(owner)
            self._owners[owner] = f"self.{attribute}"
            self._lines.append(f"self.{attribute} = {_from_m(owner)}")

    def _add_calls(self, classes: Classes) -> None:
        calls: dict[tuple[str, int], list[Region]] = {}
        for child in self.region.children():
            calls.setdefault((child.path[self.prefix :], classes.of(child).number), []).append(child)
        lists = _lists(list(calls))
        for (path, number), regions in calls.items():
            prefix, _, last = path.rpartition(".")
            if prefix in lists:
                if prefix not in self.lists:
                    self._add_list(prefix, lists[prefix], classes)
                name = f"self.{self.lists[prefix][0]}[{last}]"
            else:
                attribute = self._name(path or regions[0].function)
                name = f"self.{attribute}"
                self._lines.append(f"{name} = {made(classes.all[number], _from_m(path))}")
            for region in regions:
                self.names[id(region)] = name
                if prefix in lists:
                    self.listed[id(region)] = (prefix, int(last))

    def _add_list(self, prefix: str, numbers: Sequence[int], classes: Classes) -> None:
        attribute = self._name(prefix)
        self.lists[prefix] = (attribute, len(numbers))
        owner = _from_m(prefix)
        runs: list[list[int]] = []
        for i, number in enumerate(numbers):
            if runs and numbers[runs[-1][0]] == number:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
        texts = []
        for start, stop in runs:
            kind = classes.all[numbers[start]]
            if stop - start == 1:
                texts.append(made(kind, f"{owner}[{start}]"))
            else:
                count = f"range({start}, {stop})" if start else f"range({stop})"
                each = f"{made(kind, f'{owner}[i]')} for {'i' if kind.needs_weights else '_'} in {count}"
                texts.append(each if len(runs) == 1 else f"*({each})")
        self._lines.append(f"self.{attribute} = [{', '.join(texts)}]")

    def _name(self, path: str) -> str:
        """A short name for a module inside: the last part of its path, longer where that is taken."""
        name = self._named.get(path) or self._longer(path)
        self._named[path] = name
        base, number = name, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _longer(self, path: str) -> str:
        parts = path.split(".")
        name = ""
        for count in range(1, len(parts) + 1):
            last = parts[-count:]
            if is_index(last[0]) and count < len(parts):
                continue
            name = identifier("_".join([*["layer"] * is_index(last[0]), *last]))
            name += "_" if name in RESERVED else ""
            if name not in self._taken:
                break
        return name


def made(kind: Class, owner: str) -> str:
    """How an object of a generated class is made; one that needs no weights takes no module."""
    return f"{kind.name}({owner if kind.needs_weights else ''})"


def _lists(calls: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Module lists all of whose items are calls: path -> the class of each item."""
    found: dict[str, dict[int, list[int]]] = {}
    for path, number in calls:
        prefix, _, last = path.rpartition(".")
        if prefix and is_index(last):
            found.setdefault(prefix, {}).setdefault(int(last), []).append(number)
    return {
        prefix: [items[i][0] for i in range(len(items))]
        for prefix, items in found.items()
        if len(items) > 1 and sorted(items) == list(range(len(items))) and all(len(c) == 1 for c in items.values())
    }


def _from_m(path: str) -> str:
    text = "m"
    for part in path.split(".") if path else ():
        text = access(text, part)
    return text


def access(owner: str, name: str, is_item: bool = True) -> str:
    """How ``name`` of ``owner`` is written; a module under a number is an item, a tensor is not.

    Names that Python reads in another way, or that modules have already, are looked up.

    >>> access("m.layers", "3"), access("m", "norm"), access("m.scales", "0", is_item=False), access("m", "forward")
    ('m.layers[3]', 'm.norm', 'find(m.scales, "0")', 'find(m, "forward")')
    """
    if is_item and is_index(name):
        return f"{owner}[{name}]"
    is_plain = is_word(name) and not name.startswith("__") and not hasattr(RankModule, name)
    return f"{owner}.{name}" if is_plain else f"find({owner}, {quoted(name)})"
