"""Blocks of another number type than was said when the data was looked at."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_nn.errors import DataError
from dask_nn.grouping import group_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cast", "check_cast", "find_misfit", "join", "joinable", "joined_dtype"]

# Longer values are cut off where an error shows them.
SHOWN_LETTERS = 80


def check_cast(
    found: np.ndarray[Any, Any], dtype: np.dtype[Any], what: str, *, kind: Any = None
) -> None:
    """Check that an array may be cast: NumPy itself makes 0 of a missing value, and 44 of 300.

    Values are looked at only where the type has no room for all that the array's type can hold.
    Floating types take every real number: rounded, or infinite where it is too large for them.
    An object that Python itself can make no float of is refused, such as an integer of 400 digits.

    Parameters
    ----------
    found : ndarray
        Rows, or a column of them.
    dtype : numpy.dtype
        The type of the whole, of which they are a part.
    what : str
        How the error calls them.
    kind : object, optional
        How the error calls their type; that of the array by default.

    Raises
    ------
    DataError
        If a value has no equal in the type.
    """
    if misfit := find_misfit(found, dtype, kind=kind):
        message = f"{what} {misfit}"
        raise DataError(message)


def cast(
    found: np.ndarray[Any, Any], dtype: np.dtype[Any], what: str, *, kind: Any = None
) -> np.ndarray[Any, Any]:
    """Give an array in the type of the whole; itself if it has that already.

    Raises
    ------
    DataError
        As `check_cast` does.
    """
    check_cast(found, dtype, what, kind=kind)
    with np.errstate(all="ignore"):  # too large for a smaller floating type
        return found.astype(dtype, copy=False)


def joined_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Give the type in which blocks of a field are joined if theirs differ.

    A batch takes as much of every value, whether or not its block was joined with others: floats
    are rounded once, there.

    Parameters
    ----------
    name : str
        Of the field.
    dtype : numpy.dtype
        That is told of it.
    """
    group = group_of(name)
    if dtype.kind == "f" or group == "sample_weight":
        return np.dtype(np.float64)
    return np.dtype(np.int64) if group == "y" and dtype.kind in "iu" else dtype


def joinable(
    found: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str, what: str
) -> np.ndarray[Any, Any]:
    """Give a block as it may be joined with others of its field.

    Parameters
    ----------
    found : ndarray
        Shape (rows, ...).
    dtype : numpy.dtype
        That is told of the field.
    name : str
        Of the field.
    what : str
        How an error calls the block.

    Raises
    ------
    DataError
        If a value has no equal in the type of the whole.
    """
    whole = joined_dtype(name, dtype)
    # What NumPy makes of two such types holds all values of both.
    same = found.dtype == dtype and np.can_cast(dtype, whole)
    if same or found.dtype.kind == whole.kind == "f":
        return found
    check_cast(found, dtype if dtype.kind == "f" else whole, what)
    return found.astype(whole)


def join(
    blocks: Sequence[np.ndarray[Any, Any]], dtype: np.dtype[Any], name: str
) -> np.ndarray[Any, Any]:
    """Join all blocks of a field, each of them being checked before.

    NumPy would take a type for them that makes text of numbers, or rounds integers beside floats.

    Parameters
    ----------
    blocks : sequence of ndarray
        At least one; shape (rows, ...).
    dtype : numpy.dtype
        That is told of the field.
    name : str
        Of the field.

    Raises
    ------
    DataError
        If a value has no equal in the type; names its block.
    """
    return np.concatenate(
        [
            joinable(block, dtype, name, f"block {number} of {name}")
            for number, block in enumerate(blocks)
        ]
    )


def find_misfit(found: np.ndarray[Any, Any], dtype: np.dtype[Any], *, kind: Any = None) -> str:
    """Say why an array may not be cast, for an error that begins with its name; empty if it may."""
    code = found.dtype.kind
    if np.can_cast(found.dtype, dtype, "safe") or (dtype.kind == "f" and code in "biuf"):
        return ""
    if not found.size:  # pandas gives a type to columns of no rows, too
        return ""
    if code == "O" and dtype.kind == "f" and _are_floats(found):
        return ""
    same = np.zeros(found.shape, bool)
    with np.errstate(all="ignore"):
        if code == "O":
            same.flat = [_fits(value, dtype) for value in found.flat]
        elif code in "biuf":
            same = found.astype(dtype) == found
    if same.all():
        return ""
    value = found.flat[int(same.argmin())]
    return (
        f"has type {found.dtype if kind is None else kind}, expected {dtype} in all blocks, and "
        f"the value {_shown(value)}, which that type cannot hold: {_advice(value)}"
    )


def _are_floats(found: np.ndarray[Any, Any]) -> bool:
    """Tell whether floats can be made of all objects, which are not looked at one by one."""
    if not all(kind is type(None) or _is_number(kind) for kind in set(map(type, found.flat))):
        return False
    try:
        with np.errstate(all="ignore"):
            found.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _fits(value: Any, dtype: np.dtype[Any]) -> bool:
    if value is None:
        return dtype.kind == "f"
    if not _is_number(type(value)):
        return False
    try:
        if dtype.kind == "f":
            float(value)
            return True
        return bool(dtype.type(value) == value)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_number(kind: type) -> bool:
    """Tell which objects are numbers: Python would read text as such, and NumPy durations."""
    return issubclass(kind, numbers.Real | Decimal | np.bool_) and not issubclass(
        kind, np.timedelta64
    )


def _advice(value: Any) -> str:
    if _is_missing(value):
        return "fill the missing values where the data is made (they make floats of integers)"
    if not _is_number(type(value)):
        return "make numbers of such values where the data is made, or leave them out"
    return "give all blocks a type that holds their values where the data is made"


def _is_missing(value: Any) -> bool:
    """Tell whether a value is None, NaN, NaT or NA of pandas."""
    try:
        return value is None or bool(value != value)  # noqa: PLR0124 - as NaN does
    except TypeError:  # NA itself does not know
        return True
    except (ValueError, ArithmeticError):
        return False


def _shown(value: Any) -> str:
    """Write a value as Python does, text in quotation marks, and NumPy's numbers without type."""
    if isinstance(value, str):
        text = repr(str(value))
    elif isinstance(value, np.generic):
        text = str(value)
    else:
        try:
            text = repr(value)
        except ValueError:  # Python writes no integers of thousands of digits
            text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
