"""Whether a thread computes, as the operating system sees it."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

__all__ = ["ProcessorTime"]


class ProcessorTime:
    """The processor time of the thread that makes this; others may read it.

    Where Linux tells it, the time counts, too, in which the thread could have run and others had
    the processor: on a busy machine a thread that computes may get little. Where the system tells
    nothing, it stays at 0.
    """

    def __init__(self) -> None:
        find = getattr(time, "pthread_getcpuclockid", None)
        self._clock = None if find is None else int(find(threading.get_ident()))
        self._queue = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def seconds(self) -> float:
        """Give the seconds so far."""
        used_s = queued_s = 0.0
        with contextlib.suppress(OSError):
            used_s = 0.0 if self._clock is None else time.clock_gettime(self._clock)
        with contextlib.suppress(OSError, ValueError, IndexError):
            queued_s = int(self._queue.read_text(encoding="ascii").split()[1]) / 1e9
        return used_s + queued_s
