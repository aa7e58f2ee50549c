"""Arrays cut into blocks of other rows and columns, their own blocks being checked before."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.layers import ArrayBlockwiseDep
from dask.utils import key_split

from dask_nn.data.casts import cast
from dask_nn.data.lengths import check_rows
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["ToldRows", "check_width", "cut_rows", "one_chunk_per_row_block"]


def check_width(name: str, array: Any, axes: Iterable[int] | None = None) -> None:
    """Check that axes have known lengths: these, or all but the first.

    Raises
    ------
    DataError
        If one has not.
    """
    for axis in range(1, array.ndim) if axes is None else axes:
        if np.isnan(array.shape[axis]):
            message = (
                f"the length of axis {axis} of {name} is unknown; only the number of rows may be: "
                "call compute_chunk_sizes() on it"
            )
            raise DataError(message)


def one_chunk_per_row_block(name: str, array: da.Array) -> da.Array:
    """Join the chunks along all axes but the first, each of them being checked before.

    Raises
    ------
    DataError
        If the length of such an axis is unknown, so that Dask cannot.
    """
    cut = {axis: -1 for axis, number in enumerate(array.numblocks) if axis and number > 1}
    if not cut:
        return array
    check_width(name, array, cut)
    with dask.config.set({"array.rechunk.method": "tasks"}):  # only neighbours are joined
        joined: da.Array = _compared(name, array).rechunk(cut)
    return joined


def cut_rows(name: str, array: da.Array, lengths: Sequence[int]) -> da.Array:
    """Cut an array into blocks of other lengths, each of its own blocks being checked before.

    Slices would hide the rows that a block has too many, and all that follow would move. What is
    joined of them takes the type of the first, whatever the values of the others are.

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
    recut: da.Array = _compared(name, array).rechunk({0: rows})
    return recut


def _compared(name: str, array: da.Array) -> da.Array:
    """Give an array whose blocks have the rows and the type that it tells, or are refused."""
    axes = tuple(range(array.ndim))
    checked: da.Array = da.blockwise(
        partial(_checked, f"{name} as it was given", array.dtype),
        axes,
        ToldRows((array.chunks[0],)),
        (0,),
        array,
        axes,
        # As the blocks are called on the dashboard, and in errors about them.
        name=f"{key_split(array.name)}-{tokenize(name, array, array.chunks)}",
        align_arrays=False,
        dtype=array.dtype,
        meta=array._meta,  # noqa: SLF001 - nothing is to be computed
    )
    return checked


class ToldRows(ArrayBlockwiseDep):
    """The number of each block, and the rows that it should have: NaN where nobody knows."""

    def __getitem__(self, idx: tuple[int, ...]) -> tuple[int, float]:
        (number,) = idx
        return number, self.chunks[0][number]


def _checked(of: str, dtype: np.dtype[Any], told: tuple[int, float], block: Any) -> Any:
    number, length = told
    block = np.asarray(block)
    if not np.isnan(length):
        check_rows(number, (block,), int(length), of=(of,))
    return cast(block, dtype, f"block {number} of {of}")
