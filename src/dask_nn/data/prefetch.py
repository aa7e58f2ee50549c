"""Loading windows in the background, ahead of each shard."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Prefetcher"]

POLL_S = 0.1
# A load that takes longer than this to end is left to itself.
CLOSE_TIMEOUT_S = 60.0


class Prefetcher[T]:
    """Run loads in one thread, in the order in which they are needed.

    Each lane (a shard) has at most ``alive`` loads at a time, from the moment one begins until
    the consumer releases it; the thread waits before it begins another. Because loads are ordered
    by the step that needs them, a consumer that takes from its lanes in step order, and releases
    before it takes, never waits for a load that waits for the consumer.

    Parameters
    ----------
    loads : iterable of (lane, callable)
        In the order of need; drawn lazily, in the thread.
    lanes : iterable of int
        The lanes that occur.
    alive : int
        Loads that one lane may have: begun, finished or in use.
    """

    def __init__(
        self,
        loads: Iterable[tuple[int, Callable[[], T]]],
        *,
        lanes: Iterable[int],
        alive: int = 2,
    ) -> None:
        self._loads = loads
        self._lanes: dict[int, queue.SimpleQueue[T]] = {lane: queue.SimpleQueue() for lane in lanes}
        self._permits = {lane: threading.Semaphore(alive) for lane in self._lanes}
        # Beside the lanes: a full one would keep the error from a consumer that waits at another.
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._patience_s = CLOSE_TIMEOUT_S
        self._thread = threading.Thread(target=self._run, name="dask-nn-prefetch", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def take(self, lane: int, *, check: Callable[[], None] | None = None) -> T:
        """Wait for the next load of a lane.

        Parameters
        ----------
        lane : int
            Whose load.
        check : callable, optional
            Called now and then while waiting; may raise to end the wait.

        Raises
        ------
        Exception
            Whatever a load raised, in every lane that has nothing left from before.
        """
        waiting = self._lanes[lane]
        while True:
            failed = self._error  # read first: what was loaded before it is in its lane by now
            try:
                return waiting.get(block=failed is None, timeout=POLL_S)
            except queue.Empty:
                if failed is not None:
                    raise failed from None
                if check is not None:
                    check()

    def take_if_there(self, lane: int) -> T | None:
        """Give the next load of a lane if it is there; never waits, and raises nothing."""
        try:
            return self._lanes[lane].get_nowait()
        except queue.Empty:
            return None

    def release(self, lane: int) -> None:
        """Say that a load that was taken is used up."""
        self._permits[lane].release()

    def stop(self) -> None:
        """Begin no more loads."""
        self._stopped.set()

    def close(self, waiting: Callable[[], None] | None = None) -> None:
        """Stop loading and wait for the thread to end, and with it the load under way.

        Parameters
        ----------
        waiting : callable, optional
            Called now and then while it waits.
        """
        self.stop()
        # A second call has nothing more to wait for.
        deadline, self._patience_s = time.monotonic() + self._patience_s, 0.0
        while self._thread.is_alive() and time.monotonic() < deadline:
            if waiting is not None:
                waiting()
            self._thread.join(POLL_S)

    def _run(self) -> None:
        loads = iter(self._loads)
        try:
            for lane, load in loads:
                if not self._may_begin(lane):
                    return
                self._lanes[lane].put(load())
        except BaseException as error:
            self._error = error

    def _may_begin(self, lane: int) -> bool:
        """Wait until a lane has room; return False once loading is to end."""
        while not self._stopped.is_set():
            if self._permits[lane].acquire(timeout=POLL_S):
                return not self._stopped.is_set()
        return False
