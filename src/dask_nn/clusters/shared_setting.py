"""Settings of the whole process that several clusters may need at the same time."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

__all__ = ["SharedSetting"]


class SharedSetting:
    """A context manager that several may be in, in any order and thread: the last undoes it.

    Were each to restore what it found, those that overlap would leave what another had set.

    Parameters
    ----------
    make : callable
        Gives the context manager that the first enters and the last leaves.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._undo.enter_context(self._make())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()
