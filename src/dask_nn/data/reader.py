"""Reading blocks: from memory of this process, this worker or a peer, or by computing them."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.sizeof import sizeof

from dask_nn.data.lengths import check_rows
from dask_nn.data.problem import Problem
from dask_nn.data.sizes import SHARED_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from dask_nn.data.stream import Stream
    from dask_nn.errors import DataError

__all__ = [
    "Block",
    "BlockReader",
    "ClusterReader",
    "MemoryReader",
    "StreamReader",
    "with_retries",
]

# A store that fails is asked again after these pauses.
RETRY_PAUSES_S = (0.2, 1.0, 3.0)

type Block = tuple[np.ndarray[Any, Any], ...]


def with_retries[T](read: Callable[[], T], check: Callable[[], None] | None = None) -> T:
    """Read, and read again after a pause what looks like a moment's trouble of a store.

    Parameters
    ----------
    read : callable
        Reads.
    check : callable, optional
        Called before another attempt; may raise to end it.

    Raises
    ------
    OSError
        That of the last of ``len(RETRY_PAUSES_S) + 1`` attempts; other errors at once.
    """
    for pause_s in RETRY_PAUSES_S:
        try:
            return read()
        except OSError:  # a file system or a store that fails for a moment
            time.sleep(pause_s)
        if check is not None:
            check()
    return read()


class BlockReader(ABC):
    """Gives the arrays of a block, by its number; called from one thread at a time."""

    @property
    def loaders(self) -> int:
        """Blocks that may be read at the same time."""
        return 1

    @abstractmethod
    def read(self, block: int) -> Block:
        """Give one array for each field, shape (rows of the block, ...)."""

    def read_many(self, blocks: Sequence[int]) -> Iterator[Block]:
        """Give blocks in order, each to be used before the next is asked for."""
        for block in blocks:
            yield self.read(block)


class MemoryReader(BlockReader):
    """Blocks that this process holds.

    Parameters
    ----------
    arrays : sequence or mapping, of tuple of numpy.ndarray
        For each block, by its number, the array of each field.
    lengths : sequence or mapping, of int, optional
        The rows that each of them must have, where that was not looked at before.
    names : sequence of str
        Of the fields, for errors.
    """

    def __init__(
        self,
        arrays: Sequence[Block] | Mapping[int, Block],
        *,
        lengths: Sequence[int] | Mapping[int, int] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._arrays = arrays
        self._names = names
        self._lengths = lengths

    def read(self, block: int) -> Block:
        """Give the arrays themselves."""
        found = self._arrays[block]
        if self._lengths is not None:
            check_rows(block, found, self._lengths[block], of=self._names)
        return found


class ClusterReader(BlockReader):
    """Blocks that a Dask cluster holds, by key.

    A block in this worker's own memory is used where it lies; others come from a peer and are
    kept within a budget, because the order of blocks changes every epoch.

    Parameters
    ----------
    keys : sequence of tuple
        For each block the Dask key of each field.
    lengths : sequence of int
        The rows that each block must have.
    names : sequence of str
        Of the fields, for errors.
    own : mapping
        The worker's own memory, from key to value.
    fetch : callable
        From a list of keys to the values, from wherever they are.
    cache_bytes : int
        Size of fetched blocks that are kept.
    fetch_whole : bool
        Fetch all foreign blocks at once when the first is needed: for a data set that fits the
        cache and of which every block will be needed here sooner or later, one exchange is much
        cheaper than one for each block, spread over the first epochs.
    """

    def __init__(
        self,
        keys: Sequence[tuple[Any, ...]],
        *,
        lengths: Sequence[int],
        names: Sequence[str],
        own: Any,
        fetch: Callable[[list[Any]], list[Any]],
        cache_bytes: int,
        fetch_whole: bool = False,
    ) -> None:
        self._keys = keys
        self._names = names
        self._lengths = lengths
        self._own = own
        self._fetch = fetch
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[Any, Any] = OrderedDict()
        self._cached_bytes = 0
        self._fetch_whole = fetch_whole
        self._lock = threading.Lock()

    def read(self, block: int) -> Block:
        """Give the arrays of a block, fetching what this worker does not hold."""
        with self._lock:
            keys = self._keys[block]
            values = {key: self._look_up(key) for key in keys}
            missing = [key for key, value in values.items() if value is None]
            if missing and self._fetch_whole:
                self._fetch_whole = False
                foreign = [key for keys in self._keys for key in keys if key not in self._own]
                found = dict(zip(foreign, map(np.asarray, self._fetch(foreign)), strict=True))
                for key, value in found.items():
                    self._keep(key, value)
                values |= {key: found[key] for key in missing}
            elif missing:
                for key, value in zip(missing, self._fetch(missing), strict=True):
                    values[key] = np.asarray(value)
                    self._keep(key, values[key])
        arrays = tuple(np.asarray(values[key]) for key in keys)
        check_rows(block, arrays, self._lengths[block], of=self._names)
        return arrays

    def _look_up(self, key: Any) -> Any:
        try:
            return self._own[key]
        except KeyError:
            pass
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        return None

    def _keep(self, key: Any, value: np.ndarray[Any, Any]) -> None:
        if value.nbytes > self._cache_bytes:
            return
        self._cached[key] = value
        self._cached_bytes += value.nbytes
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._cached.popitem(last=False)
            self._cached_bytes -= dropped.nbytes


class StreamReader(BlockReader):
    """Blocks that are computed here when they are read, and not kept.

    Parameters
    ----------
    stream : Stream
        How.
    fetch_shared : callable
        From the keys of what many blocks need to the values; what was needed last is kept.
    place : str
        The worker's address, for errors.
    threads : int
        Blocks that may be computed at the same time.
    check : callable, optional
        Called before a failed read is tried again; may raise to end it.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        fetch_shared: Callable[[list[Any]], list[Any]],
        place: str = "",
        threads: int = 1,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._stream = stream
        self._fetch_shared = fetch_shared
        self._place = place
        self._threads = threads
        self._check = check
        self._starts = stream.starts
        self._shared: OrderedDict[Any, Any] = OrderedDict()
        self._shared_bytes = 0
        self._lock = threading.Lock()

    @property
    def loaders(self) -> int:
        """Blocks that may be computed at the same time."""
        return self._threads

    def read(self, block: int) -> Block:
        """Compute the arrays of a block; what looks like a moment's trouble is tried again."""
        shared = self._shared_values(block)

        def compute() -> Block:
            try:
                return self._stream.compute(block, self._starts[block], shared)
            except OSError:
                raise
            except Exception as error:
                raise self._failed(block, error, 1) from error

        try:
            return with_retries(compute, self._check)
        except OSError as error:
            raise self._failed(block, error, len(RETRY_PAUSES_S) + 1) from error

    def read_many(self, blocks: Sequence[int]) -> Iterator[Block]:
        """Compute blocks one after the other, some ahead of the one that is given."""
        if self._threads == 1 or len(blocks) < 2:
            yield from super().read_many(blocks)
            return
        with ThreadPoolExecutor(self._threads, "dask-nn-read") as pool:
            waiting: deque[Future[Block]] = deque()
            left = iter(blocks)
            try:
                for block in islice(left, self._threads):
                    waiting.append(pool.submit(self.read, block))
                while waiting:
                    found = waiting.popleft().result()
                    for block in islice(left, 1):
                        waiting.append(pool.submit(self.read, block))
                    yield found
            finally:
                for future in waiting:
                    future.cancel()

    def _shared_values(self, block: int) -> dict[Any, Any]:
        """Give what a block needs of what is shared; what does not fit is fetched when needed."""
        wanted = self._stream.recipes[block].shared if self._stream.recipes else ()
        values = self._stream.values
        with self._lock:
            missing = [key for key in wanted if key not in values and key not in self._shared]
            for key, value in zip(
                missing, self._fetch_shared(missing) if missing else (), strict=True
            ):
                self._shared[key] = value
                self._shared_bytes += sizeof(value)
            found = {}
            for key in wanted:
                if key in self._shared:
                    self._shared.move_to_end(key)
                found[key] = values[key] if key in values else self._shared[key]
            while self._shared_bytes > SHARED_BYTES and len(self._shared) > len(wanted):
                self._shared_bytes -= sizeof(self._shared.popitem(last=False)[1])
        return found

    def _failed(self, block: int, error: Exception, attempts: int) -> DataError:
        problem = Problem.of(block, error, self._place)
        return problem.error(self._stream.computed, attempts=attempts)
