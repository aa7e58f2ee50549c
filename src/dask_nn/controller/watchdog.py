"""A rank's own watchman: tells the client that it lives, and notices when nobody wants it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distributed.core import Status

from dask_nn.controller.heartbeats import Beat
from dask_nn.controller.processor_time import ProcessorTime

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Worker

    from dask_nn.collectives.base import Communicator
    from dask_nn.controller.block_fetch import FetchWait

__all__ = ["Watchdog"]

logger = logging.getLogger("dask_nn")

INTERVAL_S = 1.0
# A rank that nobody waits for any more stops at a step boundary, or so much later anyway.
ORPHAN_S = 5.0
WANTED = frozenset({"executing", "long-running"})
# A thread that takes, or is queued for, this share of a processor computes; one that polls for
# something takes less.
BUSY_SHARE = 0.05


class Watchdog:
    """A thread beside a rank; the rank's thread is the one that makes it.

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
        Given the order ``"leave"`` when the rank's worker is about to close, or nobody wants the
        rank any more.
    fetch : FetchWait
        Whose blocks the rank waits for.
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
        fetch: FetchWait,
        ends_at: float | None = None,
    ) -> None:
        self._worker = worker
        self._key = key
        self._comm = comm
        self._tell = tell
        self._obey = obey
        self._fetch = fetch
        self._ends_at = ends_at
        self._processor = ProcessorTime()
        self._beats = -1
        self._processor_s = 0.0
        self._looked = self._idle_since = self._unchecked_since = time.monotonic()
        self._orphaned_at: float | None = None
        self._leaving = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dask-nn-watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def is_wanted(self) -> bool:
        """Tell whether the scheduler still wants this task: its client lives and waits for it."""
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state in WANTED

    def _run(self) -> None:
        while True:
            try:
                self._tell("beat", asdict(self._look_at_rank(time.monotonic())))
                self._look_at_worker(time.monotonic())
            except Exception:  # without its watchman the rank would be given up
                logger.exception("the watchman of a rank stumbled")
            if self._worker.status is Status.closed or self._ended.wait(INTERVAL_S):
                return

    def _look_at_rank(self, now: float) -> Beat:
        comm = self._comm
        beats, waiting_since = comm.beats, comm.waiting_since
        processor_s = self._processor.seconds()
        if processor_s - self._processor_s > BUSY_SHARE * (now - self._looked):
            self._idle_since = now
        if beats != self._beats:
            self._idle_since = self._unchecked_since = now
        self._beats, self._processor_s, self._looked = beats, processor_s, now
        holders, holders_since = self._fetch.under_way
        return Beat(
            idle_s=now - self._idle_since,
            unchecked_s=now - self._unchecked_since,
            waiting_s=0.0 if waiting_since is None else now - waiting_since,
            holders=tuple(sorted(holders)),
            holders_s=now - holders_since if holders else 0.0,
        )

    def _look_at_worker(self, now: float) -> None:
        status = self._worker.status
        if status in {Status.closing_gracefully, Status.closing} and not self._leaving:
            self._leaving = True
            self._obey("leave")
            self._tell("leaving", {"address": self._worker.address})
        if status is Status.closed:
            self._comm.abort()
            return
        if self._orphaned_at is None and not self.is_wanted():
            self._orphaned_at = now
            self._obey("leave")
        if self._orphaned_at is not None and now - self._orphaned_at > ORPHAN_S:
            self._comm.abort()
        if self._ends_at is not None and time.time() >= self._ends_at:
            self._ends_at = None
            self._tell("walltime", {})
