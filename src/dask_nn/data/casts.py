"""Blocks of another number type than was said when the data was looked at."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from dask_nn.errors import DataError

__all__ = ["cast", "check_cast", "find_misfit"]


def check_cast(found: np.ndarray[Any, Any], dtype: np.dtype[Any], what: str) -> None:
    """Check that an array may be cast: NumPy itself makes 0 of a missing value, and 44 of 300.

    Values are looked at only where the type has no room for all that the array's type can hold.
    Floating types take every number: rounded, or infinite where it is too large for them.

    Parameters
    ----------
    found : ndarray
        Rows, or a column of them.
    dtype : numpy.dtype
        The type of the whole, of which they are a part.
    what : str
        How the error calls them.

    Raises
    ------
    DataError
        If a value has no equal in the type.
    """
    if misfit := find_misfit(found, dtype):
        message = f"{what} {misfit}"
        raise DataError(message)


def cast(found: np.ndarray[Any, Any], dtype: np.dtype[Any], what: str) -> np.ndarray[Any, Any]:
    """Give an array in the type of the whole; itself if it has that already.

    Raises
    ------
    DataError
        As `check_cast` does.
    """
    check_cast(found, dtype, what)
    return found.astype(dtype, copy=False)


def find_misfit(found: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> str:
    """Say why an array may not be cast, for an error that begins with its name; empty if it may."""
    kind = found.dtype.kind
    if np.can_cast(found.dtype, dtype, "safe") or (dtype.kind == "f" and kind in "biuf"):
        return ""
    if not found.size:  # pandas gives a type to columns of no rows, too
        return ""
    same = np.zeros(found.shape, bool)
    if kind == "O":
        same.flat = [_fits(value, dtype) for value in found.flat]
    elif kind in "biuf":
        with np.errstate(all="ignore"):
            same = found.astype(dtype) == found
    if same.all():
        return ""
    value = found.flat[int(same.argmin())]
    return (
        f"has type {found.dtype}, expected {dtype} in all blocks, and the value {value!s}, which "
        "that type cannot hold: give it one type where the data is made, or fill the missing "
        "values there (they make floats of integers)"
    )


def _fits(value: Any, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":  # Python would read text as numbers
        return value is None or isinstance(value, numbers.Number | np.bool_)
    try:
        return bool(dtype.type(value) == value)
    except (TypeError, ValueError, OverflowError):
        return False
