"""Values that are missing (NaN) or infinite, found where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_found", "not_finite"]


def not_finite(values: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Count values of a block that are not finite, and find the first row with one."""
    values = np.asarray(values)
    if values.dtype.kind == "O":
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError, OverflowError):  # refused where it is cast
            return 0, 0
    if values.dtype.kind != "f":
        return 0, 0
    bad = ~np.isfinite(values)
    rows = bad.any(axis=tuple(range(1, values.ndim)))
    return int(bad.sum()), int(rows.argmax()) if len(rows) else 0


def check_found(found: Sequence[tuple[int, int]], lengths: Sequence[int], name: str) -> None:
    """Raise the error for what `not_finite` found in the blocks of a field.

    Raises
    ------
    DataError
        If there is such a value; names the field and the first such row.
    """
    start = 0
    for block, (length, (count, first)) in enumerate(zip(lengths, found, strict=True)):
        if count:
            total = sum(number for number, _ in found)
            message = (
                f"{name} has {total} values that are missing (NaN) or infinite, the first in row "
                f"{start + first}, in block {block}; drop or fill those rows"
            )
            raise DataError(message)
        start += length
