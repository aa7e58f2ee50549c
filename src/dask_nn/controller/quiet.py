"""Keeping a worker's own housekeeping out of a rank's way.

The event loop of a Dask worker wakes up a hundred times a second to sample stacks and fifty times
to measure its own lag. Each time it takes the interpreter lock from a rank whose steps last half a
millisecond, and all ranks wait for the one that was disturbed: measured 720 us per step with both,
555 us without.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distributed.utils import sync

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["quiet_worker"]

# The sampling of task stacks for the profile page, and the measurement of the loop's lag.
PAUSED = ("profile", "tick")

_users: Counter[str] = Counter()
_lock = threading.Lock()


@contextlib.contextmanager
def quiet_worker(worker: Worker) -> Iterator[None]:
    """Pause the worker's sampling for the life of a rank; heartbeats and monitoring go on.

    Parameters
    ----------
    worker : Worker
        Of this process. Several ranks may ask for the same one.
    """
    with _lock:
        _users[worker.address] += 1
        first = _users[worker.address] == 1
    if first:
        sync(worker.loop, _pause, worker)
    try:
        yield
    finally:
        with _lock:
            _users[worker.address] -= 1
            last = not _users[worker.address]
            if last:
                del _users[worker.address]
        if last:
            sync(worker.loop, _resume, worker)


async def _pause(worker: Worker) -> None:
    for name in PAUSED:
        callback = worker.periodic_callbacks.get(name)
        if callback is not None:
            callback.stop()


async def _resume(worker: Worker) -> None:
    # The pause itself is no lag of the loop.
    worker._last_tick = time.time()  # noqa: SLF001
    for name in PAUSED:
        callback = worker.periodic_callbacks.get(name)
        if callback is not None and worker.status.name == "running":
            callback.start()
