"""Import dask-jobqueue, which sets a handler of Ctrl-C."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.optional import import_optional

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["import_dask_jobqueue"]


def import_dask_jobqueue(kind: str) -> Any:
    """Import dask-jobqueue, without its handler of Ctrl-C: that would end this process.

    Raises
    ------
    ConfigurationError
        If it is not installed.
    """
    if threading.current_thread() is not threading.main_thread():
        with _handlers_of_the_main_thread_alone():
            return import_optional("dask_jobqueue", "jobqueue", kind)
    before = signal.getsignal(signal.SIGINT)
    try:
        return import_optional("dask_jobqueue", "jobqueue", kind)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def _handlers_of_the_main_thread_alone() -> Iterator[None]:
    """Let other threads import what sets a handler of a signal, which is an error in them."""
    plain: Any = signal.signal

    def set_handler(number: Any, handler: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return plain(number, handler)
        return signal.getsignal(number)

    signal.signal = set_handler  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = plain
