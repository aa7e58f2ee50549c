"""The order of samples, as a pure function of block lengths, shards, batch size and seed.

Nothing here knows of workers or ranks, so a plan is the same wherever it is computed, and a run
is resumed by computing it again. It imports no torch. Random orders come from a keyed hash and
splitmix64 (Steele, Lea and Flood, OOPSLA 2014), not from ``Generator.permutation``, whose stream
NumPy does not promise to keep.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from dask_nn.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PLAN_VERSION", "Piece", "Plan", "Shuffle", "Window", "key64", "permutation"]

PLAN_VERSION = 1
"""Counts up whenever the same arguments give another order."""

Shuffle = Literal["blocks", "within", "none"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key64(*key: object) -> int:
    """Hash the parts of a key to a number in ``0..2**64-1`` (BLAKE2b of their ``repr``)."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """Return a random order of ``0..length-1`` that depends on `key` alone.

    It is the order that sorts the first `length` outputs of splitmix64 seeded with ``key64(*key)``.

    Parameters
    ----------
    length : int
        Number of items; zero gives an empty array.
    *key : int or str
        Parts of the key. Plain Python values: their ``repr`` counts.

    Returns
    -------
    ndarray of int64, shape (length,)
    """
    z = np.arange(1, length + 1, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(key64(*key))
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    # splitmix64 is a bijection of its counter: without ties, the fastest sort is a stable one.
    return np.argsort(z).astype(np.int64, copy=False)


class Piece(NamedTuple):
    """Rows ``start..stop-1`` of one block."""

    block: int
    start: int
    stop: int


class Window(NamedTuple):
    """The pieces among which a shard shuffles, in the order in which they are read.

    `start` is the window's first position in its shard, `length` its number of rows; row ``r`` of
    a window is row ``r`` of its pieces laid end to end.
    """

    start: int
    length: int
    pieces: tuple[Piece, ...]

    @property
    def stop(self) -> int:
        """The position in the shard just behind the window."""
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples each shard reads in each step of one epoch.

    The blocks are laid on a tape in random order, and shard ``v`` of ``V`` owns the rows
    ``n*v//V`` to ``n*(v+1)//V`` of it: shards differ by at most one row and at most ``V - 1``
    blocks are cut in two. A shard reads window after window and takes the rows of each in random
    order. Windows begin at different steps in different shards, so that loads are spread out.

    Parameters
    ----------
    block_lengths : tuple of int
        Rows of each block, in the order of the data.
    shards : int
        Logical replicas among which each batch is divided.
    batch_size : int
        Samples of one global batch; a multiple of `shards`.
    window : int
        Blocks that a shard shuffles together.
    seed : int
        Seed of the run.
    epoch : int
        Epoch, from 0.
    shuffle : {"blocks", "within", "none"}
        ``"blocks"`` orders blocks and rows anew in each epoch; with ``"within"`` the order of
        blocks, and so the shard of each block, stays the same in all epochs; ``"none"`` keeps the
        order of the data.

    Raises
    ------
    ConfigurationError
        If an option cannot work, or there are more shards than samples.
    DataError
        If there are no samples, or a block's length is not a number of rows.
    """

    block_lengths: tuple[int, ...]
    shards: int
    batch_size: int
    window: int = 10
    seed: int = 0
    epoch: int = 0
    shuffle: Shuffle = "blocks"

    def __post_init__(self) -> None:
        # Keys are hashed by their repr, in which NumPy's integers differ from Python's.
        for name in ("shards", "batch_size", "window", "seed", "epoch"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        object.__setattr__(self, "block_lengths", _lengths(self.block_lengths))
        for name in ("shards", "batch_size", "window"):
            if getattr(self, name) < 1:
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise ConfigurationError(message)
        if self.shuffle not in get_args(Shuffle):
            message = f"shuffle must be one of {get_args(Shuffle)}, got {self.shuffle!r}"
            raise ConfigurationError(message)
        if self.batch_size % self.shards:
            lower = self.batch_size // self.shards * self.shards
            near = " or ".join(str(size) for size in (lower, lower + self.shards) if size)
            message = (
                f"batch_size must be divisible by the number of shards, got batch_size="
                f"{self.batch_size} and shards={self.shards}; batch_size={near} would do"
            )
            raise ConfigurationError(message)
        if not self.num_samples:
            message = f"expected at least one sample, got {len(self.block_lengths)} empty blocks"
            raise DataError(message)
        if self.shards > self.num_samples:
            message = (
                f"expected at least one sample for each shard, got shards={self.shards} and "
                f"{self.num_samples} samples; use fewer shards"
            )
            raise ConfigurationError(message)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def num_samples(self) -> int:
        """Rows of all blocks together."""
        return sum(self.block_lengths)

    @property
    def shard_batch_size(self) -> int:
        """Rows that one shard reads in a full step."""
        return self.batch_size // self.shards

    @cached_property
    def num_steps(self) -> int:
        """Steps of the epoch."""
        longest = -(-self.num_samples // self.shards)
        return -(-longest // self.shard_batch_size)

    def shard_length(self, v: int) -> int:
        """Return the number of rows that shard `v` owns."""
        lo, hi = self._tape_range(v)
        return hi - lo

    def windows(self, v: int) -> tuple[Window, ...]:
        """Return the windows of shard `v`; they follow each other without gaps."""
        windows = self._windows.get(v)
        if windows is None:
            windows = self._windows[v] = tuple(self._cut_windows(v))
        return windows

    def window_order(self, v: int, j: int) -> NDArray[np.int64]:
        """Return the order in which shard `v` takes the rows of its window `j`.

        Returns
        -------
        ndarray of int64, shape (windows(v)[j].length,)
        """
        length = self.windows(v)[j].length
        if self.shuffle == "none":
            return np.arange(length, dtype=np.int64)
        return permutation(length, self.seed, self.epoch, int(v), int(j))

    def count(self, t: int, v: int) -> int:
        """Return how many rows shard `v` reads in step `t`; fewer, or none, in the last steps."""
        lo, hi = self._positions(t, v)
        return hi - lo

    def step_count(self, t: int) -> int:
        """Return the number of rows of the global batch of step `t`."""
        if (t + 1) * self.shard_batch_size * self.shards <= self.num_samples and t >= 0:
            return self.batch_size
        return sum(self.count(t, v) for v in range(self.shards))

    def opened(self, t: int) -> tuple[int, int]:
        """Return how many pieces and rows the windows have that all shards open before step `t`."""
        position = t * self.shard_batch_size
        windows = [w for v in range(self.shards) for w in self.windows(v) if w.start < position]
        return sum(len(w.pieces) for w in windows), sum(w.length for w in windows)

    def segments(self, t: int, v: int) -> tuple[tuple[int, int, int], ...]:
        """Return the parts ``(j, lo, hi)`` of windows that make up the batch of a shard.

        The batch of step `t` is ``window_order(v, j)[lo:hi]`` of each part, in this order; it is
        empty for a shard that has no more rows.
        """
        position, stop = self._positions(t, v)
        windows = self.windows(v)
        parts = []
        j = bisect_right(windows, position, key=_window_start) - 1
        while position < stop:
            window = windows[j]
            end = min(stop, window.stop)
            parts.append((j, position - window.start, end - window.start))
            position = end
            j += 1
        return tuple(parts)

    def sample_ids(self, t: int, v: int) -> NDArray[np.int64]:
        """Return the rows that shard `v` reads in step `t`, counted over all blocks end to end.

        It orders every window anew that the step touches; a loop over steps should keep
        :meth:`window_order` instead.

        Returns
        -------
        ndarray of int64, shape (count(t, v),)
        """
        parts = [np.empty(0, dtype=np.int64)]
        for j, lo, hi in self.segments(t, v):
            pieces = self.windows(v)[j].pieces
            firsts = np.array([self._block_starts[p.block] + p.start for p in pieces])
            begins = np.cumsum([0, *(p.stop - p.start for p in pieces[:-1])])
            rows = self.window_order(v, j)[lo:hi]
            piece = np.searchsorted(begins, rows, side="right") - 1
            parts.append(firsts[piece] + (rows - begins[piece]))
        return np.concatenate(parts)

    @cached_property
    def _windows(self) -> dict[int, tuple[Window, ...]]:
        return {}

    @cached_property
    def _block_starts(self) -> list[int]:
        return list(accumulate(self.block_lengths, initial=0))

    @cached_property
    def _tape(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Blocks in tape order, and the tape row just behind each."""
        num_blocks = len(self.block_lengths)
        match self.shuffle:
            case "none":
                order = np.arange(num_blocks, dtype=np.int64)
            case "within":
                order = permutation(num_blocks, self.seed, "blocks")
            case "blocks":
                order = permutation(num_blocks, self.seed, self.epoch, "blocks")
        return order, np.cumsum(np.array(self.block_lengths, dtype=np.int64)[order])

    def _tape_range(self, v: int) -> tuple[int, int]:
        if not 0 <= v < self.shards:
            message = f"shard must be in 0..{self.shards - 1}, got {v}"
            raise IndexError(message)
        return self.num_samples * v // self.shards, self.num_samples * (v + 1) // self.shards

    def _positions(self, t: int, v: int) -> tuple[int, int]:
        if not 0 <= t < self.num_steps:
            message = f"step must be in 0..{self.num_steps - 1}, got {t}"
            raise IndexError(message)
        length = self.shard_length(v)
        size = self.shard_batch_size
        return min(t * size, length), min((t + 1) * size, length)

    def _cut_windows(self, v: int) -> list[Window]:
        pieces = self._pieces(v)
        cuts = [0, *range(1 + v * self.window // self.shards, len(pieces), self.window)]
        windows = []
        position = 0
        for first, behind in zip(cuts, [*cuts[1:], len(pieces)], strict=True):
            inside = tuple(pieces[first:behind])
            length = sum(piece.stop - piece.start for piece in inside)
            windows.append(Window(position, length, inside))
            position += length
        return windows

    def _pieces(self, v: int) -> list[Piece]:
        order, ends = self._tape
        lo, hi = self._tape_range(v)
        first = int(np.searchsorted(ends, lo, side="right"))
        behind = int(np.searchsorted(ends, hi, side="left")) + 1
        blocks = order[first:behind]
        begins = ends[first:behind] - np.array(self.block_lengths, dtype=np.int64)[blocks]
        starts = np.maximum(lo - begins, 0)
        stops = np.minimum(hi, ends[first:behind]) - begins
        kept = stops > starts
        columns = (blocks[kept].tolist(), starts[kept].tolist(), stops[kept].tolist())
        return [Piece(*piece) for piece in zip(*columns, strict=True)]


_window_start = operator.attrgetter("start")


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        message = f"{name} must be an integer, got {value!r}"
        raise ConfigurationError(message) from None


def _lengths(values: Any) -> tuple[int, ...]:
    try:
        lengths = tuple(map(operator.index, values))
    except TypeError:
        message = f"block lengths must be integers, got {values!r:.200}"
        raise DataError(message) from None
    if min(lengths, default=0) < 0:
        message = f"block lengths must not be negative, got {min(lengths)}"
        raise DataError(message)
    return lengths
