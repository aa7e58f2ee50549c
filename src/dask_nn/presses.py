"""Ctrl-C during a run: obeyed where the run can be left, and nowhere else."""

from __future__ import annotations

import math
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask_nn.interrupts import handling, interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Presses"]

# What interrupts again within this time is the same wish: a key held down, which begins to repeat
# after up to two thirds of a second, or a callback that asks to stop whenever it is called.
SAME_PRESS_S = 0.8
# But not for ever: who presses on is impatient.
PRESSING_S = 5.0
UNHEARD_S = 5.0


class Presses:
    """Lets signals raise KeyboardInterrupt in some sections of the main thread only.

    Elsewhere a press is kept for the next such section, so that no result is lost on its way; who
    presses on for five seconds without being heard is obeyed at once. A key that is held down is
    one press, and another one every five seconds.
    This is about SIGINT, and other signals that do the same by then. Where they have other
    handlers, or outside the main thread, nothing is changed: there only callbacks raise
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._unheard_since: float | None = None
        self._sections = 0
        self._is_pressed = False
        self._began_at = self._pressed_at = self._interrupted_at = -math.inf

    @property
    def pending(self) -> bool:
        """Whether there was a press that no section has heard of yet."""
        return self._unheard_since is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep presses for the length of a block, except in sections where they are heard."""
        replaced = (signal.default_int_handler, interrupt)
        # SIGINT gets its handler back last: until then presses are kept.
        with handling(self._press, "SIGINT", "SIGTERM", "SIGHUP", instead_of=replaced):
            yield

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
                self._interrupt()
            yield
        finally:
            self._sections = max(0, self._sections - 1)

    def is_another(self) -> bool:
        """Tell whether an interrupt that was just caught is another wish than the one before.

        Presses are; callbacks may raise KeyboardInterrupt whenever they are called.
        """
        if self.is_one():
            return True
        now = time.monotonic()
        before, self._interrupted_at = self._interrupted_at, now
        return now > before + SAME_PRESS_S

    def is_one(self) -> bool:
        """Tell whether a press, and no callback, made the interrupt that was just caught."""
        pressed, self._is_pressed = self._is_pressed, False
        return pressed

    def _press(self, *_: Any) -> None:
        now = time.monotonic()
        before, self._pressed_at = self._pressed_at, now
        if self._unheard_since is not None and now > self._unheard_since + UNHEARD_S:
            self._interrupt()
        if now <= before + SAME_PRESS_S and now <= self._began_at + PRESSING_S:
            return
        self._began_at = now
        if self._sections:
            self._interrupt()
        if self._unheard_since is None:
            self._unheard_since = now

    def _interrupt(self) -> None:
        self._unheard_since = None
        self._sections = 0  # the exception leaves them, perhaps before they can say so themselves
        self._is_pressed = True
        raise KeyboardInterrupt
