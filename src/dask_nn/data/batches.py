"""The batches of a rank's shards, gathered from shuffled windows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dask_nn.data.prefetch import Prefetcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dask_nn.data.blocks import Field
    from dask_nn.data.plan import Plan, Window
    from dask_nn.data.reader import BlockReader

__all__ = ["Batch", "ShardBatches", "batch_dtypes", "load_window"]

type Batch = tuple[torch.Tensor, ...]


class LoadedWindow(NamedTuple):
    """A window's rows, laid end to end, and the order in which to take them.

    Its first positions may already be used up when a run resumes inside it.
    """

    rows: tuple[torch.Tensor, ...]
    order: torch.Tensor
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
        elif field.name == "y" and field.dtype.kind in "iu":
            found.append(torch.int64)
        else:
            found.append(stored)
    return tuple(found)


def load_window(
    window: Window,
    reader: BlockReader,
    fields: Sequence[Field],
    dtypes: Sequence[torch.dtype],
) -> tuple[torch.Tensor, ...]:
    """Copy a window's pieces into one tensor for each field, shape (window.length, ...).

    The blocks themselves are not kept, so that a worker may spill or release them.
    """
    rows = tuple(
        torch.empty((window.length, *field.shape), dtype=dtype)
        for field, dtype in zip(fields, dtypes, strict=True)
    )
    targets = [tensor.numpy() for tensor in rows]
    start = 0
    for piece in window.pieces:
        stop = start + piece.stop - piece.start
        block = reader.read(piece.block)
        for target, array in zip(targets, block, strict=True):
            np.copyto(target[start:stop], array[piece.start : piece.stop], casting="unsafe")
        start = stop
    return rows


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
        self._prefetcher = Prefetcher(self._loads(), lanes=shards)

    def start(self) -> None:
        """Begin to load the first windows."""
        self._prefetcher.start()

    def close(self) -> None:
        """Stop loading."""
        self._prefetcher.close()
        self._open.clear()

    def next(self, shard: int, count: int) -> Batch:
        """Give the next ``count`` rows of a shard, one new contiguous tensor for each field."""
        window = self._open.get(shard)
        if window is not None and window.position + count <= len(window.order):
            return self._gather(shard, window, count)
        parts = []
        while count:
            if window is None or window.position == len(window.order):
                window = self._prefetcher.take(shard, check=self._check)
            taken = min(count, len(window.order) - window.position)
            parts.append(self._gather(shard, window, taken))
            window = self._open[shard]
            count -= taken
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _gather(self, shard: int, window: LoadedWindow, count: int) -> Batch:
        stop = window.position + count
        chosen = window.order[window.position : stop]
        self._open[shard] = LoadedWindow(window.rows, window.order, stop)
        return tuple([torch.index_select(rows, 0, chosen) for rows in window.rows])

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
        rows = load_window(window, self._reader, self._fields, self._dtypes)
        order = torch.from_numpy(plan.window_order(shard, j))
        return LoadedWindow(rows, order, max(0, first_position - window.start))
