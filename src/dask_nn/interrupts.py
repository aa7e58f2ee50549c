"""Signals that interrupt, as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = ["handling", "interrupt"]


def interrupt(number: int, _: object) -> None:
    """Handle a signal as Python handles SIGINT."""
    raise KeyboardInterrupt(f"Interrupted by {signal.Signals(number).name}.")


@contextmanager
def handling(
    handler: Callable[..., Any], *names: str, instead_of: Collection[Any]
) -> Iterator[None]:
    """Handle some signals in another way for the length of a block.

    Those that have other handlers stay as they are, and all do outside the main thread, which alone
    may decide about signals.

    Parameters
    ----------
    handler : callable
        As for ``signal.signal``.
    *names : str
        Of the signals, where the platform has them; they get their handlers back in reverse.
    instead_of : collection
        The handlers that it may replace.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    changed = {number: old for number, old in before.items() if old in instead_of}
    try:
        for number in changed:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in reversed(changed.items()):
            if signal.getsignal(number) == handler:
                signal.signal(number, old)
