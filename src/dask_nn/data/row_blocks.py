"""Functions over the row blocks of Dask arrays."""

from __future__ import annotations

import pickle
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed, delayed

from dask_nn.data.batches import batch_dtypes, stored_dtype
from dask_nn.data.blocks import fields_of
from dask_nn.data.casts import cast, check_cast
from dask_nn.data.cuts import ToldRows, check_width, cut_rows, one_chunk_per_row_block
from dask_nn.data.inputs.frames import Indexed
from dask_nn.data.lengths import check_shape
from dask_nn.data.resident import resolve_lengths
from dask_nn.errors import DaskNNError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from dask_nn.data.blocks import Field

__all__ = [
    "aligned",
    "as_told",
    "check_finite",
    "check_lengths",
    "per_block",
    "shipped",
    "told_by",
]


def aligned(arrays: Mapping[str, Any], *, reference: str | None = None) -> list[da.Array]:
    """Give all inputs the row chunks of one of them, and one chunk along other axes.

    Inputs of unknown lengths that have the same number of chunks are taken to be aligned, which
    `as_told` makes sure of in every block; else their lengths are computed. So are unknown lengths
    of other axes where the number of rows is known.

    Parameters
    ----------
    arrays : mapping of str to array
        At least one of them a Dask array.
    reference : str, optional
        The Dask array that keeps its chunks; the first by default.

    Raises
    ------
    DataError
        If they differ in length, have no rows, or an unknown length cannot be computed; and, before
        anything is computed, if neither the rows nor another axis of one have a known length.
    """
    for name, array in arrays.items():
        if np.isnan(array.shape[0]):
            check_width(name, array)
    lazy = [array for array in arrays.values() if isinstance(array, da.Array)]
    unknown = [np.isnan(array.shape[0]) for array in lazy]
    same = len({array.numblocks[0] for array in lazy}) == 1
    if all(unknown) and same and len(lazy) == len(arrays):
        return [one_chunk_per_row_block(name, array) for name, array in arrays.items()]
    resolved = {
        name: resolve_lengths(name, array, None) if _is_lazy(array) else array
        for name, array in arrays.items()
    }
    if not check_lengths(resolved):
        raise DataError(f"there is nothing to compute: {', '.join(arrays)} have 0 rows")
    reference = reference or next(name for name, array in arrays.items() if _is_lazy(array))
    row_chunks = resolved[reference].chunks[0]
    found = []
    for name, array in resolved.items():
        if not _is_lazy(array):
            whole = [(length,) for length in array.shape[1:]]
            found.append(da.from_array(array, chunks=(row_chunks, *whole)))
            continue
        found.append(cut_rows(name, one_chunk_per_row_block(name, array), row_chunks))
    return found


def check_lengths(arrays: Mapping[str, Any]) -> int | None:
    """Give the rows that all inputs have, as far as that is known.

    Raises
    ------
    DataError
        If they differ.
    """
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    known = {name: int(length) for name, length in lengths.items() if not np.isnan(length)}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in known.items())
        raise DataError(f"inputs must have the same number of rows, but {listed}")
    return next(iter(known.values()), None)


def _is_lazy(array: Any) -> bool:
    return isinstance(array, da.Array)


def check_finite(name: str, rows: np.ndarray[Any, Any]) -> None:
    """Check that targets or weights have neither missing nor infinite values.

    Raises
    ------
    DataError
        If they have; names the first such row.
    """
    if rows.dtype.kind != "f":
        return
    with np.errstate(all="ignore"):
        if np.isfinite(rows.sum()):  # no copy; a sum may be infinite where no number is
            return
    bad = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if bad.any():
        raise DataError(
            f"{name} has {int(bad.sum())} rows with values that are missing (NaN) or infinite, the "
            f"first is row {int(bad.argmax())}; drop or fill them"
        )


def shipped(model: bytes, *parts: bytes) -> Delayed:
    """Make one graph node of pickled objects, which reach a worker once and are unpickled once.

    Parameters
    ----------
    model : bytes
        A pickled module.
    *parts : bytes
        More pickled objects. Equal bytes give the same key.

    Returns
    -------
    Delayed
        Of the list of objects; the module is in evaluation mode.
    """
    name = f"dask-nn-objects-{tokenize(model, *parts)}"
    node: Delayed = delayed(_unpickle, pure=True)((model, *parts), dask_key_name=name)
    return node


