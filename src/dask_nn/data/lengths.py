"""Blocks that have other lengths than was said when the data was looked at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
from dask.base import tokenize
from dask.layers import ArrayBlockwiseDep
from dask.utils import key_split

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["check_rows", "cut_rows"]


def check_rows(block: int, arrays: Iterable[Any], length: int, *, of: str = "") -> None:
    """Check that every array of a block has the rows that the plan counts on.

    Parameters
    ----------
    block : int
        Its number.
    arrays : iterable of ndarray
        One for each field, shape (rows, ...).
    length : int
        The rows of the block as its Dask array told them, or as they were found.
    of : str
        Which blocks are counted, where those are not the ones that the plan has.

    Raises
    ------
    DataError
        If one has more or fewer: rows would be left out, or X and y get out of step.
    """
    for array in arrays:
        if array.shape[:1] != (length,):
            rows = array.shape[0] if array.ndim else "no"
            named = f"{block} of {of}" if of else f"{block}"
            message = (
                f"block {named} gave an array of {rows} rows, expected {length}: either the chunk "
                "size that its Dask array tells is not true (compute_chunk_sizes() finds it), or "
                "its source has changed since it was looked at (then begin again with what it is "
                "now)"
            )
            raise DataError(message)


def cut_rows(name: str, array: da.Array, lengths: Sequence[int]) -> da.Array:
    """Cut an array into blocks of other lengths, each of its own blocks being checked before.

    Slices would hide the rows that a block has too many, and all that follow would move.

    Parameters
    ----------
    name : str
        What it is, for the error.
    array : Array
        Of known lengths, with one chunk along the other axes.
    lengths : sequence of int
        The rows of the new blocks; the array itself is given where it has them already.
    """
    rows = tuple(lengths)
    if array.chunks[0] == rows:
        return array
    axes = tuple(range(array.ndim))
    checked: da.Array = da.blockwise(
        partial(_checked, f"{name} as it was given"),
        axes,
        _Told((array.chunks[0],)),
        (0,),
        array,
        axes,
        # As the blocks are called on the dashboard, and in errors about them.
        name=f"{key_split(array.name)}-{tokenize(name, array, array.chunks)}",
        align_arrays=False,
        dtype=array.dtype,
        meta=array._meta,  # noqa: SLF001 - nothing is to be computed
    )
    recut: da.Array = checked.rechunk({0: rows})
    return recut


class _Told(ArrayBlockwiseDep):
    """The number of each block, and the rows that it should have."""

    def __getitem__(self, idx: tuple[int, ...]) -> tuple[int, int]:
        (number,) = idx
        return number, int(self.chunks[0][number])


def _checked(of: str, told: tuple[int, int], block: Any) -> Any:
    number, length = told
    check_rows(number, (block,), length, of=of)
    return block
