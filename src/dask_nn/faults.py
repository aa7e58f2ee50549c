"""The places of a run at which tests may break it; nothing happens at any of them by itself.

:mod:`dask_nn.testing.faults` sets :data:`hook` in the processes of a test's own cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["POINTS", "hook"]

# In the order in which a step passes them; "computed" and "applied" tell a ledger what was done.
POINTS = (
    "reading",
    "forward",
    "backward",
    "before exchange",
    "between fold and gather",
    "in the optimizer",
    "applied",
    "serving state",
    "copying state",
    "writing a checkpoint",
)

hook: Callable[[str, dict[str, Any]], None] | None = None
"""Called with the name of a point and what is known there."""
