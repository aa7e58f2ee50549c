"""Blocks held in memory: of a cluster, where they are persisted or sent, or of this process."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask.core import flatten
from distributed.client import futures_of

from dask_nn.data.cuts import cut_rows
from dask_nn.data.lengths import check_rows, check_shape
from dask_nn.data.problem import Problem, TaskLog, find_problem
from dask_nn.data.sending import send, wait_while_able
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

__all__ = ["Sent", "persist", "place", "resolve_lengths"]


def persist(arrays: dict[str, da.Array], client: Client | None) -> dict[str, da.Array]:
    """Compute the blocks of some arrays, in one graph: what they have in common is done once."""
    values = list(arrays.values())
    if not values:
        return {}
    if client is not None:
        kept = dict(zip(arrays, client.persist(values), strict=True))
        _wait(client, kept)
        return kept
    try:
        with TaskLog() as log:
            return dict(zip(arrays, dask.persist(*values), strict=True))
    except Exception as error:
        for name, array in arrays.items():
            blocks = array.to_delayed(optimize_graph=False).ravel()
            if (problem := find_problem(enumerate(blocks), log)) is not None:
                raise problem.error(name) from error
        message = f"{', '.join(arrays)} could not be computed: {error!r}"
        raise DataError(message) from error


def _wait(client: Client, arrays: dict[str, da.Array]) -> None:
    """Wait until every block lies on a worker: ranks look for blocks, they cannot compute them."""
    futures = {name: futures_of(array) for name, array in arrays.items()}
    wait_while_able(client, [future for column in futures.values() for future in column])
    for name, column in futures.items():
        for future in column:
            if future.status != "finished":
                block = future.key[1] if isinstance(future.key, tuple) else 0
                if future.status != "error":
                    message = f"block {block} of {name} could not be computed: {future.status}"
                    raise DataError(message)
                problem = Problem.of_future(block, future, client)
                raise problem.error(name) from future.exception()


def resolve_lengths(name: str, array: da.Array, client: Client | None) -> da.Array:
    """Find the lengths of an array's blocks where they are unknown, computing each of them once.

    Parameters
    ----------
    name : str
        What it is, for errors.
    array : Array
        Is itself left as it is.
    client : Client or None
        Computes them; what Dask uses by default if None.

    Raises
    ------
    DataError
        If a block cannot be computed; or, naming it, if one is not like the others.
    """
    if not any(np.isnan(length) for chunks in array.chunks for length in chunks):
        return array
    one_each = tuple((1,) * number for number in array.numblocks)
    like = np.empty((0,) * array.ndim, object)
    try:
        with contextlib.nullcontext() if client is None else client.as_current():
            shapes = da.map_blocks(
                _shape, array, array.ndim, chunks=one_each, meta=like, dtype=object
            ).compute()
    except Exception as error:
        message = (
            f"the chunk sizes of {name} are unknown and could not be computed: {error!r}; "
            "call compute_chunk_sizes() on it to see where"
        )
        raise DataError(message) from error
    chunks = tuple(
        tuple(
            _length(shapes, axis, number) if np.isnan(told) else int(told)
            for number, told in enumerate(column)
        )
        for axis, column in enumerate(array.chunks)
    )
    for index in np.ndindex(shapes.shape):
        length, *row_shape = (chunks[axis][number] for axis, number in enumerate(index))
        check_shape(shapes[index], tuple(row_shape), f"block {index[0]} of {name}", length=length)
    return da.Array(array.dask, array.name, chunks, meta=array)


def _shape(block: Any, ndim: int) -> np.ndarray[Any, Any]:
    found = np.empty((1,) * ndim, object)
    found[(0,) * ndim] = np.shape(block)
    return found


def _length(shapes: np.ndarray[Any, Any], axis: int, number: int) -> float:
    """Give the length that the first block along other axes has; NaN if it has no such axis."""
    index = [0] * shapes.ndim
    index[axis] = number
    shape = shapes[tuple(index)]
    return shape[axis] if axis < len(shape) else np.nan


def place(
    name: str, array: Any, lengths: Sequence[int], client: Client | None
) -> tuple[list[Any], Any]:
    """Give the key or array of each block of one field, and what keeps the keys alive."""
    if isinstance(array, da.Array):
        if tuple(array.chunks[0]) != tuple(lengths):
            array = persist({name: cut_rows(name, array, lengths)}, client)[name]
        if client is not None:
            return list(flatten(array.__dask_keys__())), array
        blocks = [np.asarray(block.compute()) for block in array.blocks.ravel()]
        for number, (block, length) in enumerate(zip(blocks, lengths, strict=True)):
            check_rows(number, (block,), length, of=(name,))
        return blocks, None
    bounds = pairwise(accumulate(lengths, initial=0))
    pieces = [array[start:stop] for start, stop in bounds]
    if client is None:
        return pieces, None
    # Keys of our own: a lost piece is sent again under the same one.
    token = uuid.uuid4().hex
    named = {f"dask-nn-{name}-{token}-{number}": piece for number, piece in enumerate(pieces)}
    return list(named), Sent(named, send(client, named))


@dataclass(frozen=True)
class Sent:
    """Arrays sent to the cluster, and the futures that keep them there."""

    pieces: dict[Any, np.ndarray[Any, Any]]
    futures: Any
