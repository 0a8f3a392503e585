"""Errors of collectives: which rank, in which collective, and what became of the others.

    rank 0: all_reduce 1 of call 3 over tp, f32[4, 8], failed: rank 1 died
      rank 1  died (process 4711 has ended); look at its own output
      gloo    Connection closed by peer [127.0.0.1]:36141
      fix     mend what ended rank 1; ...

Everything that communicates runs in ``guarded``, every call of a program in ``calling``. Both cost a few assignments
where nothing fails. Where something does, the rank asks the others (``fxshard.ranks.watch``), for a few seconds at
the most, and raises ``DistributedError``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from fxshard.errors import DistributedError, FxshardError
from fxshard.ranks.devices import backends
from fxshard.ranks.position import COMPARING, POSITION, RUNNING
from fxshard.ranks.session import plain, said
from fxshard.ranks.watch import Report, Watch, current

P = ParamSpec("P")
T = TypeVar("T")

SHOWN = 8
"""How many other ranks an error tells of."""

OWN, DEAD, SILENT, OUT, ELSEWHERE, SECOND, SAME = range(7)
"""What may be the matter with another rank, the surest cause first."""

VERBS = {
    DEAD: ("died", "died"),
    SILENT: ("does not answer", "do not answer"),
    OUT: ("has not come", "have not come"),
    ELSEWHERE: ("is in another one", "are in other ones"),
    SECOND: ("failed, too", "failed, too"),
}

Finding = tuple[int, int, str]
"""What is the matter, the rank, and in words."""

ALL_IN_IT = "all its ranks are in it, so the connection or the backend failed"
UNASKED = "the others cannot be asked"
KEEPER = "rank 0 keeps it, or torchrun on the first host: look whether they live"


class Communicates(Protocol):
    """A group of ranks along a mesh axis: its name, and its ranks in the numbers of the default process group."""

    axis: str
    ranks: tuple[int, ...]


class guarded:
    """``with guarded(group, "all_reduce", x):`` around what communicates, or waits for it.

    An error of it becomes a ``DistributedError`` that says what became of the other ranks. A collective that is issued
    and waited for later is guarded where it is waited for.

    Args:
        group: the ranks that take part; None for all.
        name: the kind of the collective.
        x: what this rank brings.
    """

    __slots__ = ("group", "name", "x")

    def __init__(self, group: Communicates | None, name: str, x: torch.Tensor) -> None:
        self.group, self.name, self.x = group, name, x

    def __enter__(self) -> None:
        POSITION.enter(self.name, self.group.axis if self.group is not None else "", self.x)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            POSITION.inside = False
        elif is_of_backend(error):
            raise failure(error, self.group) from error


def is_of_backend(error: BaseException) -> bool:
    """Whether an error came from communicating: backends raise plain ``RuntimeError`` or subclasses of torch's own."""
    return isinstance(error, RuntimeError) and not isinstance(error, FxshardError | torch.OutOfMemoryError)


class telling:
    """``with telling():`` around what all ranks do together: tells the others if it fails on this rank."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, DistributedError):
            watch = current()
            if watch is not None:
                watch.tell(said(error), own=True)


class calling(telling):
    """``telling`` around a call of a program: counts it, too."""

    __slots__ = ()

    def __enter__(self) -> None:
        POSITION.begin()


def told_to_others(function: Callable[P, T]) -> Callable[P, T]:
    """A function that all ranks call together, and whose errors the others learn of."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with telling():
            return function(*args, **kwargs)

    return call


def failure(error: BaseException, group: Communicates | None) -> DistributedError:
    """The error for a collective that failed on this rank, at ``POSITION``."""
    backend = plain(error)
    watch = current()
    if watch is None:
        return DistributedError(f"{POSITION.text()} failed: {backend}")
    watch.tell(backend, own=False)
    report = watch.ask()
    ranks = group.ranks if group is not None else tuple(range(watch.world))
    findings = find(report, watch, ranks)
    why = headline(findings) or (UNASKED if report.problem else ALL_IN_IT)
    watch.tell(why, own=False)
    POSITION.inside = False
    lines = [f"rank {watch.rank}: {POSITION.text()}, failed: {why}", *told(findings)]
    if report.problem:
        lines.append(f"  store   {report.problem}; {KEEPER}")
    lines += [f"  {'/'.join(dict.fromkeys(backends().values())):<7} {backend}"]
    return DistributedError("\n".join(lines), fix=mending(findings))


# --- what became of the others ---------------------------------------------------------------------------------------


