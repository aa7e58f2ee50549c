"""What users have, as NumPy reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_numpy"]


def as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Give a NumPy array of a tensor of torch, or of anything that NumPy reads.

    Raises
    ------
    ValueError
        If it is ragged.
    """
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # a torch tensor
        value = value.detach().cpu().numpy()
    return np.asarray(value)
