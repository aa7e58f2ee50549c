"""The exchange of ranks that share memory, whatever kind of memory it is.

Every rank owns one cache line per flag and one slot per subtree root. It fills its slots, raises
its flag, waits for its peers' flags, and folds all slots itself. Small buffers are
double-buffered, so one wait per exchange is enough: a rank that raised flag ``n + 1`` has read
everything of exchange ``n``. Of large buffers each rank folds one slice for all, into a result
that everybody reads after a second wait.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from dask_nn.collectives.base import CELL_BYTES, LENGTH_BYTES, Communicator
from dask_nn.collectives.tree import all_roots, fold_program
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import mmap
    import threading

__all__ = ["SlotCommunicator"]

LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8
PAGE_BYTES = 4096
# Kinds of flags: slots filled, slice folded, cell written, memory mapped.
FILLED, FOLDED, WRITTEN, MAPPED = range(4)
NUM_KINDS = 4
# A wait polls, then yields the processor, and sleeps only when it is already long.
YIELDS = 4000
SLEEP_S = 50e-6
CHECK_EVERY = 64


def _round_up(size_bytes: int, to_bytes: int) -> int:
    return -(-size_bytes // to_bytes) * to_bytes


class SlotCommunicator(Communicator):
    """Ranks that see the same memory; subclasses say where it comes from.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    """

    polls: ClassVar[int] = 200

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
        self._memory: mmap.mmap | None = None
        self._flags: memoryview | None = None
        self._closed = False

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
        self._roots = all_roots(shards, self.world_size)
        nodes = [node for roots in self._roots for node in roots]
        self._program = fold_program(shards, nodes)
        leaf_bytes = leaf_size * dtype.itemsize
        self._sliced = leaf_bytes > self.slice_above_bytes and self.world_size > 1
        copies = 1 if self._sliced else 2

        flag_bytes = _round_up((NUM_KINDS * self.world_size + 1) * LINE_BYTES, PAGE_BYTES)
        self._cell_bytes = _round_up(CELL_BYTES + LENGTH_BYTES + 8, LINE_BYTES)
        cells_bytes = _round_up(2 * self.world_size * self._cell_bytes, PAGE_BYTES)
        slot_bytes = _round_up(leaf_bytes, PAGE_BYTES)
        num_slots = copies * len(nodes) + self._sliced
        self._cells_at = flag_bytes
        slots_at = flag_bytes + cells_bytes
        memory = self.map_memory(slots_at + num_slots * slot_bytes)
        self._memory = memory
        self._flags = memoryview(memory)[:flag_bytes].cast("q")
        self._abort_word = NUM_KINDS * self.world_size * LINE_WORDS
        self._view = memoryview(memory)

        def slot(index: int) -> torch.Tensor:
            return torch.frombuffer(
                memory, dtype=dtype, count=leaf_size, offset=slots_at + index * slot_bytes
            )

        first = sum(len(roots) for roots in self._roots[: self.rank])
        num_own = len(self._roots[self.rank])
        every = [[slot(copy * len(nodes) + i) for i in range(len(nodes))] for copy in range(copies)]
        self._slots = [slots[first : first + num_own] for slots in every]
        if self._sliced:
            bounds = self._slice_bounds(leaf_size)
            result = slot(copies * len(nodes))
            low, high = bounds[self.rank], bounds[self.rank + 1]
            self._result: torch.Tensor | None = result
            self._total = torch.zeros(leaf_size, dtype=dtype)
            self._folds = [self._bind([s[low:high] for s in every[0]], result[low:high])]
        else:
            self._result = None
            self._total = torch.zeros(leaf_size, dtype=dtype)
            self._folds = [self._bind(slots, self._total) for slots in every]
        self._copies = copies
        self._exchanges = 0
        self._messages = 0
        self._peers = [peer for peer in range(self.world_size) if peer != self.rank]
        self._raise_flag(MAPPED, 1)
        self._wait_for_peers(MAPPED, 1)
        self.memory_mapped()

    def slots(self) -> list[torch.Tensor]:
        """Give the tensors in the shared memory to fill next."""
        return self._slots[self._exchanges % self._copies]

    def publish(self) -> None:
        """Raise this rank's flag."""
        self._exchanges += 1
        self._raise_flag(FILLED, self._exchanges)

    def collect(self) -> torch.Tensor:
        """Wait for the peers' flags and fold all slots."""
        turn = self._exchanges
        self._wait_for_peers(FILLED, turn)
        fold = self._folds[(turn - 1) % self._copies]
        if not fold:  # the only root of a gang of one is the total
            self._total.copy_(self._slots[(turn - 1) % self._copies][0])
        for left, right, out in fold:
            torch.add(left, right, out=out)
        if self._result is not None:
            self._raise_flag(FOLDED, turn)
            self._wait_for_peers(FOLDED, turn)
            self._total.copy_(self._result)
        return self._total

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Write the own cell, wait, and read those of all ranks."""
        self._messages += 1
        turn = self._messages
        own = self._cell_at(self.rank, turn)
        self._view[own : own + 8] = len(cell).to_bytes(8, "little")
        self._view[own + 8 : own + 8 + len(cell)] = cell
        self._raise_flag(WRITTEN, turn)
        self._wait_for_peers(WRITTEN, turn)
        cells = []
        for rank in range(self.world_size):
            at = self._cell_at(rank, turn)
            length = int.from_bytes(self._view[at : at + 8], "little")
            cells.append(bytes(self._view[at + 8 : at + 8 + length]))
        return cells

    def signal_abort(self) -> None:
        """Write this rank's number into the word that every wait reads."""
        if self._flags is not None:
            self._flags[self._abort_word] = self.rank + 1

    def close(self) -> None:
        """Drop every view of the memory; it is unmapped with the last of them."""
        if self._closed:
            return
        self._closed = True
        if self._flags is not None:
            self._flags.release()
            self._view.release()
            self._flags = None
        self._slots, self._folds, self._result, self._memory = [], [], None, None

    def _bind(
        self, slots: list[torch.Tensor], total: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Turn the fold program into ready operands; the last addition writes the total."""
        num_scratch = max((add.dst for add in self._program), default=0) - len(slots)
        values = [*slots, total, *(torch.zeros_like(total) for _ in range(num_scratch))]
        return [(values[add.left], values[add.right], values[add.dst]) for add in self._program]

    def _slice_bounds(self, leaf_size: int) -> list[int]:
        per_line = LINE_BYTES // 4
        lines = -(-leaf_size // per_line)
        return [
            min(lines * rank // self.world_size * per_line, leaf_size)
            for rank in range(self.world_size)
        ] + [leaf_size]

    def _cell_at(self, rank: int, turn: int) -> int:
        return self._cells_at + ((turn & 1) * self.world_size + rank) * self._cell_bytes

    def _raise_flag(self, kind: int, value: int) -> None:
        flags = self._flags
        if flags is None:
            message = f"rank {self.rank} exchanges through a closed communicator"
            raise Aborted(message)
        flags[(kind * self.world_size + self.rank) * LINE_WORDS] = value

    def _wait_for_peers(self, kind: int, value: int) -> None:
        flags = self._flags
        if flags is None:
            message = f"rank {self.rank} waits through a closed communicator"
            raise Aborted(message)
        for peer in self._peers:
            word = (kind * self.world_size + peer) * LINE_WORDS
            for _ in range(self.polls):
                if flags[word] >= value:
                    break
            else:
                self._wait_long(flags, word, value, peer)

    def _wait_long(self, flags: memoryview, word: int, value: int, peer: int) -> None:
        deadline = self.deadline()
        rounds = 0
        while flags[word] < value:
            rounds += 1
            if rounds < YIELDS:
                self.yield_processor()
            else:
                time.sleep(SLEEP_S)
            if rounds % CHECK_EVERY == 0:
                self.check_abort()
                if flags[self._abort_word]:
                    message = f"rank {flags[self._abort_word] - 1} ended the exchange"
                    raise Aborted(message)
                if time.monotonic() > deadline:
                    raise self.timed_out(f"rank {peer}")