def find(report: Report, watch: Watch, ranks: Iterable[int]) -> list[Finding]:
    """What is the matter with each other rank, the surest cause first."""
    found: list[Finding] = []
    group = set(ranks)
    for rank in watch.others:
        finding = _finding(report, watch, rank, rank in group)
        if finding is not None:
            found.append((finding[0], rank, finding[1]))
    order = {rank: trouble["order"] for rank, trouble in report.troubles.items()}
    return sorted(found, key=lambda f: (f[0], order.get(f[1], 0), f[1]))


def _finding(report: Report, watch: Watch, rank: int, in_group: bool) -> tuple[int, str] | None:
    answer, trouble = report.answers.get(rank), report.troubles.get(rank)
    if trouble is not None and (answer is None or answer["call"] <= trouble["call"]):
        return _troubled(trouble, watch, in_group)
    if rank in report.gone:
        return DEAD, f"died (process {report.gone[rank]} has ended); look at its own output"
    if rank in report.unknown:
        return SILENT, "has not called fxshard.parallelize yet, or died; look at its own output"
    if rank in report.silent:
        return SILENT, "does not answer: it died or hangs; look at its own output"
    return None if answer is None else _alive(answer, in_group)


def _troubled(trouble: Mapping[str, Any], watch: Watch, in_group: bool) -> tuple[int, str]:
    """Of a rank that has failed."""
    if trouble["own"]:
        first = watch.trouble is None or trouble["order"] < watch.trouble["order"]
        return OWN, f"failed{' first' * first}: {trouble['text']}"
    if (trouble["call"], trouble["number"]) == (POSITION.call, POSITION.number):
        return SECOND, "failed too, in the same collective"
    return ELSEWHERE if in_group else SECOND, f"failed in {trouble['at']}: {trouble['text']}"


def _alive(answer: Mapping[str, Any], in_group: bool) -> tuple[int, str] | None:
    """Of a rank that lives; None where that has nothing to do with this one's error."""
    if answer["inside"]:
        if answer["text"] == POSITION.text():
            return SAME, "waits in the same collective"
        return (ELSEWHERE, f"is in {answer['text']}") if in_group else None
    if not in_group and (answer["call"], answer["number"]) >= (POSITION.call, POSITION.number):
        return None  # it is ahead of this rank
    doing = "comparing with the others" if answer["phase"] == COMPARING else "in no collective"
    return OUT, f"is {doing}, after {answer['text']}; it runs {answer['line']}"


def headline(findings: list[Finding]) -> str:
    """The cause in a sentence; empty where none was found."""
    if not findings or findings[0][0] == SAME:
        return ""
    worst = findings[0][0]
    if worst == OWN:
        return f"rank {findings[0][1]} {findings[0][2].partition(':')[0]}"
    who = [rank for what, rank, _ in findings if what == worst]
    one, many = VERBS[worst]
    return f"{name(who)} {one if len(who) == 1 else many}"


def name(ranks: Iterable[int]) -> str:
    """Ranks in words.

    >>> name([2]), name([0, 2, 3, 4, 7])
    ('rank 2', 'ranks 0, 2-4, 7')
    """
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)
    return f"rank{'s' * (text != str(spans[0][0]))} {text}"


def told(findings: list[Finding]) -> list[str]:
    """A line for each rank that something is the matter with, and one for those that wait as well."""
    lines = [f"  rank {rank:<2} {text}" for what, rank, text in findings if what != SAME]
    same = [rank for what, rank, _ in findings if what == SAME]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more ranks"]
    if same:
        lines.append(f"  {name(same)} {'waits' if len(same) == 1 else 'wait'} in the same collective")
    return lines


def mending(findings: list[Finding]) -> str:
    """What the user can do about it."""
    what, rank, _ = findings[0] if findings else (SAME, 0, "")
    if what in (OWN, DEAD, SILENT, SECOND):
        return (
            f"mend what rank {rank}'s own output says; under torchrun --max-restarts=N all ranks start anew, and the "
            "script goes on from its last checkpoint"
        )
    if what in (OUT, ELSEWHERE):
        return (
            "let every rank make the same calls in the same order (the program, backward, full_state_dict, full_grads: "
            "none only `if rank == 0`); if the rank is only slow, raise the timeout of init_process_group"
        )
    return "look at the network between the ranks; TORCH_DISTRIBUTED_DEBUG=DETAIL checks every collective"


def compared() -> None:
    """The ranks run the same from here on, until the next call."""
    POSITION.phase = RUNNING
