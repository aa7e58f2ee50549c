"""How much fits where, before any of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dask.utils import format_bytes

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MEMORY", "Memory", "Room", "fit_window", "fits", "needed_bytes", "windows_at_a_time"]

Memory = Literal["auto", "resident", "stream"]
MEMORY: tuple[Memory, ...] = get_args(Memory)

# Dask spills above 60 % of a worker's limit and pauses it at 80 %.
HELD_SHARE = 0.5
PROCESS_SHARE = 0.7
# Windows that a shard has at a time: the one in use, and the next.
MOST_WINDOWS = 2


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that data may take.

    Parameters
    ----------
    held_bytes : int
        Of all workers together, for data that stays.
    worker_bytes : int or None
        Of the least worker, for what it works on; None if it has no limit.
    """

    held_bytes: int
    worker_bytes: int | None

    @property
    def block_bytes(self) -> int | None:
        """The most that one block may take: a window of one, and one being computed."""
        return None if self.worker_bytes is None else self.worker_bytes // 3

    def without(self, taken_bytes: int) -> Room:
        """Give what is left once something is held."""
        return Room(
            held_bytes=max(0, self.held_bytes - taken_bytes), worker_bytes=self.worker_bytes
        )


def fits(size_bytes: int, room: Room) -> bool:
    """Tell whether data can be held."""
    return size_bytes <= room.held_bytes


def needed_bytes(block_bytes: Sequence[int], *, window: int, shards: int, windows: int = 1) -> int:
    """Tell what a worker needs for the windows of its shards.

    Parameters
    ----------
    block_bytes : sequence of int
        Size of each block's rows as they are batched, the largest first.
    window : int
        Blocks that a shard shuffles together.
    shards : int
        Shards of the worker.
    windows : int
        Windows of each shard that are in memory at a time.

    Returns
    -------
    int
        ``windows`` windows of the largest blocks for each shard, and one block being computed
        with as much again for what it is computed from.
    """
    if not block_bytes:
        return 0
    return windows * shards * sum(block_bytes[:window]) + 2 * block_bytes[0]


def windows_at_a_time(
    block_bytes: Sequence[int], *, window: int, shards: int, room_bytes: int | None
) -> int:
    """Tell whether a worker has room for two windows of each of its shards, or for one alone."""
    if room_bytes is None:
        return MOST_WINDOWS
    needed = needed_bytes(block_bytes, window=window, shards=shards, windows=MOST_WINDOWS)
    return MOST_WINDOWS if needed <= room_bytes else 1


def fit_window(
    block_bytes: Sequence[int], *, window: int, shards: int, room_bytes: int | None
) -> int:
    """Choose the largest window, up to one that is wanted, that a worker has room for.

    Parameters
    ----------
    block_bytes : sequence of int
        Size of each block's rows as they are batched, the largest first.
    window : int
        Blocks that a shard shall shuffle together.
    shards : int
        Most shards of one worker.
    room_bytes : int or None
        What the worker has; None if it has no limit.

    Raises
    ------
    ConfigurationError
        If not even a window of one block fits.
    """
    if room_bytes is None:
        return window
    for blocks in range(window, 0, -1):
        if needed_bytes(block_bytes, window=blocks, shards=shards) <= room_bytes:
            return blocks
    message = (
        f"a worker has {format_bytes(room_bytes)} for data, but {shards} shard(s) with windows of "
        f"a single block need "
        f"{format_bytes(needed_bytes(block_bytes, window=1, shards=shards))}: use smaller chunks, "
        "more workers, fewer shards, or workers with more memory"
    )
    raise ConfigurationError(message)
