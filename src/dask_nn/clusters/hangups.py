"""What ends a process politely ends a cluster's block first."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dask_nn.interrupts import handling, interrupt

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
    with handling(interrupt, *NAMES, instead_of=[signal.SIG_DFL]):
        yield
