"""One thing at a time, done in a thread beside whoever asked for it."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BackgroundWriter", "wait_for_all"]

_writers: weakref.WeakSet[BackgroundWriter[Any]] = weakref.WeakSet()


def wait_for_all(timeout_s: float) -> bool:
    """Wait for all writers of this process, which is about to end; tell whether all is written."""
    deadline = time.monotonic() + timeout_s
    return all(writer.wait(max(0.0, deadline - time.monotonic())) for writer in list(_writers))


class BackgroundWriter[T]:
    """Writes the newest of what it is given; what it has not begun makes way for something newer.

    Parameters
    ----------
    write : callable
        Called in the writer's thread with each item; must not raise.
    """

    def __init__(self, write: Callable[[T], None]) -> None:
        self._write = write
        self._condition = threading.Condition()
        self._waiting: T | None = None
        self._current: T | None = None
        self._closed = False
        self._first: Callable[[], None] | None = None
        self._last: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def begin(self, first: Callable[[], None], last: Callable[[], None]) -> None:
        """Start the thread with something else to do before all items, and after the last.

        Parameters
        ----------
        first, last : callable
            Called in the writer's thread; must not raise.
        """
        with self._condition:
            self._first, self._last = first, last
            self._start()

    @property
    def unwritten(self) -> T | None:
        """The newest item that is not written yet."""
        with self._condition:
            return self._waiting if self._waiting is not None else self._current

    def put(self, item: T) -> T | None:
        """Have an item written; give the one that it pushed aside."""
        with self._condition:
            pushed, self._waiting = self._waiting, item
            self._start()
            self._condition.notify_all()
        return pushed

    def _start(self) -> None:
        if self._thread is None:
            _writers.add(self)
            self._thread = threading.Thread(
                target=self._run, name="dask-nn-checkpoints", daemon=True
            )
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is written; tell whether it is."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._waiting is None and self._current is None, timeout_s
            )

    def close(self) -> None:
        """Take nothing more; the thread ends once what it has is written."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _run(self) -> None:
        if self._first is not None:
            self._first()
        self._write_all()
        if self._last is not None:
            self._last()

    def _write_all(self) -> None:
        while True:
            with self._condition:
                self._current = None
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._waiting is not None or self._closed)
                self._current, self._waiting = self._waiting, None
                item = self._current
            if item is None:
                return
            self._write(item)
