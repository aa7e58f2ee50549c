"""How much fits where, before any of it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from dask.utils import format_bytes

from dask_nn.errors import ConfigurationError

__all__ = [
    "MEMORY",
    "Memory",
    "Needs",
    "Room",
    "choose_loaders",
    "fit_window",
    "fits",
    "windows_at_a_time",
]

Memory = Literal["auto", "resident", "stream"]
MEMORY: tuple[Memory, ...] = get_args(Memory)

# Dask spills above 60 % of a worker's limit and pauses it at 80 %.
HELD_SHARE = 0.5
PROCESS_SHARE = 0.7
# Windows that a shard has at a time: the one in use, and the next.
MOST_WINDOWS = 2
# Blocks of a stream that one rank reads at the same time, and what they may take of its memory.
MOST_LOADERS = 4
LOADERS_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that data may take.

    Parameters
    ----------
    held_bytes : int
        Of all workers together, for data that stays.
    worker_bytes : int or None
        Of the least worker, for what it works on; None if it has no limit.
    num_workers : int
        How many workers share what is held.
    """

    held_bytes: int
    worker_bytes: int | None
    num_workers: int = 1

    @property
    def block_bytes(self) -> int | None:
        """The most that one block may take: a window of one, and one being computed."""
        return None if self.worker_bytes is None else self.worker_bytes // 3

    def without(self, taken_bytes: int) -> Room:
        """Give what is left once something is held, spread over the workers."""
        left = self.worker_bytes
        if left is not None:
            left = max(0, left - -(-taken_bytes // self.num_workers))
        return replace(self, held_bytes=max(0, self.held_bytes - taken_bytes), worker_bytes=left)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a rank needs memory for, beside Python, PyTorch and the model.

    Parameters
    ----------
    rows_bytes : tuple of int
        Size of each block's rows as they are batched, the largest first.
    block_bytes : int
        Size of the largest block as it is stored.
    loaders : int
        Blocks that are read at the same time.
    other_bytes : int
        Whatever does not depend on the window: validation blocks, columns and shared values that
        every worker has whole, fetched blocks that are kept.
    """

    rows_bytes: tuple[int, ...]
    block_bytes: int
    loaders: int = 1
    other_bytes: int = 0

    def total_bytes(self, *, window: int, shards: int, windows: int = 1) -> int:
        """Add it up.

        Parameters
        ----------
        window : int
            Blocks that a shard shuffles together.
        shards : int
            Shards of the rank.
        windows : int
            Windows of each shard that are in memory at a time.

        Returns
        -------
        int
            ``windows`` windows of the largest blocks for each shard; each block being computed,
            with as much again for what it is computed from; those that wait to be copied; and
            `other_bytes`.
        """
        if not self.rows_bytes:
            return self.other_bytes
        largest = max(self.block_bytes, self.rows_bytes[0])
        # One loader copies what it has read before it goes on; of several, one block waits.
        blocks = 2 * self.loaders + (self.loaders > 1)
        rows = windows * shards * sum(self.rows_bytes[:window])
        return rows + blocks * largest + self.other_bytes


def fits(size_bytes: int, room: Room) -> bool:
    """Tell whether data can be held."""
    return size_bytes <= room.held_bytes


def choose_loaders(threads: int, block_bytes: int, limit_bytes: int) -> int:
    """Choose how many blocks of a stream a worker reads at the same time.

    Parameters
    ----------
    threads : int
        Of the worker.
    block_bytes : int
        The largest block.
    limit_bytes : int
        Of the worker's memory; 0 if there is none.
    """
    wanted = max(1, min(MOST_LOADERS, threads // 2))
    if not limit_bytes or not block_bytes:
        return wanted
    return max(1, min(wanted, int(limit_bytes * LOADERS_SHARE) // (2 * block_bytes)))


def windows_at_a_time(needs: Needs, *, window: int, shards: int, room_bytes: int | None) -> int:
    """Tell whether a worker has room for two windows of each of its shards, or for one alone."""
    if room_bytes is None:
        return MOST_WINDOWS
    needed = needs.total_bytes(window=window, shards=shards, windows=MOST_WINDOWS)
    return MOST_WINDOWS if needed <= room_bytes else 1


def fit_window(needs: Needs, *, window: int, shards: int, room_bytes: int | None) -> int:
    """Choose the largest window, up to one that is wanted, that a worker has room for.

    Parameters
    ----------
    needs : Needs
        Of a rank.
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
        if needs.total_bytes(window=blocks, shards=shards) <= room_bytes:
            return blocks
    message = (
        f"a worker has {format_bytes(room_bytes)} for data, but {shards} shard(s) with windows of "
        f"a single block need {format_bytes(needs.total_bytes(window=1, shards=shards))}: use "
        "smaller chunks, more workers, fewer shards, or workers with more memory"
    )
    raise ConfigurationError(message)
