"""What ends a process politely ends a cluster's block first."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dask_nn.interrupts import interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["heard_as_interrupts"]

# A closed terminal; `kill`, a batch system's warning before its own `kill -9`, a shutdown.
NAMES = ("SIGHUP", "SIGTERM")


@contextmanager
def heard_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, for the length of a ``with`` block.

    By default they end the process at once, and with it everything that would close a cluster.
    Where they are ignored (``nohup``) or have a handler, and outside of the main thread, they stay
    as they are.
    """
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, signal.SIG_DFL)
