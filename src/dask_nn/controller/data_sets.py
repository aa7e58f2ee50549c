"""The data sets of a run: read, placed within the memory that there is, and looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

from dask_nn.controller.block_fetch import CACHE_SHARE
from dask_nn.data.batches import needs_of
from dask_nn.data.blocks import Blocks, align
from dask_nn.data.casts import joined_dtype
from dask_nn.data.inputs.parts import delayed_parts
from dask_nn.data.inputs.read import is_name, read_inputs
from dask_nn.data.memory import HELD_SHARE, Room, choose_loaders, fit_window
from dask_nn.data.peek import check_finite
from dask_nn.data.sizes import SHARED_BYTES
from dask_nn.errors import ConfigurationError, DataError
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
        self._workers = workers
        self._room = _room(workers, client)
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
        self._room = self._room.without(blocks.new_bytes)
        if blocks.stream is not None:
            details = {
                "blocks": len(blocks.lengths),
                "size_bytes": blocks.size_bytes,
                "room_bytes": self._room.held_bytes,
                "asked": options.memory == "stream",
            }
            self.notes.append(("streaming", details))
        return blocks

    def fit_window(
        self,
        blocks: Blocks,
        validation: Blocks | None,
        *,
        model: nn.Module,
        seating: Seating | None,
        shards: int,
    ) -> int:
        """Give the window that every worker of the gang has room for."""
        wanted = self._options.window or self._settings.window
        ranks = 1 if seating is None else len(seating.workers)
        needs = needs_of(
            blocks.fields,
            blocks.lengths,
            floating_dtype(model),
            validation_lengths=() if validation is None else validation.lengths,
            loaders=self._loaders(blocks),
            other_bytes=sum(map(self._other_bytes, filter(None, (blocks, validation)))),
        )
        room_bytes = self._room.worker_bytes
        try:
            window = fit_window(
                needs, window=wanted, shards=-(-shards // ranks), room_bytes=room_bytes
            )
        except ConfigurationError:
            if blocks.stream is not None:
                raise
            window = 1  # what is held is held: Dask may spill some of it meanwhile
        if window < wanted:
            self.notes.append(("window-reduced", {"wanted": wanted, "window": window}))
        return window

    def _loaders(self, blocks: Blocks) -> int:
        """Tell how many blocks at a time the busiest worker reads."""
        if blocks.stream is None:
            return 1
        largest = blocks.size_bytes * max(blocks.lengths) // max(1, blocks.num_samples)
        return max(
            (choose_loaders(w.threads, largest, w.memory_bytes) for w in self._workers), default=1
        )

    def _other_bytes(self, blocks: Blocks) -> int:
        """Tell what a worker has of a data set beside its windows."""
        if blocks.stream is not None:
            shared = SHARED_BYTES if blocks.stream.shared else 0
            return shared + sum(column.nbytes for column in blocks.stream.kept.values())
        limit = min((worker.memory_bytes for worker in self._workers), default=0)
        return min(blocks.size_bytes, int(limit * CACHE_SHARE))


def _room(workers: tuple[WorkerFacts, ...], client: Client | None) -> Room:
    """Find out how much memory data may take, beside what Dask holds already."""
    if not workers:
        available = psutil.virtual_memory().available
        return Room(held_bytes=int(available * HELD_SHARE), worker_bytes=None)
    limits = [worker.memory_bytes for worker in workers]
    managed = _managed_bytes(client)
    rooms = [
        max(0, room - managed.get(worker.address, 0))
        for worker in workers
        if (room := worker.room_bytes) is not None
    ]
    if not all(limits):
        # Workers without a limit share what their hosts have; this one stands for all.
        return Room(
            held_bytes=int(psutil.virtual_memory().available * HELD_SHARE),
            worker_bytes=min(rooms, default=None),
            num_workers=len(workers),
        )
    held = sum(
        max(
            0,
            int(worker.memory_bytes * HELD_SHARE)
            - worker.used_bytes
            - managed.get(worker.address, 0),
        )
        for worker in workers
    )
    return Room(held_bytes=held, worker_bytes=min(rooms), num_workers=len(workers))


def _managed_bytes(client: Client | None) -> dict[str, int]:
    """Tell what Dask holds in the memory of each worker, as the scheduler heard last."""
    if client is None:
        return {}
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {
        address: int(worker["metrics"].get("managed_bytes", 0))
        for address, worker in workers.items()
    }


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
        checked = blocks.stream is not None and place in blocks.stream.finite
        floating = joined_dtype(field.name, field.dtype).kind == "f"
        if group_of(field.name) != "X" and floating and not checked:
            check_finite(blocks, place=place, client=client)
