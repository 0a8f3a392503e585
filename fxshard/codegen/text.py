"""Lines of Python as a formatter would leave them, and short ways to write many module paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

WIDTH = 120


def statement(indent: int, code: str, comment: str = "") -> Iterator[str]:
    """The lines of one statement: the comment behind it where it fits, else above it; long calls broken."""
    space = " " * indent
    line = f"{space}{code}"
    if not comment:
        yield from fit(line)
    elif len(line) + 4 + len(comment) <= WIDTH:
        yield f"{line}  # {comment}"
    else:
        yield f"{space}# {comment}"
        yield from fit(line)


def fit(line: str) -> Iterator[str]:
    """A line, broken inside its last outermost brackets where it is too long."""
    close = max(line.rfind(")"), line.rfind("]"))
    if len(line) <= WIDTH or close < 0:
        yield line
        return
    cuts, start = _outermost(line, close)
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
    """The commas directly inside the brackets that end at ``close``, and where these begin."""
    cuts: list[int] = []
    depth, quoted = 0, ""
    for i in range(close, -1, -1):
        c = line[i]
        if quoted:
            quoted = "" if c == quoted else quoted
        elif c in "\"'":
            quoted = c
        elif c in ")]}":
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


def pattern(path: str) -> tuple[str, int | None]:
    """A module path without the number of its layer: the first part that is one.

    >>> pattern("model.layers.3.mlp.experts.1")
    ('model.layers.{}.mlp.experts.1', 3)
    """
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:i], "{}", *parts[i + 1 :]]), int(part)
    return path, None


def summarize(paths: Iterable[str]) -> str:
    """Module paths, those of many layers as one.

    >>> summarize(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "head"])
    'layers.{0-2}.mlp, head'
    """
    groups: dict[str, list[int]] = {}
    for path in paths:
        shape, number = pattern(path)
        groups.setdefault(shape, []).extend([] if number is None else [number])
    out = []
    for shape, numbers in groups.items():
        unique = set(numbers)
        several = "{" + span(unique) + "}" if len(unique) > 1 else span(unique)
        out.append(shape.replace("{}", several, 1) if numbers else shape)
    return ", ".join(out)
