"""The exchange of ranks that share memory, whatever kind of memory it is.

Every rank has one slot per subtree root. It fills its slots, raises its flag, waits for its peers'
flags, and folds all slots itself. Small buffers are double-buffered, so one wait per exchange is
enough: a rank that raised flag ``n + 1`` has read everything of exchange ``n``. Of large buffers
each rank folds one slice for all, into a result that everybody reads after a second wait.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from dask_nn.collectives.base import Communicator
from dask_nn.collectives.fold import Fold, slice_bounds
from dask_nn.collectives.region import (
    FILLED,
    FOLDED,
    MAPPED,
    POLLS,
    WRITTEN,
    Region,
)
from dask_nn.collectives.region_layout import copies_of, is_sliced, layout_of_ranks
from dask_nn.collectives.tree import Node, all_roots
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import mmap
    import threading

__all__ = ["SlotCommunicator"]


class SlotCommunicator(Communicator):
    """Ranks that see the same memory; subclasses say where it comes from.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    """

    polls: int = POLLS

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = 600.0,
        abort_event: threading.Event | None = None,
        slice_above_bytes: int = 1 << 20,
    ) -> None:
        super().__init__(rank, world_size, timeout_s=timeout_s, abort_event=abort_event)
        self.slice_above_bytes = slice_above_bytes
        self._region: Region | None = None

    @abstractmethod
    def map_memory(self, size_bytes: int) -> mmap.mmap:
        """Map the gang's memory, zeroed, of at least ``size_bytes``."""

    def memory_mapped(self) -> None:
        """Learn that all ranks have mapped the memory."""

    def yield_processor(self) -> None:
        """Let another thread of this host run."""
        os.sched_yield()

    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Map the memory and lay out flags, cells and slots in it."""
        del device  # memory shared between ranks is the host's
        roots = all_roots(shards, self.world_size)
        nodes = [node for own in roots for node in own]
        leaf_bytes = leaf_size * dtype.itemsize
        sliced = is_sliced(leaf_bytes, self.world_size, self.slice_above_bytes)
        self._copies = copies_of(sliced=sliced)
        layout = layout_of_ranks(
            shards=shards,
            world_size=self.world_size,
            leaf_bytes=leaf_bytes,
            slice_above_bytes=self.slice_above_bytes,
        )
        self._region = region = Region(
            self,
            layout,
            self.map_memory(layout.size_bytes),
            self.rank,
            polls=self.polls,
            pause=self.yield_processor,
        )
        every = [
            [region.slot(copy * len(nodes) + i, dtype, leaf_size) for i in range(len(nodes))]
            for copy in range(self._copies)
        ]
        first = sum(len(own) for own in roots[: self.rank])
        self._slots = [slots[first : first + len(roots[self.rank])] for slots in every]
        self._total = torch.zeros(leaf_size, dtype=dtype)
        self._result: torch.Tensor | None = None
        whole = Node(0, shards)
        if sliced:
            self._result = region.slot(len(nodes), dtype, leaf_size)
            low, high = slice_bounds(leaf_size, self.world_size)[self.rank : self.rank + 2]
            own_slices = [slot[low:high] for slot in every[0]]
            self._folds = [Fold(whole, nodes, own_slices, self._result[low:high])]
        else:
            self._folds = [Fold(whole, nodes, slots, self._total) for slots in every]
        self._exchanges = 0
        self._messages = 0
        region.raise_flag(MAPPED, 1)
        region.wait(MAPPED, 1)
        self.memory_mapped()

    def slots(self) -> list[torch.Tensor]:
        """Give the tensors in the shared memory to fill next."""
        return self._slots[self._exchanges % self._copies]

    def publish(self) -> None:
        """Raise this rank's flag."""
        self._exchanges += 1
        self._shared().raise_flag(FILLED, self._exchanges)

    def collect(self) -> torch.Tensor:
        """Wait for the peers' flags and fold all slots."""
        region = self._shared()
        turn = self._exchanges
        region.wait(FILLED, turn)
        self._folds[(turn - 1) % self._copies].run()
        if self._result is not None:
            region.raise_flag(FOLDED, turn)
            region.wait(FOLDED, turn)
            self._total.copy_(self._result)
        return self._total

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Write the own cell, wait, and read those of all ranks."""
        region = self._shared()
        self._messages += 1
        first = (self._messages & 1) * self.world_size
        region.write_cell(first + self.rank, cell)
        region.raise_flag(WRITTEN, self._messages)
        region.wait(WRITTEN, self._messages)
        return [region.read_cell(first + rank) for rank in range(self.world_size)]

    def signal_abort(self) -> None:
        """Write this rank's number into the word that every wait reads."""
        if self._region is not None:
            self._region.end()

    def close(self) -> None:
        """Drop every view of the memory; it is unmapped with the last of them."""
        region, self._region = self._region, None
        if region is not None:
            region.close()
            self._slots, self._folds, self._result = [], [], None

    def _shared(self) -> Region:
        if self._region is None:
            raise Aborted(f"rank {self.rank} exchanges through a closed communicator")
        return self._region
