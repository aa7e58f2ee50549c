"""The batches of a rank's shards, from shuffled windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dask_nn.data.casts import check_cast
from dask_nn.data.lengths import check_shape
from dask_nn.data.memory import Needs
from dask_nn.data.prefetch import Prefetcher
from dask_nn.grouping import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from dask_nn.data.blocks import Field
    from dask_nn.data.plan import Piece, Plan, Window
    from dask_nn.data.reader import BlockReader

__all__ = [
    "Batch",
    "ShardBatches",
    "batch_dtypes",
    "load_window",
    "needs_of",
    "new_rows",
    "stored_dtype",
]

type Batch = tuple[torch.Tensor, ...]


@dataclass(slots=True)
class LoadedWindow:
    """A window's rows in the order in which they are taken, and how far it is used.

    Its first positions are already used up when a run resumes inside it.
    """

    rows: tuple[torch.Tensor, ...]
    length: int
    position: int


def batch_dtypes(fields: Sequence[Field], floating: torch.dtype) -> tuple[torch.dtype, ...]:
    """Give the types in which the model and the loss see each field.

    Floating inputs take the model's floating type, integer labels become int64, and sample
    weights become floating. Integer features stay as they are stored: a transform makes them
    floating, batch by batch.
    """
    found = []
    for field in fields:
        stored = torch.from_numpy(np.empty(0, field.dtype.newbyteorder("="))).dtype
        if stored.is_floating_point or field.name == "sample_weight":
            found.append(floating)
        elif group_of(field.name) == "y" and field.dtype.kind in "iu":
            found.append(torch.int64)
        else:
            found.append(stored)
    return tuple(found)


def stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Give the type of NumPy from which a type of torch is made."""
    if dtype == torch.bfloat16:  # unknown to NumPy
        return np.dtype(np.float32)
    return torch.empty(0, dtype=dtype).numpy().dtype


def needs_of(
    fields: Sequence[Field],
    lengths: Sequence[int],
    floating: torch.dtype,
    *,
    validation_lengths: Sequence[int] = (),
    loaders: int = 1,
    other_bytes: int = 0,
) -> Needs:
    """Tell what a rank that reads some blocks needs memory for.

    Parameters
    ----------
    fields : sequence of Field
        What a block consists of.
    lengths : sequence of int
        Rows of each block.
    floating : torch.dtype
        The model's floating type.
    validation_lengths : sequence of int
        Rows of each validation block; such a block is read, and copied as a whole.
    loaders : int
        Blocks that are read at the same time.
    other_bytes : int
        Whatever else stays in memory.
    """
    row = sum(
        math.prod(field.shape) * dtype.itemsize
        for field, dtype in zip(fields, batch_dtypes(fields, floating), strict=True)
    )
    stored = sum(field.row_bytes for field in fields)
    validation = max(validation_lengths, default=0) * (3 * stored + row)
    return Needs(
        rows_bytes=tuple(length * row for length in sorted(lengths, reverse=True)),
        block_bytes=max(lengths, default=0) * stored,
        loaders=loaders,
        other_bytes=other_bytes + validation,
    )


def new_rows(
    length: int, fields: Sequence[Field], dtypes: Sequence[torch.dtype]
) -> tuple[torch.Tensor, ...]:
    """Make one tensor for each field, shape (length, ...)."""
    return tuple(
        torch.empty((length, *field.shape), dtype=dtype)
        for field, dtype in zip(fields, dtypes, strict=True)
    )


