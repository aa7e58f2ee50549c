"""Ctrl-C during a run: obeyed where the run can be left, and nowhere else."""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask_nn.interrupts import interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Presses"]

# What interrupts again within this time of the last interrupt is the same wish: a key held down, or
# a callback that asks to stop whenever it is called.
SAME_PRESS_S = 0.5


class Presses:
    """Lets signals raise KeyboardInterrupt in some sections of the main thread only.

    Elsewhere a press is kept for the next such section, so that no result is lost on its way.
    This is about SIGINT, and other signals that do the same by then. Where they have other
    handlers, or outside the main thread, nothing is changed: there only callbacks raise
    KeyboardInterrupt.

    Attributes
    ----------
    pending : bool
        Whether there was a press that no section has heard of yet.
    """

    def __init__(self) -> None:
        self.pending = False
        self._sections = 0
        self._last = -math.inf

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep presses for the length of a block, except in sections where they are heard."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _catchable()}
        changed = {n: h for n, h in before.items() if h in (signal.default_int_handler, interrupt)}
        for number in changed:
            signal.signal(number, self._press)
        try:
            yield
        finally:
            for number, handler in changed.items():
                signal.signal(number, handler)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Let a press, also one that was kept, interrupt a block.

        Raises
        ------
        KeyboardInterrupt
            At any point of the block.
        """
        self._sections += 1
        try:
            if self.pending:
                self.pending = False
                raise KeyboardInterrupt
            yield
        finally:
            self._sections = max(0, self._sections - 1)

    def is_another(self) -> bool:
        """Tell whether an interrupt that has just come is another press than the one before."""
        now = time.monotonic()
        before, self._last = self._last, now
        return now > before + SAME_PRESS_S

    def _press(self, *_: Any) -> None:
        if not self._sections:
            self.pending = True
            return
        self._sections = 0  # the exception leaves them, perhaps before they can say so themselves
        raise KeyboardInterrupt


def _catchable() -> list[signal.Signals]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [signal.Signals[name] for name in names if name in signal.Signals.__members__]
