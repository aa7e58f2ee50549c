"""Ranks that are threads of one process."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from typing import Any

from dask_nn.collectives.slots import SlotCommunicator
from dask_nn.errors import CollectiveTimeout

__all__ = ["ThreadsCommunicator"]

_meeting = threading.Condition()
_memories: dict[str, tuple[mmap.mmap, int]] = {}


class ThreadsCommunicator(SlotCommunicator):
    """The exchange through memory of one process.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event, slice_above_bytes
        See :class:`~dask_nn.collectives.slots.SlotCommunicator`.
    gang : str
        A name that all ranks of the gang share and no other gang uses.
    """

    name = "threads"

    def __init__(self, rank: int, world_size: int, *, gang: str, **options: Any) -> None:
        super().__init__(rank, world_size, **options)
        self._gang = gang
        # Polling keeps the interpreter lock from the very peers that are waited for.
        if getattr(sys, "_is_gil_enabled", lambda: True)():
            self.polls = 1

    def map_memory(self, size_bytes: int) -> mmap.mmap:
        """Take the gang's anonymous memory; the first rank to come makes it."""
        with _meeting:
            memory, users = _memories.get(self._gang) or (mmap.mmap(-1, size_bytes), 0)
            _memories[self._gang] = (memory, users + 1)
        if len(memory) != size_bytes:
            message = (
                f"gang {self._gang} holds {len(memory)} bytes, this rank expected {size_bytes}"
            )
            raise CollectiveTimeout(message)
        return memory

    def memory_mapped(self) -> None:
        """Forget the memory's name: all ranks hold it."""
        with _meeting:
            _memories.pop(self._gang, None)

    def yield_processor(self) -> None:
        """Give up the interpreter lock and the processor."""
        time.sleep(0)

    def close(self) -> None:
        """Drop the memory, also where the gang never became whole."""
        with _meeting:
            _memories.pop(self._gang, None)
        super().close()
