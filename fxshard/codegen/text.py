"""Lines of Python as a formatter would leave them, and short ways to write many module paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from fxshard.runtime.module import is_word

WIDTH = 120
PATHS_NAMED = 8
"""How many modules, or runs of layers, a docstring names."""

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
_CONTROL = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f]")


def is_index(text: str) -> bool:
    """Whether a text is a number as Python writes it.

    >>> is_index("0"), is_index("12"), is_index("00"), is_index("\N{SUPERSCRIPT TWO}")
    (True, True, False, False)
    """
    return bool(_NUMBER.fullmatch(text))


def in_comment(text: str) -> str:
    """A text that a comment can hold: in one line."""
    return _CONTROL.sub(" ", text)


def in_docstring(text: str) -> str:
    r"""A text that a docstring can hold.

    >>> print(in_docstring('layers.a"b'))
    layers.a\"b
    """
    return in_comment(text).replace("\\", "\\\\").replace('"', '\\"')


def statement(indent: int, code: str, comment: str = "") -> Iterator[str]:
    """The lines of one statement: the comment behind it where it fits, else above it; long calls broken."""
    space, comment = " " * indent, in_comment(comment)
    line = f"{space}{code}"
    if not comment:
        yield from fit(line)
    elif len(line) + 4 + len(comment) <= WIDTH:
        yield f"{line}  # {comment}"
    else:
        yield f"{space}# {comment}"
        yield from fit(line)


_LITERALS = re.compile(r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' """, re.VERBOSE)


def fit(line: str) -> Iterator[str]:
    """A line, broken inside its last outermost brackets where it is too long; not within texts.

    >>> print(*fit(f"check(x, '{'(' * 120}')"), sep=chr(10))  # doctest: +ELLIPSIS
    check(
        x,
        '((...((',
    )
    """
    shape = _LITERALS.sub(lambda found: "." * len(found[0]), line)
    close = max(shape.rfind(")"), shape.rfind("]"))
    if len(line) <= WIDTH or close < 0:
        yield line
        return
    cuts, start = _outermost(shape, close)
    if start < 0 or start + 1 == close:
        yield line
        return
    indent = len(line) - len(line.lstrip())
    inner = " " * (indent + 4)
    body = line[start + 1 : close]
    yield line[: start + 1]
    if len(inner) + len(body) <= WIDTH:
        yield inner + body
    else:
        ends = [*cuts, close]
        for a, b in zip([start, *cuts], ends, strict=True):
            piece = line[a + 1 : b].strip()
            if piece:
                yield from fit(f"{inner}{piece},")
    yield " " * indent + line[close:]


def _outermost(line: str, close: int) -> tuple[list[int], int]:
    """The commas directly inside the brackets that end at ``close``, and where these begin, in a line without texts."""
    cuts: list[int] = []
    depth = 0
    for i in range(close, -1, -1):
        c = line[i]
        if c in ")]}":
            depth += 1
        elif c in "([{":
            depth -= 1
            if depth == 0:
                return cuts[::-1], i
        elif c == "," and depth == 1:
            cuts.append(i)
    return [], -1


def span(numbers: Iterable[int]) -> str:
    """Numbers as ranges.

    >>> span([0, 1, 2, 3, 7])
    '0-3,7'
    """
    out: list[list[int]] = []
    for n in sorted(set(numbers)):
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def summarize(paths: Iterable[str]) -> str:
    """Module paths, each once; a run of layers by its first and its last.

    >>> summarize(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "layers.7.mlp", "head"])
    'layers.0.mlp to layers.2.mlp, layers.7.mlp, head'
    """
    groups: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for path in paths:
        groups.setdefault(tuple(_NUMBER.split(path)), set()).add(tuple(map(int, _NUMBER.findall(path))))
    out: list[str] = []
    for between, numbers in groups.items():
        for first, last in _runs(sorted(numbers)):
            several = [] if first == last else [" to " if math.dist(first, last) > 1 else ", ", _path(between, last)]
            out.append("".join([_path(between, first), *several]))
    return ", ".join(out[:PATHS_NAMED]) + (f", and {len(out) - PATHS_NAMED} more" if len(out) > PATHS_NAMED else "")


def _path(between: Sequence[str], numbers: Sequence[int]) -> str:
    """A path from what stands between its numbers, and these."""
    return between[0] + "".join(f"{number}{text}" for number, text in zip(numbers, between[1:], strict=True))


def _runs(points: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The first and the last of each run: all the points as one block, else steps of one along the first number."""
    first, last = points[0], points[-1]
    block = math.prod(max(column) - min(column) + 1 for column in zip(*points, strict=True))
    if len(points) == block:
        yield first, last
        return
    for i, point in enumerate(points):
        if i and (point[0] - points[i - 1][0] != 1 or point[1:] != points[i - 1][1:]):
            yield first, points[i - 1]
            first = point
    yield first, last


def attribute(owner: str, name: str) -> str:
    """How ``name`` of ``owner`` is written within a class, where Python reads ``owner.__name`` as another name.

    >>> attribute("m", "norm"), attribute("m", "class"), attribute("m", "__norm"), attribute("m", "__len__")
    ('m.norm', 'getattr(m, "class")', 'getattr(m, "__norm")', 'm.__len__')
    """
    private = name.startswith("__") and not name.endswith("__")
    return f"{owner}.{name}" if is_word(name) and not private else f"getattr({owner}, {quoted(name)})"


def quoted(text: str) -> str:
    """A text as a literal of Python.

    >>> print(quoted("norm"), quoted('a"b'))
    "norm" 'a"b'
    """
    return f'"{text}"' if '"' not in text and "\\" not in repr(text) else repr(text)
