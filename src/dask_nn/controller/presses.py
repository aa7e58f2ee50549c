"""Ctrl-C during a run: obeyed where the run can be left, and nowhere else."""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Presses"]

# What interrupts again within this time of the last interrupt is the same wish: a key held down, or
# a callback that asks to stop whenever it is called.
SAME_PRESS_S = 0.5


class Presses:
    """Turns SIGINT into KeyboardInterrupt in some sections of the main thread only.

    Elsewhere a press is kept for the next such section, so that no result is lost on its way.
    Where Python's own handler is not in place, or outside the main thread, nothing is changed:
    there only callbacks raise KeyboardInterrupt.

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
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

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
