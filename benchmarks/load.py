"""How much of the machine others used while something ran: their work spoils a measurement."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

__all__ = ["OtherLoad"]

# Fields of the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
BUSY = (0, 1, 2, 5, 6, 7)


class OtherLoad:
    """Counts the cores that all but this process and its ended children kept busy since it began.

    Zero where the system does not tell.
    """

    def __init__(self) -> None:
        self._began = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """Return how many cores others used on average."""
        began, busy, own = self._began
        others_s = (_busy_s() - busy) - (_own_s() - own)
        return max(0.0, others_s / (time.monotonic() - began))


def _busy_s() -> float:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(field) for field in stat.read_text().split(maxsplit=9)[1:9]]
    return sum(ticks[place] for place in BUSY) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
