"""What a rank is told from outside while it trains."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

__all__ = ["Orders"]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Switches that anybody may turn on, and nobody off; a rank looks at them in every step.

    All but the last are passed on to the gang by votes: the rank that saves may hear of its peer's
    order first.

    Parameters
    ----------
    stop : threading.Event
        Stop at the next step boundary.
    save : threading.Event
        Save a checkpoint of what is reached then.
    wait : threading.Event
        Wait for that to be written, as a rank that finishes always does; without it a thread of
        the process writes while another gang goes on.
    save_soon : threading.Event
        Save a checkpoint at the next step boundary, and go on.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    save: threading.Event = field(default_factory=threading.Event)
    wait: threading.Event = field(default_factory=threading.Event)
    save_soon: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Stop, and save what is reached."""
        self.save.set()  # first: whoever sees the other looks at this one next
        self.stop.set()

    def finish(self) -> None:
        """Stop, save what is reached, and wait until it is written."""
        self.save.set()  # first, as above
        self.wait.set()
        self.stop.set()

    def votes(self) -> tuple[float, float, float]:
        """Give what a rank that was told to stop says to its gang: to stop, to save, to wait."""
        return 1.0, float(self.save.is_set()), float(self.wait.is_set())

    def hear(self, *, save: bool, wait: bool) -> None:
        """Take over what a peer was told, who may be the only one that knows why to stop."""
        if save:
            self.save.set()
        if wait:
            self.wait.set()
