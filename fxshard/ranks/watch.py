"""How ranks learn of each other's whereabouts when something went wrong: through the store, never through collectives.

A collective that fails says little: a connection was closed, or time ran out. The rank that sees it asks all others
where they are. A thread of each rank answers, so that a rank that waits in a collective, or computes, answers too.
One that has died does not: on the same host its process is looked up; from another host it is silent.

    key                     value
    question/N              somebody asks; or rank 0, which may keep the store, ends
    answer/N/RANK           where that rank is: see ``Position``
    trouble/RANK            why it failed, and the how-manieth rank it was to fail

The thread looks for a question four times a second. That, and nothing else, is the cost of a run in which nothing
fails.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from fxshard.errors import DistributedError
from fxshard.ranks.launcher import watch_launcher
from fxshard.ranks.position import POSITION
from fxshard.ranks.session import Session, is_gone, plain, said
from fxshard.torch_internals import Store, default_store, default_timeout_s

POLL_S = 0.25
"""How often a rank looks whether another one asks."""
PATIENCE_S = 5.0
"""How long a rank waits for answers, or a quarter of the process group's timeout if that is less."""
END = "end"
FRESH_S = 6.0
"""A question this old is asked anew."""


@dataclass
class Report:
    """What a rank could find out of the others.

    Attributes:
        answers: rank -> where it is, as ``Position.state`` tells it.
        troubles: rank -> why it failed: ``text``, ``order``, ``own``, and where it was then.
        gone: ranks whose processes have ended, each with its process id.
        silent: ranks that did not answer, and may hang as well.
        unknown: those of them that have not begun to use fxshard.
        problem: why the others could not be asked.
    """

    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    troubles: dict[int, dict[str, Any]] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    problem: str = ""


