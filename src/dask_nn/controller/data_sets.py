"""The data sets of a run: read, placed within the memory that there is, and looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

from dask_nn.data.batches import batched_bytes
from dask_nn.data.blocks import Blocks, align
from dask_nn.data.inputs.parts import delayed_parts
from dask_nn.data.inputs.read import is_name, read_inputs
from dask_nn.data.memory import HELD_SHARE, Room, fit_window
from dask_nn.data.peek import check_finite
from dask_nn.errors import DataError
from dask_nn.grouping import group_of
from dask_nn.metrics.forward import floating_dtype

if TYPE_CHECKING:
    from distributed import Client
    from torch import nn

    from dask_nn.config import Settings
    from dask_nn.controller.options import Options
    from dask_nn.controller.placement import Seating, WorkerFacts

__all__ = ["DataSets", "check_targets", "parts_of_validation"]


class DataSets:
    """Puts training and validation data in place, within the memory that there is."""

    def __init__(
        self,
        options: Options,
        workers: tuple[WorkerFacts, ...],
        *,
        client: Client | None,
        settings: Settings,
    ) -> None:
        self._options = options
        self._client = client
        self._settings = settings
        self._room = _room(workers)
        self.notes: list[tuple[str, dict[str, Any]]] = []

    def place(self, X: Any, y: Any, sample_weight: Any) -> Blocks:
        """Read a data set of any kind, and hold it in memory or make a stream of it."""
        options = self._options
        inputs = read_inputs(
            X,
            y,
            sample_weight,
            features=options.features,
            batch_dim=options.batch_dim,
            client=self._client,
            block_size_bytes=self._settings.block_size_bytes,
        )
        blocks = align(
            inputs,
            client=self._client,
            block_size_bytes=self._settings.block_size_bytes,
            memory=options.memory,
            room=self._room,
        )
        if blocks.stream is None:
            self._room = self._room.without(blocks.size_bytes)
        else:
            details = {
                "blocks": len(blocks.lengths),
                "size_bytes": blocks.size_bytes,
                "room_bytes": self._room.held_bytes,
                "asked": options.memory == "stream",
            }
            self.notes.append(("streaming", details))
        return blocks

    def fit_window(
        self, blocks: Blocks, model: nn.Module, seating: Seating | None, shards: int
    ) -> int:
        """Give the window that every worker of the gang has room for."""
        wanted = self._options.window or self._settings.window
        if blocks.stream is None:
            return wanted
        sizes = batched_bytes(blocks.fields, blocks.lengths, floating_dtype(model))
        ranks = 1 if seating is None else len(seating.workers)
        window = fit_window(
            sizes, window=wanted, shards=-(-shards // ranks), room_bytes=self._room.worker_bytes
        )
        if window < wanted:
            self.notes.append(("window-reduced", {"wanted": wanted, "window": window}))
        return window


def _room(workers: tuple[WorkerFacts, ...]) -> Room:
    """Find out how much memory data may take."""
    if not workers:
        available = psutil.virtual_memory().available
        return Room(held_bytes=int(available * HELD_SHARE), worker_bytes=None)
    limits = [worker.memory_bytes for worker in workers]
    rooms = [room for worker in workers if (room := worker.room_bytes) is not None]
    if not all(limits):
        # Workers without a limit share what their hosts have; this one stands for all.
        return Room(
            held_bytes=int(psutil.virtual_memory().available * HELD_SHARE),
            worker_bytes=min(rooms, default=None),
        )
    held = sum(
        max(0, int(worker.memory_bytes * HELD_SHARE) - worker.used_bytes) for worker in workers
    )
    return Room(held_bytes=held, worker_bytes=min(rooms))


def parts_of_validation(validation: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Read what was given as validation data: a tuple, or a collection like X."""
    is_tuple = isinstance(validation, tuple) or (
        isinstance(validation, list) and delayed_parts(validation) is None
    )
    names = tuple(value if is_name(value) else None for value in (y, sample_weight))
    if not is_tuple:
        if y is not None and names[0] is None:
            shown = "(X, y, sample_weight)" if sample_weight is not None else "(X, y)"
            message = f"validation must be a tuple {shown}, got a {type(validation).__name__}"
            raise DataError(message)
        return validation, *names
    wanted = 2 + (sample_weight is not None)
    if y is not None and len(validation) != wanted and not (names[0] and len(validation) == 1):
        shown = "(X, y, sample_weight)" if wanted == 3 else "(X, y)"
        message = (
            f"validation must be a tuple {shown}, got a {type(validation).__name__} of "
            f"{len(validation)} values"
        )
        raise DataError(message)
    given = (*validation, None, None)[:3]
    X, target, weight = given
    return X, target if target is not None else names[0], weight if weight is not None else names[1]


def check_targets(blocks: Blocks, client: Client | None) -> None:
    """Refuse targets and weights that are no numbers."""
    for place, field in enumerate(blocks.fields):
        if group_of(field.name) != "X" and field.dtype.kind == "f":
            check_finite(blocks, place=place, client=client)
