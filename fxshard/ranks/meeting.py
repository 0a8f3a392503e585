"""All ranks compare what they are about to run, through the store, before they run it.

Not through collectives: a rank that disagrees may not be there at all, but in a collective of what it runs instead,
and collectives of different sizes end processes (gloo) or never (NCCL).

Every rank posts the hashes of its sections. Rank 0 reads them all, and posts the name of the first section that
differs. Where there is one, all post its items, and rank 0 posts the difference in words: 2N messages, where
everybody asking everybody would be N * N.

    key                       value
    meeting/CALL/RANK         section -> hash
    meeting/CALL/verdict      the first section that differs, or nothing
    meeting/CALL/items/RANK   item -> text, of that section
    meeting/CALL/difference   what differs, in words
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxshard.errors import DistributedError
from fxshard.ranks.faults import ELSEWHERE, KEEPER, Finding, find, headline, mending, name, told
from fxshard.ranks.position import COMPARING, POSITION, RUNNING
from fxshard.ranks.watch import Report, Watch

FIRST_ASK_S, LAST_ASK_S = 1.0, 16.0
"""After how long a rank that waits asks where the others are; twice as long the next time, up to the second."""


@dataclass(frozen=True)
class Section:
    """One thing that all ranks must agree on.

    Attributes:
        items: its parts, each as text.
        verb: what a rank does with an item: ``was given``.
        fix: what to do about a difference.
        note: what to say before the first difference: ``{count}`` of them, ``{item}`` the first.
    """

    items: Mapping[str, str]
    verb: str
    fix: str
    note: str = ""

    @property
    def digest(self) -> str:
        """A hash of the items, in order."""
        return hashlib.sha256(json.dumps(list(self.items.items())).encode()).hexdigest()[:16]


def meet(watch: Watch, sections: Mapping[str, Section], about: str) -> None:
    """Compares the sections of all ranks; all ranks must come.

    Args:
        watch: this process's.
        sections: in the order in which they are compared.
        about: what this rank is about to run, for the error where others do not come.

    Raises:
        DistributedError: on every rank, when ranks differ, or do not come within the process group's timeout.
    """
    POSITION.phase = COMPARING
    if not watch.joined.wait(watch.timeout_s - watch.patience_s):
        raise DistributedError(
            f"rank {watch.rank}, call {POSITION.call}, {about}: all ranks compare what they run, but rank 0 did not",
            fix="call fxshard.parallelize on every rank; if rank 0 did, it died or hangs: look at its own output",
        )
    meeting = _Meeting(watch, f"meeting/{POSITION.call}", about)
    differs = meeting.agree(sections)
    if differs:
        raise DistributedError(meeting.difference(sections[differs]), fix=sections[differs].fix)


class _Meeting:
    def __init__(self, watch: Watch, key: str, about: str) -> None:
        self.watch, self.key, self.about = watch, key, about
        self.deadline = time.monotonic() + watch.timeout_s - watch.patience_s

    def agree(self, sections: Mapping[str, Section]) -> str:
        """The first section in which ranks differ; empty where there is none."""
        mine = {part: section.digest for part, section in sections.items()}
        self.watch.set(f"{self.key}/{self.watch.rank}", mine)
        if self.watch.rank == 0:
            others = self._all(self.key)
            differs = next((part for part in mine if any(o.get(part) != mine[part] for o in others.values())), "")
            self.watch.set(f"{self.key}/verdict", differs)
        return str(self._wait(f"{self.key}/verdict", 0))

    def difference(self, section: Section) -> str:
        """What differs in a section, in words, the same on all ranks."""
        self.watch.set(f"{self.key}/items/{self.watch.rank}", section.items)
        if self.watch.rank == 0:
            items = {0: section.items, **self._all(f"{self.key}/items")}
            self.watch.set(f"{self.key}/difference", first_difference(items, section.verb, section.note))
        return str(self._wait(f"{self.key}/difference", 0))

    def _all(self, key: str) -> dict[int, dict[str, str]]:
        return {rank: self._wait(f"{key}/{rank}", rank) for rank in self.watch.others}

    def _wait(self, key: str, rank: int) -> Any:
        """The value of a key that ``rank`` sets, once it is there."""
        pause_s, ask_s = 0.0005, FIRST_ASK_S
        asked = time.monotonic()
        while (value := self.watch.get(key)) is None:
            now = time.monotonic()
            if now > min(self.deadline, asked + ask_s):
                self._look_for_the_others(key, rank, is_late=now > self.deadline)
                asked, ask_s = time.monotonic(), min(2 * ask_s, LAST_ASK_S)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return value

    def _look_for_the_others(self, key: str, rank: int, is_late: bool) -> None:
        """Raises where somebody will not come: it has ended, or runs something else in this call; or time is up."""
        report = self.watch.ask()
        if self.watch.get(key) is not None:
            return
        absent = [r for r in self.watch.others if r == rank or self.watch.get(f"{self.key}/{r}") is None]
        lost = [r for r in absent if r in report.gone or self._went_past(report, r)]
        if lost or is_late:
            raise self._error(report, lost or absent)

    def _went_past(self, report: Report, rank: int) -> bool:
        answer, trouble = report.answers.get(rank), report.troubles.get(rank)
        if trouble is not None and trouble["own"] and trouble["call"] >= POSITION.call:
            return True
        here = POSITION.call
        return answer is not None and (answer["call"] > here or (answer["call"], answer["phase"]) == (here, RUNNING))

    def _error(self, report: Report, absent: list[int]) -> DistributedError:
        findings = [f for f in find(report, self.watch, absent) if f[1] in absent]
        why = headline([f for f in findings if f[0] != ELSEWHERE]) or f"{name(absent)} did not come"
        text = f"call {POSITION.call}, {self.about}: all ranks compare what they run, but {why}"
        self.watch.tell(text, own=bool(findings) and findings[0][0] == ELSEWHERE)
        problem = [f"  store   {report.problem}; {KEEPER}"] if report.problem else []
        lines = [f"rank {self.watch.rank}, {text}", *told(findings), *problem]
        return DistributedError("\n".join(lines), fix=_mending(findings))


def _mending(findings: list[Finding]) -> str:
    if findings and findings[0][0] == ELSEWHERE:
        return "give every rank the same whole inputs, in the same order of calls, and the same train() or eval()"
    return mending(findings)


def first_difference(items: Mapping[int, Mapping[str, str]], verb: str, note: str = "") -> str:
    """The first item in which ranks differ, with all sides' values, and how many more there are.

    >>> first_difference({0: {"x": "f32[4]"}, 1: {"x": "f32[6]"}, 2: {"x": "f32[4]"}}, "was given")
    'rank 1 was given x: f32[6], the others f32[4]'
    >>> first_difference({0: {"x": "1", "y": "2"}, 1: {}}, "has")
    'rank 0 has x: 1, rank 1 nothing (and 1 more item differs)'
    """
    every = list(dict.fromkeys(item for held in items.values() for item in held))
    differing = [item for item in every if len({held.get(item) for held in items.values()}) > 1]
    if not differing:  # in the order only
        return f"the ranks hold the same in another order: {', '.join(every[:4])}, ..."
    item, more = differing[0], len(differing) - 1
    sides: dict[str, list[int]] = {}
    for rank, held in items.items():
        sides.setdefault(held.get(item, "nothing"), []).append(rank)
    fewest_first = sorted(sides.items(), key=lambda side: (len(side[1]), side[1]))
    (value, ranks), *rest = fewest_first
    has = verb if len(ranks) == 1 else verb.replace("was ", "were ").replace("has", "have").replace("runs", "run")
    text = f"{name(ranks)} {has} {item}: {value}"
    for index, (value, ranks) in enumerate(rest):
        is_rest = index == len(rest) - 1 and 2 * len(ranks) > len(items)
        text += f", {'the others' if is_rest else name(ranks)} {value}"
    if note:
        return f"{note.format(count=len(differing), item=item)}: {text}"
    return text + (f" (and {more} more {_items(more)})" if more else "")


def _items(count: int) -> str:
    return "item differs" if count == 1 else "items differ"