class Watch(Session):
    """One rank's part in the questions and answers, for as long as the default process group lives.

    Args:
        store: the store of the default process group.
        rank: this rank.
        world: how many there are.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.timeout_s = default_timeout_s()
        self.patience_s = min(PATIENCE_S, self.timeout_s / 4)
        super().__init__(store, rank, world)
        self.may_keep = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # the store: rank 0
        self.question = 0  # the latest that this rank knows of
        self.noticed = -FRESH_S  # when it did
        self.used = 0  # the latest whose answers it has used
        self.trouble: dict[str, Any] | None = None
        self.here: tuple[int, int] | None = None  # the collective in which this rank was when it last looked
        self.since = 0.0  # since when
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._group = weakref.ref(dist.group.WORLD)
        self.thread = threading.Thread(target=self._listen, name="fxshard watch", daemon=True)
        self.thread.start()
        watch_launcher()

    # --- answering -------------------------------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Whether the process group is still the one that it was made for."""
        group = self._group()
        return group is not None and dist.is_initialized() and group is dist.group.WORLD

    def _listen(self) -> None:
        pause_s = 0.005
        with contextlib.suppress(Exception):  # the store's host has ended: a rank that asks will notice it
            while not self.stopped.wait(pause_s) and self.is_current and not self.lost and not self._keeper_is_gone():
                if not self.is_complete:
                    self.join()
                if self.joined.is_set():
                    self._look()
                    self._look_ahead()
                pause_s = min(2 * pause_s, POLL_S)

    def _keeper_is_gone(self) -> bool:
        """Whether rank 0 has ended on this host: to ask a store that it kept makes torch print pages of warnings."""
        return self.may_keep and self.first is not None and is_gone(self.first)

    def _look_ahead(self) -> None:
        """Asks before time runs out for the collective that this rank is in, so that it need not wait after that."""
        here = (POSITION.call, POSITION.number) if POSITION.inside else None
        if here != self.here:
            self.here, self.since = here, time.monotonic()
        elif here is not None and time.monotonic() - self.since > self.timeout_s - self.patience_s:
            self._open()
            self.since = float("inf")

    def _look(self) -> None:
        """Answers a question that nobody here has answered yet."""
        with self.lock:
            while self.store.check([f"question/{self.question + 1}"]):
                self._answer(self.question + 1)
                if self.get(f"question/{self.question}") == END:
                    self.stopped.set()

    def _answer(self, number: int) -> None:
        self.question, self.noticed = number, time.monotonic()
        self.set(f"answer/{number}/{self.rank}", POSITION.state())

    # --- asking ----------------------------------------------------------------------------------------------------

    def ask(self) -> Report:
        """Where the other ranks are: at once where one has ended or failed, else within ``patience_s``."""
        report = Report()
        if not self.joined.wait(self.patience_s):
            report.problem = "rank 0 has not called fxshard.parallelize yet"
            return report
        if not self.lost:
            try:
                self.bounded(lambda: self._ask(report), 2 * self.patience_s)
            except Exception as error:
                self.lost = plain(error)
        report.problem = self.lost
        deadline = time.monotonic() + min(1.0, self.patience_s)
        while self.lost and self.first is not None and not report.gone and time.monotonic() < deadline:
            if is_gone(self.first):
                report.gone = {0: self.first["pid"]}
            time.sleep(0.01)  # its connections end before the process does
        return report

    def _ask(self, report: Report) -> None:
        processes = {r: self.get(f"process/{r}") for r in self.others}
        self._open()
        self.used = self.question
        deadline = self.noticed + self.patience_s
        while True:
            for rank in set(self.others) - report.answers.keys():
                if (answer := self.get(f"answer/{self.used}/{rank}")) is not None:
                    report.answers[rank] = answer
            waiting = set(self.others) - report.answers.keys()
            report.gone = {r: processes[r]["pid"] for r in self.others if processes[r] and is_gone(processes[r])}
            if report.gone or not waiting or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for rank in self.others:
            if (trouble := self.get(f"trouble/{rank}")) is not None:
                report.troubles[rank] = trouble
        if not report.gone:
            report.silent, report.unknown = waiting, {r for r in waiting if processes[r] is None}

    def _open(self) -> None:
        """Asks, unless somebody just did."""
        self._look()
        with self.lock:
            if time.monotonic() - self.noticed > FRESH_S or self.used == self.question:
                self.set(f"question/{self.question + 1}", self.rank)
                self._answer(self.question + 1)

    def tell(self, text: str, own: bool) -> None:
        """Writes down why this rank fails, for the others.

        Args:
            text: the reason.
            own: it is a reason of its own, not that of another rank.
        """

        def body() -> None:
            if self.trouble is None or self.trouble["call"] != POSITION.call:
                self.trouble = {"order": self.store.add("troubles", 1)}
            at = {"call": POSITION.call, "number": POSITION.number, "at": POSITION.text()}
            self.trouble |= {"text": text, "own": own, **at}
            self.set(f"trouble/{self.rank}", self.trouble)

        if not self.lost and self.joined.wait(1):
            try:
                self.bounded(body, self.patience_s)
            except Exception as error:  # every further try would end in a page of warnings from torch
                self.lost = plain(error)

    # --- the end ---------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the thread."""
        self.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join(1)

    def end(self) -> None:
        """The interpreter ends: tells the others if it does so by an error."""
        if self.pid != os.getpid():
            return  # a fork of this rank's
        self.stop()
        error = getattr(sys, "last_value", None)
        if error is not None and not isinstance(error, DistributedError):
            self.tell(said(error), own=True)
        if self.rank == 0 and self.may_keep and not self.lost:
            with contextlib.suppress(Exception):
                self.bounded(self._take_leave, 1)

    def _take_leave(self) -> None:
        """Lets the others stop asking a store that is about to end; for half a second at the most."""
        number = self.question + 1
        self.set(f"question/{number}", END)
        deadline, waiting = time.monotonic() + 2 * POLL_S, set(self.others) - self._unwelcome
        while waiting and time.monotonic() < deadline:
            ended = {r for r in waiting if (process := self.get(f"process/{r}")) and is_gone(process)}
            waiting = {r for r in waiting - ended if self.get(f"answer/{number}/{r}") is None}
            time.sleep(0.01)


# --- this process --------------------------------------------------------------------------------------------------

_current: list[Watch] = []


def current() -> Watch | None:
    """This process's watch, begun where there is none yet; None where no other ranks run."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "fake":  # PyTorch's group for trying out one rank of many: nobody else is there
        return None
    if not _current or not _current[0].is_current or _current[0].pid != os.getpid():
        if _current:
            _current.pop().stop()
        _current.append(Watch(default_store(), dist.get_rank(), dist.get_world_size()))
    return _current[0]


@atexit.register
def _end() -> None:
    if _current:
        _current[0].end()
