"""Notices that this process slept: whoever was stopped for long may be wanted no more."""

from __future__ import annotations

import threading
import time

__all__ = ["SleepWatch"]

TICK_S = 0.5
# A thread that gets no turn for so long belongs to a process that was stopped, or nearly.
SLEPT_S = 3.0
# On a machine that is overloaded for good nobody is ever awake for long: then it must do so.
PATIENCE = 3


class SleepWatch:
    """A thread that looks at the clock, and what it tells about the time when it could not.

    The clock goes on while a process is stopped (SIGSTOP, a debugger, a frozen container), and
    stands still while its whole machine sleeps: then nobody else went on either.
    """

    def __init__(self) -> None:
        self._ticked = self._woke = time.monotonic()
        self._slept = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dask-nn-clock", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._tick()
        self._slept = False
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def awake_s(self) -> float:
        """Give for how long this process has been awake; infinite if it never slept."""
        self._tick()
        return time.monotonic() - self._woke if self._slept else float("inf")

    def stay_awake(self, seconds: float) -> None:
        """Return once this process has been awake for so long, at once if it never slept.

        If it sleeps again and again, the wait ends after three times as long.
        """
        deadline = time.monotonic() + PATIENCE * seconds
        while (missing := seconds - self.awake_s()) > 0 and time.monotonic() < deadline:
            time.sleep(min(missing, TICK_S))

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            self._tick()

    def _tick(self) -> None:
        # Whoever asks first after a sleep must be told of it, so every question is a look, too.
        with self._lock:
            now = time.monotonic()
            if now - self._ticked > SLEPT_S:
                self._slept, self._woke = True, now
            self._ticked = now
