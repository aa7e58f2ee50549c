"""Arrays cut into blocks of other rows and columns, their own blocks being checked before."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.layers import ArrayBlockwiseDep
from dask.utils import key_split

from dask_nn.data.casts import joinable
from dask_nn.data.lengths import check_rows, check_shape
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
    cut = [axis for axis, number in enumerate(array.numblocks) if axis and number > 1]
    if not cut:
        return array
    check_width(name, array, cut)
    axes = range(array.ndim)
    whole = {array.ndim + axis: array.shape[axis] for axis in axes[1:]}
    joined_columns: da.Array = da.blockwise(
        partial(_join_columns, name, array.dtype, array.chunks[1:]),
        (0, *whole),
        ToldRows((array.chunks[0],)),
        (0,),
        array,
        tuple(axes),
        new_axes=whole,
        # As the blocks are called on the dashboard, and in errors about them.
        name=f"{key_split(array.name)}-{tokenize(name, array, array.chunks)}",
        align_arrays=False,
        concatenate=None,
        dtype=array.dtype,
        meta=array._meta,  # noqa: SLF001 - nothing is to be computed
    )
    return joined_columns


def cut_rows(name: str, array: da.Array, lengths: Sequence[int]) -> da.Array:
    """Cut an array into blocks of other lengths, each of its own blocks being checked before.

    Slices would hide the rows that a block has too many, and all that follow would move. Dask would
    give what it joins the type of the first, whatever the values of the others are.

    Parameters
    ----------
    name : str
        What it is, for the error.
    array : Array
        Of known lengths, with one chunk along the other axes.
    lengths : sequence of int
        The rows of the new blocks; the array itself is given where it has them already.

    Raises
    ------
    DataError
        If the array has another number of rows.
    """
    rows, told = tuple(lengths), array.chunks[0]
    if told == rows:
        return array
    if sum(told) != sum(rows):
        message = f"{name} has {sum(told)} rows, expected {sum(rows)} as the other inputs have"
        raise DataError(message)
    bounds = list(accumulate(told, initial=0))
    cut = f"{key_split(array.name)}-{tokenize(name, array, told, rows)}"
    others = (0,) * (array.ndim - 1)
    graph: dict[Any, Any] = {}
    for number, (start, stop) in enumerate(pairwise(accumulate(rows, initial=0))):
        pieces = []
        first = min(bisect_right(bounds, start), len(told)) - 1
        for block in range(first, max(first + 1, bisect_left(bounds, stop))):
            piece = (f"{cut}-rows", number, block)
            graph[piece] = (
                partial(_take_rows, name, array.dtype, array.shape[1:]),
                (block, told[block]),
                (max(0, start - bounds[block]), stop - bounds[block]),
                (array.name, block, *others),
            )
            pieces.append(piece)
        graph[cut, number, *others] = (np.concatenate, pieces)
    layers = HighLevelGraph.from_collections(cut, graph, [array])  # type: ignore[list-item]
    return da.Array(layers, cut, (rows, *array.chunks[1:]), meta=array._meta)  # noqa: SLF001


class ToldRows(ArrayBlockwiseDep):
    """The number of each block, and the rows that it should have: NaN where nobody knows."""

    def __getitem__(self, idx: tuple[int, ...]) -> tuple[int, float]:
        (number,) = idx
        return number, self.chunks[0][number]


def _join_columns(
    name: str,
    dtype: np.dtype[Any],
    lengths: tuple[tuple[float, ...], ...],
    told: tuple[int, float],
    chunks: list[Any],
) -> np.ndarray[Any, Any]:
    """Join the nested lists of chunks that make one row block; their lengths are by axis."""

    def join(part: Any, shape: tuple[float, ...]) -> np.ndarray[Any, Any]:
        axis = len(shape)
        if isinstance(part, list):
            joined = [join(each, (*shape, lengths[axis][n])) for n, each in enumerate(part)]
            return np.concatenate(joined, axis=axis + 1)
        return joinable(_as_told(name, shape, told, part), dtype, name, _called(name, told))

    return join(chunks, ())


def _take_rows(
    name: str,
    dtype: np.dtype[Any],
    row_shape: tuple[float, ...],
    told: tuple[int, float],
    bounds: tuple[int, int],
    block: Any,
) -> np.ndarray[Any, Any]:
    start, stop = bounds
    found = _as_told(name, row_shape, told, block)
    return joinable(found[start:stop], dtype, name, _called(name, told))


def _as_told(
    name: str, row_shape: tuple[float, ...], told: tuple[int, float], block: Any
) -> np.ndarray[Any, Any]:
    """Give a block that has the shape that its array tells, or refuse it."""
    number, length = told
    found: np.ndarray[Any, Any] = np.asarray(block)
    if not np.isnan(length):
        check_rows(number, (found,), int(length), of=(f"{name} as it was given",))
    check_shape(found.shape, row_shape, _called(name, told))
    return found


def _called(name: str, told: tuple[int, float]) -> str:
    return f"block {told[0]} of {name} as it was given"
