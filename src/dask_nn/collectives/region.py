"""Memory that the ranks of one host share: flags, cells for messages, slots for leaves.

Every member owns one cache line per kind of flag. A flag only grows, and whoever waits for a member
waits until its flag has a value; stores become visible in the order in which they were made, so
what a member wrote before it raised its flag is there. One more word tells who ended the exchange.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from dask_nn.collectives.region_layout import (
    CELL_STRIDE,
    FILLED,
    FINISHED,
    FOLDED,
    LINE_WORDS,
    MAPPED,
    WRITTEN,
    RegionLayout,
    in_pages,
)
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable

    from dask_nn.collectives.base import Communicator

__all__ = ["FILLED", "FINISHED", "FOLDED", "MAPPED", "WRITTEN", "Region", "RegionLayout"]

# A wait polls, then yields the processor, and sleeps only when it is already long.
POLLS = 200
YIELDS = 4000
SLEEP_S = 50e-6
CHECK_EVERY = 64


class Region:
    """One member's view of the memory.

    Parameters
    ----------
    owner : Communicator
        Whose abort flag and deadline end the waits.
    layout : RegionLayout
        The same for all members.
    memory : mmap.mmap
        Of at least ``layout.size_bytes``, zeroed before the first member came.
    member : int
        Which member this is, from 0.
    first_rank : int
        The rank of member 0.
    polls : int
        Polls of a wait before the processor is yielded.
    pause : callable
        Lets another thread of this host run.
    """

    def __init__(
        self,
        owner: Communicator,
        layout: RegionLayout,
        memory: mmap.mmap,
        member: int,
        *,
        first_rank: int = 0,
        polls: int = POLLS,
        pause: Callable[[], object] = os.sched_yield,
    ) -> None:
        self._owner: Communicator | None = owner
        self._layout = layout
        self._memory: mmap.mmap | None = memory
        self._member = member
        self._first_rank = first_rank
        self._polls = polls
        self._pause = pause
        self._flags: memoryview | None = memoryview(memory)[: layout.cells_at].cast("q")
        self._view = memoryview(memory)
        self.peers = [peer for peer in range(layout.members) if peer != member]

    def slot(self, index: int, dtype: torch.dtype, size: int) -> torch.Tensor:
        """Give a slot as a tensor, shape (size,); it keeps the memory mapped."""
        at = self._layout.slots_at + index * in_pages(self._layout.slot_bytes)
        return torch.frombuffer(self._memory, dtype=dtype, count=size, offset=at)

    def write_cell(self, index: int, cell: bytes) -> None:
        """Put a message into a cell."""
        at = self._layout.cells_at + index * CELL_STRIDE
        self._view[at : at + 8] = len(cell).to_bytes(8, "little")
        self._view[at + 8 : at + 8 + len(cell)] = cell

    def read_cell(self, index: int) -> bytes:
        """Copy the message out of a cell."""
        at = self._layout.cells_at + index * CELL_STRIDE
        length = int.from_bytes(self._view[at : at + 8], "little")
        return bytes(self._view[at + 8 : at + 8 + length])

    def raise_flag(self, kind: int, value: int, *, complete: bool = False) -> None:
        """Show the others that this member has come so far.

        Parameters
        ----------
        kind : int
            Which flag.
        value : int
            How far.
        complete : bool
            Whether other hosts have completed this exchange already: then members here may, too.

        Raises
        ------
        Aborted
            If the region is closed, the owner was told to stop, or a member has ended the
            exchange: it does not complete it, so nobody else shall.
        """
        owner, flags = self._owner, self._flags
        if owner is None or flags is None:
            raise Aborted("a rank exchanges through a closed communicator")
        if not complete:
            owner.check_abort()
            self.check_ended()
        flags[(kind * self._layout.members + self._member) * LINE_WORDS] = value

    def wait(self, kind: int, value: int, members: Iterable[int] | None = None) -> None:
        """Wait until members, by default all others, have raised a flag to a value.

        Raises
        ------
        Aborted
            If a member ended the exchange, or the owner was told to stop.
        CollectiveTimeout
            If one did not come within the owner's deadline.
        """
        flags = self._flags
        if flags is None:
            raise Aborted("a rank waits through a closed communicator")
        for member in self.peers if members is None else members:
            word = (kind * self._layout.members + member) * LINE_WORDS
            for _ in range(self._polls):
                if flags[word] >= value:
                    break
            else:
                self._wait_long(flags, word, value, member)

    def _wait_long(self, flags: memoryview, word: int, value: int, member: int) -> None:
        owner = self._owner
        if owner is None:
            raise Aborted("a rank waits through a closed communicator")
        deadline = owner.deadline()
        rounds = 0
        while flags[word] < value:
            rounds += 1
            if rounds < YIELDS:
                self._pause()
            else:
                time.sleep(SLEEP_S)
            # Who has what it waits for completes the exchange, as its peers do.
            if rounds % CHECK_EVERY == 0 and flags[word] < value:
                owner.check_abort()
                self.check_ended()
                if time.monotonic() > deadline:
                    raise owner.timed_out(f"rank {self._first_rank + member}")

    def end(self) -> None:
        """Write this member's number into the word that every wait reads; once is enough."""
        flags, word = self._flags, self._layout.abort_word
        with suppress(ValueError):  # this member's own thread leaves at this moment
            if flags is not None and not flags[word]:
                flags[word] = self._member + 1

    def check_ended(self) -> None:
        """Raise :class:`~dask_nn.errors.Aborted` if a member has ended the exchange."""
        flags, word = self._flags, self._layout.abort_word
        if flags is not None and flags[word]:
            raise Aborted(f"rank {self._first_rank + flags[word] - 1} ended the exchange")

    def close(self) -> None:
        """Drop every view of the memory; it is unmapped with the last slot."""
        if self._flags is not None:
            self._flags.release()
            self._view.release()
            self._flags = self._memory = self._owner = None
