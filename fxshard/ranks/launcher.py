"""A rank ends soon after its launcher has died: nobody would start it again, nor end it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

__all__ = ["watch_launcher"]

POLL_S = 1.0
GRACE_S = 5.0
"""How long a rank may take to end by itself once it was told to."""
_watching: list[threading.Thread] = []


def watch_launcher() -> None:
    """Begins to look whether torchrun, which started this process, is still there; where it did not, does nothing."""
    if not _watching and "TORCHELASTIC_RUN_ID" in os.environ:
        thread = threading.Thread(target=_watch, args=(os.getppid(),), name="fxshard launcher", daemon=True)
        _watching.append(thread)
        thread.start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"rank {os.environ.get('RANK')} ends: torchrun, which started it, has died\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
