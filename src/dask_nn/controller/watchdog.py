"""A rank's own watchman: tells the client that it lives, and notices when nobody wants it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from distributed.core import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Worker

    from dask_nn.collectives.base import Communicator

__all__ = ["Watchdog"]

INTERVAL_S = 1.0
# A rank that nobody waits for any more stops at a step boundary, or so much later anyway.
ORPHAN_S = 5.0
WANTED = frozenset({"executing", "long-running"})


class Watchdog:
    """A thread beside a rank.

    Parameters
    ----------
    worker : Worker
        The rank's.
    key : str
        Of the rank's task.
    comm : Communicator
        The rank's; it counts its signs of life.
    tell : callable
        Sends a message of a kind, with details, to the client.
    obey : callable
        Given the order ``"leave"``, when nobody wants the rank any more or its worker is about to
        close.
    ends_at : float or None
        When the client is told that the job of this worker is about to end, by ``time.time()``.
    """

    def __init__(
        self,
        worker: Worker,
        key: str,
        comm: Communicator,
        *,
        tell: Callable[[str, dict[str, Any]], None],
        obey: Callable[[str], None],
        ends_at: float | None = None,
    ) -> None:
        self._worker = worker
        self._key = key
        self._comm = comm
        self._tell = tell
        self._obey = obey
        self._ends_at = ends_at
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dask-nn-watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        beats, since = -1, time.monotonic()
        orphaned_at: float | None = None
        leaving = False
        while not self._ended.wait(INTERVAL_S):
            now = time.monotonic()
            if self._comm.beats != beats:
                beats, since = self._comm.beats, now
            status = self._worker.status
            if status in {Status.closing_gracefully, Status.closing} and not leaving:
                leaving = True
                self._obey("leave")
                self._tell("leaving", {"address": self._worker.address})
            if status is Status.closed:
                self._comm.abort()
                return
            if orphaned_at is None and not self._is_wanted():
                orphaned_at = now
                self._obey("leave")
            if orphaned_at is not None and now - orphaned_at > ORPHAN_S:
                self._comm.abort()
            if self._ends_at is not None and time.time() >= self._ends_at:
                self._ends_at = None
                self._tell("walltime", {})
            self._tell("beat", {"stuck_s": now - since, "started": beats > 0})

    def _is_wanted(self) -> bool:
        """Tell whether the scheduler still wants this task: its client lives and waits for it."""
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state in WANTED
