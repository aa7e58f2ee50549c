"""Blocks that have other lengths or shapes than was said when the data was looked at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["check_rows", "check_shape"]


def check_rows(block: int, arrays: Iterable[Any], length: int, *, of: Sequence[str]) -> None:
    """Check that every array of a block has the rows that the plan counts on.

    Parameters
    ----------
    block : int
        Its number.
    arrays : iterable of ndarray
        One for each field, shape (rows, ...).
    length : int
        The rows of the block as its Dask array told them, or as they were found.
    of : sequence of str
        How the error calls each of them: by the name of its field.

    Raises
    ------
    DataError
        If one has more or fewer: rows would be left out, or X and y get out of step.
    """
    for name, array in zip(of, arrays, strict=True):
        if array.shape[:1] != (length,):
            rows = array.shape[0] if array.ndim else "no"
            message = (
                f"block {block} of {name} gave an array of {rows} rows, expected {length}: either "
                "the chunk size that its Dask array tells is not true (compute_chunk_sizes() finds "
                "it), or its source has changed since it was looked at (then begin again with what "
                "it is now)"
            )
            raise DataError(message)


def check_shape(
    found: tuple[int, ...], row_shape: tuple[float, ...], what: str, *, length: float = math.nan
) -> None:
    """Check that an array has the shape that was said: another one may broadcast without a word.

    Parameters
    ----------
    found : tuple of int
        Its shape.
    row_shape : tuple of int
        The shape that its rows should have; NaN where nobody knows.
    what : str
        How the error calls it, such as by its block and field.
    length : float
        The rows that it should have; NaN where nobody knows.

    Raises
    ------
    DataError
        If it has another one.
    """
    told = (length, *row_shape)
    if len(found) != len(told) or not all(map(_is_as_told, found, told)):
        known = not math.isnan(length)
        expected = str((int(length), *row_shape)) if known else f"rows of shape {row_shape}"
        message = (
            f"{what} has shape {found}, expected {expected}; is the shape that its Dask array "
            "tells true, and are Delayed parts alike?"
        )
        raise DataError(message)


def _is_as_told(found: int, told: float) -> bool:
    return math.isnan(told) or found == told
