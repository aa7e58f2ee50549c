"""Row-aligned blocks of all inputs, made from Dask and NumPy arrays on the client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from dask_nn.data.cuts import one_chunk_per_row_block
from dask_nn.data.memory import Memory, Room, fits
from dask_nn.data.resident import Sent, persist, place, resolve_lengths
from dask_nn.data.sending import send_lost
from dask_nn.data.streaming import is_persisted, measure, stream_blocks
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed import Client

    from dask_nn.data.stream import Stream

__all__ = ["Blocks", "Field", "align", "as_array", "fields_of"]

NUMERIC_KINDS = "biuf"
MAX_ITEM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Field:
    """One input of a block.

    Parameters
    ----------
    name : str
        ``"X"``, ``"y"`` or ``"sample_weight"``; ``"X.image"`` for a member of a dictionary.
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
    stream : Stream, optional
        How blocks are computed when they are needed, for data that is not held at all.
    futures : tuple
        What keeps the keys alive; stays with the client.
    originals : dict
        From key to array, for blocks that were sent from this process: no graph could compute them
        again if their worker is lost.
    new_bytes : int
        What was put into memory for it, where it was not there before.
    """

    lengths: tuple[int, ...]
    fields: tuple[Field, ...]
    keys: tuple[tuple[Any, ...], ...] | None = None
    arrays: tuple[tuple[np.ndarray[Any, Any], ...], ...] | None = None
    stream: Stream | None = None
    futures: tuple[Any, ...] = ()
    originals: dict[Any, np.ndarray[Any, Any]] = field(default_factory=dict)
    new_bytes: int = 0

    @property
    def source(self) -> Any:
        """What ranks need to find or make the blocks: keys, or a stream."""
        return self.stream if self.stream is not None else self.keys or ()

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


def align(
    inputs: dict[str, Any],
    *,
    client: Client | None,
    block_size_bytes: int,
    memory: Memory = "resident",
    room: Room | None = None,
) -> Blocks:
    """Cut all inputs at the same rows and put them where ranks can read them.

    Dask arrays keep their row chunks (the first one given decides, the others are rechunked to
    it); other axes become one chunk. Resident ones are persisted together unless they already
    are, and streamed ones are turned into recipes. Arrays in this process are cut into blocks
    and, with a client, scattered over the workers. Returns once every resident block is there.

    Parameters
    ----------
    inputs : dict
        From name to Dask array, NumPy array or torch tensor, shape (num_samples, ...); ``X`` first.
    client : Client or None
        The cluster that holds the blocks; this process if None.
    block_size_bytes : int
        Target size of the blocks of X where no Dask array says how to cut.
    memory : {"auto", "resident", "stream"}
        Whether Dask arrays are held in memory; "auto" holds what fits.
    room : Room, optional
        The memory there is, in bytes; needed by "auto" and to cut blocks that are too large.

    Raises
    ------
    DataError
        If lengths differ or cannot be found, there are no rows, a type is not numeric, sample
        weights are not one number a row, or a block cannot be computed.
    """
    arrays = {name: as_array(name, value) for name, value in inputs.items()}
    _check_lengths(arrays)
    lazy = {
        name: one_chunk_per_row_block(name, array)
        for name, array in arrays.items()
        if isinstance(array, da.Array)
    }
    if _streams(lazy, client, memory, room):
        return _streamed(arrays | lazy, client, room)
    held = {name for name, array in lazy.items() if is_persisted(array, client)}
    persisted = persist(lazy, client)
    arrays |= {name: resolve_lengths(name, array, client) for name, array in persisted.items()}
    num_samples = _check_some(arrays)
    fields = fields_of(arrays)
    reference = next(iter(persisted), None)
    lengths = (
        _default_lengths(num_samples, fields[0].row_bytes, block_size_bytes)
        if reference is None
        else tuple(map(int, arrays[reference].chunks[0]))
    )
    columns, futures = [], []
    for name, array in arrays.items():
        column, kept = place(name, array, lengths, client)
        columns.append(column)
        futures.append(kept)
    rows = tuple(zip(*columns, strict=True))
    if client is None:
        return Blocks(lengths=lengths, fields=fields, arrays=rows)
    originals: dict[Any, Any] = {}
    for kept in futures:
        if isinstance(kept, Sent):
            originals |= kept.pieces
    return Blocks(
        lengths=lengths,
        fields=fields,
        keys=rows,
        futures=tuple(futures),
        originals=originals,
        new_bytes=sum(lengths) * sum(f.row_bytes for f in fields if f.name not in held),
    )


def _streams(
    lazy: dict[str, da.Array], client: Client | None, memory: Memory, room: Room | None
) -> bool:
    """Decide whether Dask arrays are computed anew in every epoch."""
    if memory == "resident":
        return False
    if not lazy:
        if memory == "stream":
            message = (
                "memory='stream' needs a collection that workers can read themselves (a Dask "
                "array or table, Delayed, a torch dataset, a URL); these inputs lie in this process"
            )
            raise DataError(message)
        return False
    unheld = {name: array for name, array in lazy.items() if not is_persisted(array, client)}
    if not unheld and (client is not None or memory == "auto"):
        if memory == "stream":
            message = (
                "memory='stream' makes every block anew, but these inputs are persisted already; "
                "pass the collection as it was before persist(), or use memory='resident'"
            )
            raise DataError(message)
        return False
    return memory == "stream" or (room is not None and not fits(measure(unheld, client), room))


def _streamed(arrays: dict[str, Any], client: Client | None, room: Room | None) -> Blocks:
    stream, surveyor = stream_blocks(
        arrays, client=client, block_limit_bytes=None if room is None else room.block_bytes
    )
    num_samples = sum(stream.lengths)
    known = {name: array.shape[0] for name, array in arrays.items()}
    wrong = {
        n: int(rows) for n, rows in known.items() if not np.isnan(rows) and rows != num_samples
    }
    if wrong:
        listed = ", ".join(f"{name} has {rows}" for name, rows in wrong.items())
        message = f"all inputs must have the same number of rows, but {listed} of {num_samples}"
        raise DataError(message)
    if not num_samples:
        message = f"there is nothing to train on: {', '.join(arrays)} have 0 rows"
        raise DataError(message)
    return Blocks(
        lengths=stream.lengths,
        fields=fields_of(arrays),
        stream=stream,
        futures=tuple(surveyor.futures),
        originals=surveyor.literals if client is not None else {},
    )


def as_array(name: str, value: Any) -> Any:
    """Read an input as a Dask array if it is one, else as a NumPy array.

    Raises
    ------
    DataError
        If it has no axis of rows, its type is not one of numbers that torch knows, or sample
        weights are not one number a row.
    """
    if not isinstance(value, da.Array):
        if hasattr(value, "detach") and hasattr(value, "numpy"):  # a torch tensor
            value = value.detach().cpu().numpy()
        try:
            value = np.asarray(value)
        except ValueError as error:
            message = f"{name} cannot be read as an array: {error}"
            raise DataError(message) from error
    _check_array(name, value)
    return value


def fields_of(arrays: Mapping[str, Any]) -> tuple[Field, ...]:
    """Tell what arrays, by name, say of themselves; their number of rows may be unknown."""
    return tuple(
        Field(name=name, shape=tuple(map(int, array.shape[1:])), dtype=np.dtype(array.dtype))
        for name, array in arrays.items()
    )


def _check_some(arrays: dict[str, Any]) -> int:
    num_samples = _check_lengths(arrays)
    if not num_samples:
        message = f"there is nothing to train on: {', '.join(arrays)} have 0 rows"
        raise DataError(message)
    return num_samples


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


def _default_lengths(num_samples: int, row_bytes: int, block_size_bytes: int) -> tuple[int, ...]:
    rows = max(1, block_size_bytes // max(1, row_bytes))
    full, rest = divmod(num_samples, rows)
    return (rows,) * full + ((rest,) if rest else ())
