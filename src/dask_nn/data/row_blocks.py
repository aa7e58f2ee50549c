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

from dask_nn.data.cuts import ToldRows, check_width, cut_rows, one_chunk_per_row_block
from dask_nn.errors import DaskNNError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "aligned",
    "as_array",
    "check_finite",
    "check_lengths",
    "check_same_rows",
    "per_block",
    "shipped",
]


def as_array(name: str, value: Any) -> Any:
    """Read an input as a Dask array if it is one, else as a NumPy array.

    Raises
    ------
    DataError
        If it has no rows' axis or does not hold numbers.
    """
    if not isinstance(value, da.Array):
        if hasattr(value, "detach"):  # a torch tensor
            value = value.detach().cpu().numpy()
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise DataError(f"{name} cannot be read as an array: {error}") from error
    if value.dtype.kind not in "biuf":
        raise DataError(f"{name} must hold numbers, got {value.dtype}")
    if value.ndim == 0:
        raise DataError(f"{name} must have an axis of rows, got a single number")
    return value


def aligned(arrays: Mapping[str, Any], *, reference: str | None = None) -> list[da.Array]:
    """Give all inputs the row chunks of one of them, and one chunk along other axes.

    Inputs of unknown lengths that have the same number of chunks are taken to be aligned, which
    `check_same_rows` makes sure of in every block; else their lengths are computed.

    Parameters
    ----------
    arrays : mapping of str to array
        At least one of them a Dask array.
    reference : str, optional
        The Dask array that keeps its chunks; the first by default.

    Raises
    ------
    DataError
        If they differ in length, have no rows, or an unknown length cannot be computed.
    """
    for name, array in arrays.items():
        check_width(name, array)
    lazy = [array for array in arrays.values() if isinstance(array, da.Array)]
    unknown = [np.isnan(array.shape[0]) for array in lazy]
    same = len({array.numblocks[0] for array in lazy}) == 1
    if all(unknown) and same and len(lazy) == len(arrays):
        return [one_chunk_per_row_block(name, array) for name, array in arrays.items()]
    resolved = {name: _with_lengths(name, array) for name, array in arrays.items()}
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


def check_same_rows(rows: Sequence[Any]) -> None:
    """Check that the arrays of a block have the same number of rows.

    Raises
    ------
    DataError
        If they have not.
    """
    lengths = {array.shape[0] for array in rows if array is not None}
    if len(lengths) > 1:
        raise DataError(
            f"the arrays of one block have {', '.join(map(str, sorted(lengths)))} rows, expected "
            "the same number in all"
        )


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


def _with_lengths(name: str, array: Any) -> Any:
    """Find the unknown chunk sizes of a copy of a Dask array, which costs computing it once."""
    if not isinstance(array, da.Array) or not any(np.isnan(length) for length in array.shape):
        return array
    copied = da.Array(array.dask, array.name, array.chunks, meta=array)
    try:
        return copied.compute_chunk_sizes()
    except Exception as error:
        raise DataError(
            f"the chunk sizes of {name} are unknown and cannot be computed: {error}"
        ) from error


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
    fields: Mapping[str, tuple[int, ...]] | None = None,
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
    fields : mapping of str to tuple of int, optional
        Names of the arrays and the shapes of their rows, against which every block is checked.

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
    token = tokenize(function, *arrays, objects, row_shape, meta, fields)
    result: da.Array = da.blockwise(
        partial(_on_blocks, function, None if fields is None else tuple(fields.items())),
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
    fields: tuple[tuple[str, tuple[int, ...]], ...] | None,
    told: tuple[int, float],
    *blocks_and_objects: Any,
) -> Any:
    *nested, objects = blocks_and_objects
    blocks = [_only(block) for block in nested]
    if fields is not None:
        _, length = told
        _check_blocks(fields, blocks, length)
    try:
        return function(*blocks, objects)
    except DaskNNError:
        raise
    except Exception as error:  # the user's module or loss; not to be taken for a store's error
        raise ModelError(f"{type(error).__name__}: {error}") from error


def _check_blocks(
    fields: Sequence[tuple[str, tuple[int, ...]]], blocks: Sequence[Any], length: float
) -> None:
    """Check that a block is what its Dask array says: its chunk sizes may be wrong."""
    for (name, row_shape), block in zip(fields, blocks, strict=True):
        shape = tuple(block.shape)
        rows = shape[0] if np.isnan(length) else int(length)
        if shape != (rows, *row_shape):
            raise DataError(
                f"{name} has shape {shape}, expected {(rows, *row_shape)}; is the chunk size that "
                "its Dask array tells true?"
            )
    check_same_rows(blocks)


def _only(block: Any) -> Any:
    """Take the only chunk along the other axes out of its nested lists."""
    while isinstance(block, list):
        (block,) = block
    return block


def _unpickle(parts: tuple[bytes, ...]) -> list[Any]:
    model, *others = (pickle.loads(part) for part in parts)  # noqa: S301 - the client's own
    # Tasks of several threads share it: none may find it in training mode and switch it back.
    return [model.eval(), *others]
