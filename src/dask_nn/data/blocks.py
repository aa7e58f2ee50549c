"""Row-aligned blocks of all inputs, made from Dask and NumPy arrays on the client."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask.core import flatten
from distributed import wait
from distributed.client import futures_of

from dask_nn.data.sending import send, send_lost
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

__all__ = ["Blocks", "Field", "align"]

NUMERIC_KINDS = "biuf"
MAX_ITEM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Field:
    """One input of a block.

    Parameters
    ----------
    name : str
        ``"X"``, ``"y"`` or ``"sample_weight"``.
    shape : tuple of int
        Shape of one row.
    dtype : numpy.dtype
        Type in which the rows are stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Stored size of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Where the rows of a data set lie.

    Parameters
    ----------
    lengths : tuple of int
        Rows of each block.
    fields : tuple of Field
        The inputs, ``X`` first.
    keys : tuple of tuple, optional
        For each block the Dask key of each field, for data held by a cluster.
    arrays : tuple of tuple of numpy.ndarray, optional
        For each block the array of each field, for data held by this process.
    futures : tuple
        What keeps the keys alive; stays with the client.
    originals : dict
        From key to array, for blocks that were sent from this process: no graph could compute them
        again if their worker is lost.
    """

    lengths: tuple[int, ...]
    fields: tuple[Field, ...]
    keys: tuple[tuple[Any, ...], ...] | None = None
    arrays: tuple[tuple[np.ndarray[Any, Any], ...], ...] | None = None
    futures: tuple[Any, ...] = ()
    originals: dict[Any, np.ndarray[Any, Any]] = field(default_factory=dict)

    def restore(self, client: Client) -> int:
        """Send blocks that lay on lost workers alone once more; return their number."""
        return send_lost(client, self.originals)

    @property
    def num_samples(self) -> int:
        """Rows of all blocks together."""
        return sum(self.lengths)

    @property
    def size_bytes(self) -> int:
        """Stored size of all blocks."""
        return self.num_samples * sum(field.row_bytes for field in self.fields)


def align(inputs: dict[str, Any], *, client: Client | None, block_size_bytes: int) -> Blocks:
    """Cut all inputs at the same rows and put them where ranks can read them.

    Dask arrays keep their row chunks (the first one given decides, the others are rechunked to
    it) and are persisted together unless they already are; other axes become one chunk. Arrays in
    this process are cut into blocks and, with a client, scattered over the workers. Returns once
    every block is there.

    Parameters
    ----------
    inputs : dict
        From name to Dask array, NumPy array or torch tensor, shape (num_samples, ...); ``X`` first.
    client : Client or None
        The cluster that holds the blocks; this process if None.
    block_size_bytes : int
        Target size of the blocks of X where no Dask array says how to cut.

    Raises
    ------
    DataError
        If lengths differ or cannot be found, there are no rows, a type is not numeric, sample
        weights are not one number a row, or a block cannot be computed.
    """
    arrays = {name: _as_array(name, value) for name, value in inputs.items()}
    for name, array in arrays.items():
        _check_array(name, array)
    _check_lengths(arrays)
    persisted = _persist(
        {
            name: _one_chunk_per_row_block(array)
            for name, array in arrays.items()
            if isinstance(array, da.Array)
        },
        client,
    )
    arrays |= {name: _resolve_lengths(name, array, client) for name, array in persisted.items()}
    num_samples = _check_lengths(arrays)
    if not num_samples:
        message = f"there is nothing to train on: {', '.join(arrays)} have 0 rows"
        raise DataError(message)
    fields = tuple(
        Field(name=name, shape=tuple(map(int, array.shape[1:])), dtype=np.dtype(array.dtype))
        for name, array in arrays.items()
    )
    reference = next(iter(persisted), None)
    lengths = (
        _default_lengths(num_samples, fields[0].row_bytes, block_size_bytes)
        if reference is None
        else tuple(map(int, arrays[reference].chunks[0]))
    )
    columns, futures = [], []
    for name, array in arrays.items():
        column, kept = _place(name, array, lengths, client)
        columns.append(column)
        futures.append(kept)
    rows = tuple(zip(*columns, strict=True))
    if client is None:
        return Blocks(lengths=lengths, fields=fields, arrays=rows)
    originals: dict[Any, Any] = {}
    for kept in futures:
        if isinstance(kept, _Sent):
            originals |= kept.pieces
    return Blocks(
        lengths=lengths, fields=fields, keys=rows, futures=tuple(futures), originals=originals
    )


def _as_array(name: str, value: Any) -> Any:
    if isinstance(value, da.Array):
        return value
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # a torch tensor
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        message = f"{name} cannot be read as an array: {error}"
        raise DataError(message) from error
    return array


def _check_array(name: str, array: Any) -> None:
    if array.ndim == 0:
        message = f"{name} must have at least one axis, got a scalar of type {array.dtype}"
        raise DataError(message)
    if array.dtype.kind not in NUMERIC_KINDS or array.dtype.itemsize > MAX_ITEM_BYTES:
        message = (
            f"{name} has dtype {array.dtype}, expected numbers (integers, floats or booleans) of "
            "at most 64 bits; encode or cast it first"
        )
        raise DataError(message)
    if name == "sample_weight" and array.ndim != 1:
        message = (
            f"sample_weight must have one number for each row, shape (num_samples,), got shape "
            f"{array.shape}"
        )
        raise DataError(message)


def _check_lengths(arrays: dict[str, Any]) -> int:
    """Give the common number of rows; -1 while one is not known yet."""
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    known = {name: int(length) for name, length in lengths.items() if not np.isnan(length)}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in known.items())
        message = f"all inputs must have the same number of rows, but {listed}"
        raise DataError(message)
    return next(iter(known.values())) if len(known) == len(lengths) else -1


def _one_chunk_per_row_block(array: da.Array) -> da.Array:
    cut = {axis: -1 for axis, chunks in enumerate(array.chunks) if axis and len(chunks) > 1}
    if not cut:
        return array
    try:
        rechunked: da.Array = array.rechunk(cut)
    except ValueError as error:
        message = f"chunks along axes {sorted(cut)} cannot be joined: {error}"
        raise DataError(message) from error
    return rechunked


def _persist(arrays: dict[str, da.Array], client: Client | None) -> dict[str, da.Array]:
    """Compute the blocks of some arrays, in one graph: what they have in common is done once."""
    values = list(arrays.values())
    if not values:
        return {}
    if client is not None:
        kept = dict(zip(arrays, client.persist(values), strict=True))
        with client.as_current():  # where wait looks for its client
            _wait(kept)
        return kept
    try:
        return dict(zip(arrays, dask.persist(*values), strict=True))
    except Exception as error:
        message = f"{', '.join(arrays)} could not be computed: {error!r}"
        raise DataError(message) from error


def _wait(arrays: dict[str, da.Array]) -> None:
    """Wait until every block lies on a worker: ranks look for blocks, they cannot compute them."""
    futures = {name: futures_of(array) for name, array in arrays.items()}
    wait([future for column in futures.values() for future in column])
    for name, column in futures.items():
        for future in column:
            if future.status != "finished":
                error = future.exception() if future.status == "error" else None
                message = f"{name} could not be computed: {error or future.status!r}"
                raise DataError(message) from error


def _resolve_lengths(name: str, array: da.Array, client: Client | None) -> da.Array:
    if any(np.isnan(length) for chunks in array.chunks for length in chunks):
        try:
            with contextlib.nullcontext() if client is None else client.as_current():
                array.compute_chunk_sizes()
        except Exception as error:
            message = (
                f"the chunk sizes of {name} are unknown and could not be computed: {error!r}; "
                "call compute_chunk_sizes() on it to see where"
            )
            raise DataError(message) from error
    return array


def _default_lengths(num_samples: int, row_bytes: int, block_size_bytes: int) -> tuple[int, ...]:
    rows = max(1, block_size_bytes // max(1, row_bytes))
    full, rest = divmod(num_samples, rows)
    return (rows,) * full + ((rest,) if rest else ())


def _place(
    name: str, array: Any, lengths: Sequence[int], client: Client | None
) -> tuple[list[Any], Any]:
    """Give the key or array of each block of one field, and what keeps the keys alive."""
    if isinstance(array, da.Array):
        if tuple(array.chunks[0]) != tuple(lengths):
            array = _persist({name: array.rechunk({0: tuple(lengths)})}, client)[name]
        if client is not None:
            return list(flatten(array.__dask_keys__())), array
        return [np.asarray(block.compute()) for block in array.blocks.ravel()], None
    bounds = pairwise(accumulate(lengths, initial=0))
    pieces = [array[start:stop] for start, stop in bounds]
    if client is None:
        return pieces, None
    # Keys of our own: a lost piece is sent again under the same one.
    token = uuid.uuid4().hex
    named = {f"dask-nn-{name}-{token}-{number}": piece for number, piece in enumerate(pieces)}
    return list(named), _Sent(named, send(client, named))


@dataclass(frozen=True)
class _Sent:
    """Arrays sent to the cluster, and the futures that keep them there."""

    pieces: dict[Any, np.ndarray[Any, Any]]
    futures: Any
