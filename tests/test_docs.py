"""The pages of the documentation: their Python runs, prints what they show, and their links lead somewhere.

A page's ```python blocks run in order, in one namespace. A ```text block right after one of them is what it must
print; ``...`` stands for anything, and runs of spaces are equal. A block marked ```python no-run is only parsed.

    python -m tests.test_docs        writes what the blocks print now into the pages; then read the difference
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import itertools
import linecache
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block of a page: its language, its text, where the text stands."""

    language: str
    text: str
    start: int
    end: int
    line: int
    gap: str
    """What stands between the block before and this one."""


def blocks_of(page: str) -> list[Block]:
    out: list[Block] = []
    for found in FENCE.finditer(page):
        gap = page[out[-1].end : found.start()].removeprefix("```") if out else page[: found.start()]
        line = page.count("\n", 0, found.start(2)) + 1
        out.append(Block(found[1].strip(), found[2], found.start(2), found.end(2), line, gap))
    return out


def run(page: str, name: str) -> list[tuple[Block, str, Block | None]]:
    """Runs a page; for every Python block that ran: the block, what it printed, the block that says what it should."""
    blocks, namespace, out = blocks_of(page), {"__name__": "__main__"}, []
    torch.manual_seed(0)
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        if block.language == "python no-run":
            ast.parse(block.text)
        if block.language != "python":
            continue
        filename = "model.py"  # what the printed source lines name
        linecache.cache[filename] = (len(block.text), None, block.text.splitlines(True), filename)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, filename, "exec"), namespace)
        except Exception as error:
            error.add_note(f"in the block at {name}:{block.line}")
            raise
        shown = after if after is not None and after.language == "text" and not after.gap.strip() else None
        out.append((block, printed.getvalue(), shown))
    return out


def agree(shown: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(shown.strip() + "\n", strip(printed).strip() + "\n", OPTIONS)


def strip(text: str) -> str:
    """Without the spaces at the ends of lines, as pages are kept."""
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_runs_and_prints_what_it_shows(path: Path) -> None:
    for block, printed, shown in run(path.read_text(encoding="utf-8"), path.name):
        where = f"{path.name}:{block.line}"
        if shown is None:
            assert not printed.strip(), f"{where} prints something that the page does not show:\n{printed}"
        elif not agree(shown.text, printed):
            pytest.fail(
                f"{where} prints\n\n{printed}\nwhere the page shows\n\n{shown.text}\n(python -m tests.test_docs)"
            )


def anchors_of(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    page = FENCE.sub("", page)
    headings = re.findall(r"^#+ +(.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    page = FENCE.sub("", path.read_text(encoding="utf-8"))
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        if not linked.exists() or (anchor and anchor not in anchors_of(linked.read_text(encoding="utf-8"))):
            missing.append(target)
    assert not missing


def test_the_readme_leads_to_every_page_and_example() -> None:
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        linked = {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)\s#:]+)[^)]*\)", text)}
        queue += [path for path in linked - seen if path.suffix == ".md" and path.is_file()]
        seen |= linked
    wanted = [*PAGES[1:], *sorted((ROOT / "examples").glob("*.py"))]
    assert not [str(path.relative_to(ROOT)) for path in wanted if path not in seen]


def test_the_commands_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\$ )?((?:python3?|torchrun) .+?)(?: +#.*)?$", readme, re.MULTILINE)
    assert {"python3 dev.py demo", "python3 dev.py test"} <= set(commands)
    files = [word for command in commands for word in command.split() if word.endswith(".py")]
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_a_wrong_page_is_caught() -> None:
    page = "```python\nprint(1 + 1, 0.5)\n```\n\n```text\n2 ...\n```\n"
    ((_, printed, shown),) = run(page, "page")
    assert shown is not None
    assert agree(shown.text, printed)
    assert not agree("3 ...", printed)
    ((_, _, none),) = run(page.replace("\n\n", "\n\nwords\n\n"), "page")
    assert none is None
    with pytest.raises(ZeroDivisionError) as caught:
        run("\n\n```python\n1 / 0\n```\n", "page")
    assert caught.value.__notes__ == ["in the block at page:4"]


def write(path: Path) -> None:
    """Replaces what the page shows by what its blocks print, where the two do not agree."""
    page = path.read_text(encoding="utf-8")
    for _, printed, shown in reversed(run(page, path.name)):
        if shown is not None and not agree(shown.text, printed):
            page = page[: shown.start] + strip(printed).strip("\n") + "\n" + page[shown.end :]
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for each in [Path(arg) for arg in sys.argv[1:]] or PAGES:
        write(each)
