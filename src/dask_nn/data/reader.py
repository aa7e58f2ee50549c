"""Reading blocks from memory: of this process, of this worker, or of a peer."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Block", "BlockReader", "ClusterReader", "MemoryReader"]

type Block = tuple[np.ndarray[Any, Any], ...]


class BlockReader(ABC):
    """Gives the arrays of a block, by its number; called from one thread at a time."""

    @abstractmethod
    def read(self, block: int) -> Block:
        """Give one array for each field, shape (rows of the block, ...)."""


class MemoryReader(BlockReader):
    """Blocks that this process holds.

    Parameters
    ----------
    arrays : sequence of tuple of numpy.ndarray
        For each block the array of each field.
    """

    def __init__(self, arrays: Sequence[Block]) -> None:
        self._arrays = arrays

    def read(self, block: int) -> Block:
        """Give the arrays themselves."""
        return self._arrays[block]


class ClusterReader(BlockReader):
    """Blocks that a Dask cluster holds, by key.

    A block in this worker's own memory is used where it lies; others come from a peer and are
    kept within a budget, because the order of blocks changes every epoch.

    Parameters
    ----------
    keys : sequence of tuple
        For each block the Dask key of each field.
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
        own: Any,
        fetch: Callable[[list[Any]], list[Any]],
        cache_bytes: int,
        fetch_whole: bool = False,
    ) -> None:
        self._keys = keys
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
            return tuple(np.asarray(values[key]) for key in keys)

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
