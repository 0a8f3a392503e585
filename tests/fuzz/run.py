"""Many programs: a worker process makes and judges them, and is killed and started anew where one takes too long."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.fuzz.judge import Trial, Verdict, judge
from tests.fuzz.plans import plans
from tests.fuzz.program import Program
from tests.fuzz.programs import make

LIMIT_S = 30.0
"""How long a program may take under all its plans."""
PLANS = 2
Judge = Callable[[int, int], list[Verdict]]


def one(seed: int, index: int) -> list[Verdict]:
    """The verdicts of one program."""
    return judge(make(seed, index), lambda trial: plans(seed, index, *trial.shapes(), count=PLANS))


def with_plan(program: Program, plan: str) -> Verdict:
    """The verdict of a program under one plan."""
    return judge(program, lambda trial: [plan])[0]


def chosen(program: Program, seed: int, index: int) -> list[str]:
    """The plans of a program."""
    return plans(seed, index, *Trial(program).shapes(), count=PLANS)


class Worker:
    """A process that judges programs, one after the other."""

    def __init__(self, work: Judge) -> None:
        context = multiprocessing.get_context("fork")
        self.end, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        other.close()

    def ask(self, seed: int, index: int, limit_s: float) -> list[Verdict]:
        """The verdicts; a hang where they do not come in time, a raw error where the process ends."""
        self.end.send((seed, index))
        if not self.end.poll(limit_s):
            self.stop()
            return [Verdict("hang", details=(f"no answer after {limit_s:.0f} s",))]
        try:
            verdicts: list[Verdict] = self.end.recv()
        except EOFError:
            self.stop()
            return [Verdict("raw error", details=(f"the process ended with {self.process.exitcode}",))]
        return verdicts

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()
        self.end.close()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.is_alive()


def _serve(end: Connection, work: Judge) -> None:
    torch.set_num_threads(1)
    while True:
        seed, index = end.recv()
        end.send(work(seed, index))


def run(
    seed: int, programs: int | None, minutes: float | None, work: Judge = one, limit_s: float = LIMIT_S, start: int = 0
) -> Iterator[tuple[int, list[Verdict]]]:
    """Index and verdicts of one program after the other, until so many are done or the time is over."""
    began, worker, index = time.monotonic(), Worker(work), start
    try:
        while (programs is None or index < start + programs) and (
            minutes is None or time.monotonic() - began < 60 * minutes
        ):
            if not worker.alive:
                worker = Worker(work)
            yield index, worker.ask(seed, index, limit_s)
            index += 1
    finally:
        worker.stop()


class Summary:
    """Counts of verdicts, and which were bad."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.bad: dict[str, list[str]] = defaultdict(list)
        self.refusals: Counter[str] = Counter()
        self.noted: list[str] = []
        self.example: dict[str, int] = {}
        self.programs = 0
        self.began = time.monotonic()

    def add(self, index: int, verdicts: list[Verdict]) -> list[str]:
        """Counts a program's verdicts, and returns what is to be said of them at once."""
        self.programs += 1
        lines = []
        for verdict in verdicts:
            self.counts[verdict.kind] += 1
            if verdict.kind == "refused":
                what = verdict.details[0].splitlines()[0][:140]
                self.refusals[what] += 1
                self.example.setdefault(what, index)
            if verdict.kind == "zeros":
                self.noted.append(str(index))
            if verdict.bad:
                self.bad[verdict.kind].append(str(index))
                lines.append(f"{index}: {verdict.kind}, {verdict.call}, {verdict.plan}")
                lines += [f"    {line}" for detail in verdict.details[:4] for line in detail.splitlines()[:6]]
        return lines

    def figures(self) -> str:
        """How many became what."""
        seconds = time.monotonic() - self.began
        judged = sum(self.counts.values())
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        return f"{self.programs} programs, {judged} with plans, {judged / seconds:.1f} a second: {counts}"

    def text(self, refusals: int = 0) -> str:
        """The figures, and which were bad."""
        lines = [self.figures()]
        lines += ["zeros: " + " ".join(dict.fromkeys(self.noted))] * bool(self.noted)
        lines += [f"{kind}: {' '.join(dict.fromkeys(indices))}" for kind, indices in self.bad.items()]
        lines += [
            f"    {count} times refused, as {self.example[what]}: {what}"
            for what, count in self.refusals.most_common(refusals)
        ]
        return "\n".join(lines)


def shrink(program: Program, plan: str, kind: str, work: Callable[[Program, str], Verdict] = with_plan) -> Program:
    """The program with as few statements as show the same kind of verdict."""
    small: Any = program
    index = len(small.statements) - 1
    while index >= 0:
        less = small.without(index)
        if less is not None and work(less, plan).kind == kind:
            small = less
        index = min(index, len(small.statements)) - 1
    return small  # type: ignore[no-any-return]
