"""The ranks' common board in the store of the default process group, and how they come together there.

    key                 value
    session             a number that rank 0 has drawn; all other keys are below it
    process/RANK        its process, on which host, and a number that it has drawn
    welcome/RANK        that number: rank 0 has seen it

The store may still hold what ranks wrote before torchrun started them again, and torchrun's count of the starts differs
between hosts. So a rank takes part only once rank 0 has answered the rank's own number, and rank 0's is part of all
keys: nothing of an earlier start is ever read.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from fxshard.torch_internals import PrefixStore, Store

T = TypeVar("T")


class Session:
    """One rank's access to the board.

    Args:
        store: what all ranks can read and write.
        rank: this rank.
        world: how many there are.

    Attributes:
        joined: set once this rank may read and write.
        first: the process of rank 0, which may keep the store.
        lost: how the store failed; empty while it works.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.base = store
        self.store: Store = PrefixStore("fxshard/nowhere", store)
        self.rank, self.world = rank, world
        self.others = [r for r in range(world) if r != rank]
        self.pid = os.getpid()
        self.nonce = uuid.uuid4().hex
        self.joined = threading.Event()
        self.first: dict[str, Any] | None = None
        self.lost = ""
        self._tried = ""  # the session that this rank asked to join
        self._unwelcome = set(self.others) if rank == 0 else set()
        self.join()

    @property
    def is_complete(self) -> bool:
        """Whether this rank has joined, and rank 0 has welcomed all others."""
        return self.joined.is_set() and not self._unwelcome

    def join(self) -> None:
        """One step of the ranks' coming together; rank 0 welcomes the others."""
        me = {"pid": self.pid, "host": host(), "started": started(self.pid), "nonce": self.nonce}
        if self.rank == 0:
            if not self.joined.is_set():
                self._enter(self.nonce)
                self.set("process/0", me)
                self.base.set("fxshard/session", self.nonce)
                self.joined.set()
            for rank in sorted(self._unwelcome):
                if (process := self.get(f"process/{rank}")) is not None:
                    self.set(f"welcome/{rank}", process["nonce"])
                    self._unwelcome.discard(rank)
        elif self.base.check(["fxshard/session"]):
            session = self.base.get("fxshard/session").decode()
            if session != self._tried:  # of an earlier start, perhaps: there, nobody welcomes this process
                self._enter(session)
                self.set(f"process/{self.rank}", me)
                self._tried = session
            if self.get(f"welcome/{self.rank}") == self.nonce:
                self.first = self.get("process/0")
                self.joined.set()

    def _enter(self, session: str) -> None:
        self.store = PrefixStore(f"fxshard/{session}", self.base)

    def set(self, key: str, value: Any) -> None:
        """Writes a value of JSON."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """The value of a key; None where nobody has set it. It never waits."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def bounded(self, what: Callable[[], T], seconds: float) -> T:
        """``what()``, given up after ``seconds``: a store whose host hangs would never answer.

        Raises:
            TimeoutError: when it was given up.
        """
        done: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                done.append(what())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body, name="fxshard ask", daemon=True)
        thread.start()
        thread.join(seconds)
        if failed:
            raise failed[0]
        if not done:
            raise TimeoutError(f"the store of the process group did not answer within {seconds:.0f} s")
        return done[0]


def said(error: BaseException) -> str:
    """An error in a line.

    >>> said(ValueError("no such token: 7" + chr(10) + "  in line 3"))
    'ValueError: no such token: 7'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def plain(error: BaseException) -> str:
    """The first sentence of a backend's error, without the place in its source.

    >>> plain(RuntimeError("[/a/gloo/pair.cc:5] Connection closed by peer [::1]:2. This is typically caused by ..."))
    'Connection closed by peer [::1]:2'
    """
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if text.startswith("[/") and "] " in text:
        text = text.partition("] ")[2]
    return text.partition(". ")[0]


def host() -> str:
    """Where process ids mean what they mean here; empty where processes cannot be looked up."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When a process of this host began, in the kernel's count; None where there is no such process, or it is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process has certainly ended: it ran on this host, and does not run now.

    >>> me = {"pid": os.getpid(), "host": host(), "started": started(os.getpid())}
    >>> is_gone(me), is_gone(me | {"host": "elsewhere"})
    (False, False)
    """
    return bool(process["host"]) and process["host"] == host() and started(process["pid"]) != process["started"]
