"""How large values are, and how large they may be to go to every worker."""

from __future__ import annotations

from typing import Any

import cloudpickle
import numpy as np

__all__ = ["KEPT_BYTES", "LARGE_LITERAL_BYTES", "SHARED_BYTES", "pickled_bytes"]

# Labels and weights of so many bytes in all go to every worker as they are.
KEPT_BYTES = 64 << 20
# So does what many blocks are computed from.
SHARED_BYTES = 64 << 20
# What a graph holds and is larger than this does not travel with every block.
LARGE_LITERAL_BYTES = 1 << 20


def pickled_bytes(value: Any) -> int:
    """Tell how many bytes a value takes on its way to a worker."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    try:
        return len(cloudpickle.dumps(value))
    except Exception:
        return 0  # who sends it says why it cannot travel
