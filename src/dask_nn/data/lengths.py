"""Blocks that have other lengths than was said when the data was looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["check_row_shape", "check_rows"]


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


def check_row_shape(block: int, shape: Sequence[int], expected: Sequence[int], *, of: str) -> None:
    """Check that the rows of a block have the shape that was told: others may well broadcast.

    Parameters
    ----------
    block : int
        Its number.
    shape : sequence of int
        Of its array.
    expected : sequence of int
        The shape of a row.
    of : str
        The name of the field.

    Raises
    ------
    DataError
        If they have another.
    """
    if not shape or tuple(shape[1:]) != tuple(expected):
        message = (
            f"block {block} of {of} has shape {tuple(shape)}, expected rows of shape "
            f"{tuple(expected)}; "
            "is the shape that its Dask array tells true?"
        )
        raise DataError(message)