def load_window(
    window: Window,
    order: NDArray[np.int64],
    reader: BlockReader,
    rows: tuple[torch.Tensor, ...],
    names: Sequence[str],
) -> None:
    """Copy a window's rows, in the order in which they are taken, into one tensor for each field.

    The blocks themselves are not kept, so that a worker may spill or release them.

    Parameters
    ----------
    window : Window
        Which pieces.
    order : ndarray of int64, shape (window.length,)
        The plan's order of the window's rows.
    reader : BlockReader
        Where the pieces are.
    rows : tuple of Tensor
        Shape (at least window.length, ...).
    names : sequence of str
        Of the fields, for errors.

    Raises
    ------
    DataError
        If a block is not what its array said, or has values that its type cannot hold.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    start = 0
    blocks = reader.read_many([piece.block for piece in window.pieces])
    for piece, block in zip(window.pieces, blocks, strict=True):
        stop = start + piece.stop - piece.start
        for name, tensor, array in zip(names, rows, block, strict=True):
            _put(tensor, place[start:stop], array[piece.start : piece.stop], piece, name)
        start = stop


def _put(
    tensor: torch.Tensor, place: NDArray[np.int64], found: NDArray[Any], piece: Piece, name: str
) -> None:
    what = f"block {piece.block} of {name}"
    row_shape = tuple(tensor.shape[1:])
    check_shape(
        found.shape,
        row_shape,
        f"{what}, cut to rows {piece.start} to {piece.stop},",
        length=len(place),
    )
    stored = stored_dtype(tensor.dtype)
    check_cast(found, stored, what)
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy
        tensor[torch.from_numpy(place)] = torch.from_numpy(found.astype(stored)).bfloat16()
    else:
        tensor.numpy()[place] = found


class ShardBatches:
    """Gives the batches of some shards, step after step, epoch after epoch.

    Parameters
    ----------
    plan_of : callable
        From an epoch to its plan.
    epochs : range
        The epochs to go through.
    first_step : int
        The step of the first epoch to begin with; windows that end before it are not opened.
    shards : range
        Whose batches.
    reader : BlockReader
        Where the blocks come from.
    fields : sequence of Field
        What a block consists of.
    dtypes : sequence of torch.dtype
        Types of the batches' tensors.
    check : callable, optional
        Called while waiting for data; may raise to end the wait.
    windows : int
        Windows that a shard has in memory: 2, the one in use and the next; with 1 the next is
        loaded when the one in use is used up.
    """

    def __init__(
        self,
        plan_of: Callable[[int], Plan],
        *,
        epochs: range,
        first_step: int = 0,
        shards: range,
        reader: BlockReader,
        fields: Sequence[Field],
        dtypes: Sequence[torch.dtype],
        check: Callable[[], None] | None = None,
        windows: int = 2,
    ) -> None:
        self._plan_of = plan_of
        self._epochs = epochs
        self._first_step = first_step
        self._shards = shards
        self._reader = reader
        self._fields = fields
        self._dtypes = dtypes
        self._check = check
        self._open: dict[int, LoadedWindow] = {}
        # Parts of a shard's next batch whose rest was not there.
        self._begun: dict[int, list[Batch]] = {}
        # Buffers are used again: new memory costs a page fault for each of its pages.
        self._free: list[tuple[torch.Tensor, ...]] = []
        self._prefetcher = Prefetcher(self._loads(), lanes=shards, alive=windows)

    def start(self) -> None:
        """Begin to load the first windows."""
        self._prefetcher.start()

    def stop(self) -> None:
        """Begin to load no more windows."""
        self._prefetcher.stop()

    def close(self, waiting: Callable[[], None] | None = None) -> None:
        """Stop loading, and wait for the window that is being loaded; see `Prefetcher.close`."""
        self._prefetcher.close(waiting)
        self._open.clear()
        self._begun.clear()

    def next(self, shard: int, count: int) -> Batch:
        """Give the next ``count`` rows of a shard, one new contiguous tensor for each field."""
        while (batch := self.next_if_there(shard, count)) is None:
            self._open[shard] = self._prefetcher.take(shard, check=self._check)
        return batch

    def next_if_there(self, shard: int, count: int) -> Batch | None:
        """Give what `next` would give, or None where that would have to wait or would fail.

        After None, the next call for this shard must be one for the same rows.
        """
        window = self._open.get(shard)
        parts = self._begun.pop(shard, [])
        if not parts and window is not None and window.position + count <= window.length:
            return _take(window, count)
        count -= sum(len(part[0]) for part in parts)
        while count:
            if window is None or window.position == window.length:
                if window is not None:
                    self._free.append(window.rows)
                    self._open.pop(shard)
                    self._prefetcher.release(shard)
                window = self._prefetcher.take_if_there(shard)
                if window is None:
                    self._begun[shard] = parts
                    return None
                self._open[shard] = window
            taken = min(count, window.length - window.position)
            parts.append(_take(window, taken))
            count -= taken
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _loads(self) -> Iterator[tuple[int, Callable[[], LoadedWindow]]]:
        for epoch in self._epochs:
            plan = self._plan_of(epoch)
            first_step = self._first_step if epoch == self._epochs.start else 0
            first_position = first_step * plan.shard_batch_size
            needed = [
                (max(window.start, first_position) // plan.shard_batch_size, shard, j)
                for shard in self._shards
                for j, window in enumerate(plan.windows(shard))
                if window.stop > first_position
            ]
            for _, shard, j in sorted(needed):
                yield shard, partial(self._load, plan, shard, j, first_position)

    def _load(self, plan: Plan, shard: int, j: int, first_position: int) -> LoadedWindow:
        window = plan.windows(shard)[j]
        rows = self._rows_for(plan, window.length)
        names = [field.name for field in self._fields]
        load_window(window, plan.window_order(shard, j), self._reader, rows, names)
        return LoadedWindow(rows, window.length, max(0, first_position - window.start))

    def _rows_for(self, plan: Plan, length: int) -> tuple[torch.Tensor, ...]:
        """Take a free buffer, or make one that fits every window of the plan's kind."""
        for index, rows in enumerate(self._free):
            if len(rows[0]) >= length:
                return self._free.pop(index)
        longest = sum(sorted(plan.block_lengths)[-plan.window :])
        return new_rows(min(longest, plan.num_samples), self._fields, self._dtypes)


def _take(window: LoadedWindow, count: int) -> Batch:
    """Copy the next rows of a window."""
    start = window.position
    stop = window.position = start + count
    return tuple([rows[start:stop].clone() for rows in window.rows])
