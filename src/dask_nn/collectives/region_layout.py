"""Where everything lies in the memory that the ranks of one host share."""

from __future__ import annotations

from dataclasses import dataclass

from dask_nn.collectives.base import CELL_BYTES, LENGTH_BYTES
from dask_nn.collectives.tree import all_roots

__all__ = ["RegionLayout", "copies_of", "is_sliced", "layout_of_ranks"]

LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8
PAGE_BYTES = 4096
CELL_STRIDE = -(-(CELL_BYTES + LENGTH_BYTES + 8) // LINE_BYTES) * LINE_BYTES
# Kinds of flags: slots filled, slice folded, cell written, memory mapped, result of a host there.
FILLED, FOLDED, WRITTEN, MAPPED, FINISHED = range(5)
NUM_KINDS = 5


def in_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class RegionLayout:
    """Where in the memory everything is.

    Parameters
    ----------
    members : int
        Ranks that share the memory.
    num_cells : int
        Cells for messages.
    num_slots : int
        Slots for leaves.
    slot_bytes : int
        Size of one leaf.
    """

    members: int
    num_cells: int
    num_slots: int
    slot_bytes: int

    @property
    def abort_word(self) -> int:
        """Index of the word that tells who ended the exchange."""
        return NUM_KINDS * self.members * LINE_WORDS

    @property
    def cells_at(self) -> int:
        """Offset of the first cell; the flags end there."""
        return in_pages((NUM_KINDS * self.members + 1) * LINE_BYTES)

    @property
    def slots_at(self) -> int:
        """Offset of the first slot."""
        return self.cells_at + in_pages(self.num_cells * CELL_STRIDE)

    @property
    def size_bytes(self) -> int:
        """Size of the whole."""
        return self.slots_at + self.num_slots * in_pages(self.slot_bytes)


def is_sliced(leaf_bytes: int, world_size: int, slice_above_bytes: int) -> bool:
    """Tell whether leaves are reduced by owner-slice, into a result that everybody reads."""
    return leaf_bytes > slice_above_bytes and world_size > 1


def copies_of(*, sliced: bool) -> int:
    """Give the number of exchanges that have slots of their own."""
    return 1 if sliced else 2


def layout_of_ranks(
    *, shards: int, world_size: int, leaf_bytes: int, slice_above_bytes: int = 1 << 20
) -> RegionLayout:
    """Lay out the memory of ranks that are all on one host.

    Parameters
    ----------
    shards, world_size : int
        Logical replicas, and ranks.
    leaf_bytes : int
        Size of one leaf.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    """
    sliced = is_sliced(leaf_bytes, world_size, slice_above_bytes)
    num_roots = sum(map(len, all_roots(shards, world_size)))
    return RegionLayout(
        members=world_size,
        num_cells=2 * world_size,
        num_slots=copies_of(sliced=sliced) * num_roots + sliced,
        slot_bytes=leaf_bytes,
    )
