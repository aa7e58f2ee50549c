"""What other signals do where they are to do what Ctrl-C does."""

from __future__ import annotations

import signal

__all__ = ["interrupt"]


def interrupt(number: int, _: object) -> None:
    """Handle a signal as Python handles SIGINT."""
    raise KeyboardInterrupt(f"Interrupted by {signal.Signals(number).name}.")