def per_block(
    function: Callable[..., Any],
    *arrays: da.Array | None,
    objects: Delayed | None = None,
    row_shape: tuple[int, ...],
    meta: np.ndarray[Any, Any],
    name: str,
    check: Callable[[Sequence[Any], float], list[Any]] | None = None,
) -> da.Array:
    """Apply a function to every row block of aligned arrays, lazily.

    Parameters
    ----------
    function : callable
        ``function(*blocks, objects)``, called with None for an array that is None.
    *arrays : Array or None
        The same row chunks, one chunk along the other axes; the first is not None.
    objects : Delayed, optional
        What all blocks need.
    row_shape : tuple of int
        Shape of one row of the result.
    meta : ndarray
        Type of the result, without rows.
    name : str
        How the tasks are called on the dashboard.
    check : callable, optional
        ``check(blocks, rows)``, with NaN for a number of rows that nobody knows, gives the blocks
        as the function gets them, such as `as_told`.

    Returns
    -------
    Array
        The row chunks of the arrays, unknown lengths staying unknown.
    """
    axes = count(1)
    new_axes = {next(axes): length for length in row_shape}
    arguments: list[Any] = []
    for array in arrays:
        if array is None:
            arguments += [None, None]
        else:
            arguments += [array, (0, *(next(axes) for _ in array.shape[1:]))]
    lengths = next(array for array in arrays if array is not None).chunks[0]
    token = tokenize(function, *arrays, objects, row_shape, meta, check)
    result: da.Array = da.blockwise(
        partial(_on_blocks, function, check),
        (0, *new_axes),
        ToldRows((lengths,)),
        (0,),
        *arguments,
        objects,
        None,
        new_axes=new_axes,
        name=f"{name}-{token}",
        align_arrays=False,
        concatenate=None,
        dtype=meta.dtype,
        meta=meta,
    )
    return result


def _on_blocks(
    function: Callable[..., Any],
    check: Callable[[Sequence[Any], float], list[Any]] | None,
    told: tuple[int, float],
    *blocks_and_objects: Any,
) -> Any:
    *nested, objects = blocks_and_objects
    blocks = [_only(block) for block in nested]
    if check is not None:
        _, length = told
        blocks = check(blocks, length)
    try:
        return function(*blocks, objects)
    except DaskNNError:
        raise
    except Exception as error:  # the user's module or loss; not to be taken for a store's error
        raise ModelError(f"{type(error).__name__}: {error}") from error


def told_by(
    arrays: Mapping[str, Any], floating: torch.dtype
) -> Callable[[Sequence[Any], float], list[Any]]:
    """Give `as_told` for the blocks of arrays, as a check of `per_block`."""
    return partial(as_told, fields_of(arrays), floating)


def as_told(
    fields: Sequence[Field],
    floating: torch.dtype,
    blocks: Sequence[Any],
    length: float = np.nan,
) -> list[Any]:
    """Give the arrays of a block as what they were said to be: a Dask array may tell untruths.

    Parameters
    ----------
    fields : sequence of Field
        What is said of them.
    floating : torch.dtype
        The model's floating type.
    blocks : sequence of ndarray or Indexed
        One for each field, shape (rows, ...).
    length : float
        The rows that they should have; NaN where nobody knows.

    Returns
    -------
    list
        The same; one of another type than its field is cast as it is for training.

    Raises
    ------
    DataError
        If one has another shape, or a value that its type in a batch cannot hold.
    """
    found = []
    for field, dtype, block in zip(fields, batch_dtypes(fields, floating), blocks, strict=True):
        check_shape(tuple(block.shape), field.shape, field.name, length=length)
        found.append(block if isinstance(block, Indexed) else _of_type(field, dtype, block))
    check_lengths({field.name: block for field, block in zip(fields, found, strict=True)})
    return found


def _of_type(field: Field, dtype: torch.dtype, block: Any) -> Any:
    block, stored = np.asarray(block), stored_dtype(dtype)
    if block.dtype != field.dtype:
        return cast(block, stored, field.name)
    check_cast(block, stored, field.name)  # a batch makes it of that type, part by part
    return block


def _only(block: Any) -> Any:
    """Take the only chunk along the other axes out of its nested lists."""
    while isinstance(block, list):
        (block,) = block
    return block


def _unpickle(parts: tuple[bytes, ...]) -> list[Any]:
    model, *others = (pickle.loads(part) for part in parts)  # noqa: S301 - the client's own
    # Tasks of several threads share it: none may find it in training mode and switch it back.
    return [model.eval(), *others]
