"""Loading windows in the background, one ahead of each shard."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Prefetcher"]

POLL_S = 0.1


class Prefetcher[T]:
    """Run loads in one thread, in the order in which they are needed.

    Each lane (a shard) holds at most ``ahead`` finished loads; the thread waits when a lane is
    full. Because loads are ordered by the step that needs them, a consumer that takes from its
    lanes in step order never waits for a load that waits for the consumer.

    Parameters
    ----------
    loads : iterable of (lane, callable)
        In the order of need; drawn lazily, in the thread.
    lanes : iterable of int
        The lanes that occur.
    ahead : int
        Finished loads that one lane may hold.
    """

    def __init__(
        self,
        loads: Iterable[tuple[int, Callable[[], T]]],
        *,
        lanes: Iterable[int],
        ahead: int = 1,
    ) -> None:
        self._loads = loads
        self._lanes: dict[int, queue.Queue[T]] = {lane: queue.Queue(ahead) for lane in lanes}
        # Beside the lanes: a full one would keep the error from a consumer that waits at another.
        self._error: BaseException | None = None
        self._stopped = threading.Event()
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

    def close(self) -> None:
        """Stop loading and wait for the thread to end."""
        self._stopped.set()
        for lane in self._lanes.values():
            with contextlib.suppress(queue.Empty):
                while True:
                    lane.get_nowait()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        loads = iter(self._loads)
        try:
            for lane, load in loads:
                if self._stopped.is_set():
                    return
                if not self._put(lane, load()):
                    return
        except BaseException as error:
            self._error = error

    def _put(self, lane: int, item: T) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._lanes[lane].put(item, timeout=POLL_S)
                return True
        return False
