"""Zarr arrays that say so when their store is gone, instead of giving the fill value.

A chunk that is missing from a Zarr store reads as the fill value, because stores leave out chunks
that hold nothing else. A store that was deleted or cut shorter therefore reads as zeros. What was
left out when an array was opened may be missing, nothing else. Where an array has shards, they are
what is stored, and so what may be missing.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ZarrRows", "watched"]


@dataclass(frozen=True)
class ZarrRows:
    """One array of a store, looked at again at every read.

    Parameters
    ----------
    array : zarr.Array
        As it was when it was opened; refuses to read chunks that are missing.
    left_out : bytes
        One bit for each chunk (or shard), in row-major order, which says that the store lacked it
        then; empty if it had all.
    """

    array: Any
    left_out: bytes = b""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return tuple(self.array.chunks)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the array."""
        found: np.dtype[Any] = self.array.dtype
        return found

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """Read some rows.

        Raises
        ------
        FileNotFoundError
            If the store, or a chunk that it had, is missing.
        ValueError
            If the array has another shape, type or chunks than when it was opened.
        """
        import zarr
        from zarr.errors import ChunkNotFoundError

        where = f"{self.array.store_path}"
        try:
            now = zarr.open_array(self.array.store_path, mode="r")
        except Exception as error:
            message = f"{where} cannot be opened any more: {type(error).__name__}: {error}"
            raise FileNotFoundError(message) from error
        before = (self.shape, self.dtype, self.chunks)
        if (tuple(now.shape), now.dtype, tuple(now.chunks)) != before:
            message = (
                f"{where} has changed since it was opened: shape {tuple(now.shape)}, chunks "
                f"{tuple(now.chunks)} and type {now.dtype}, expected {self.shape}, {self.chunks} "
                f"and {self.dtype}"
            )
            raise ValueError(message)
        needed, free = self._touched(index) if self.left_out else ([], [])
        if free:
            found = self.array.with_config({"read_missing_chunks": True})[index]
            if gone := _missing(self.array, needed):
                message = f"{where} lacks a chunk that it had when it was opened: {gone[0]}"
                raise FileNotFoundError(message)
            return found
        # The setting belongs to an array from its opening on: `now` cannot be read instead.
        try:
            return self.array[index]
        except ChunkNotFoundError as error:
            message = f"{where} lacks a chunk that it had when it was opened: {error}"
            raise FileNotFoundError(message) from error

    def _touched(self, index: Any) -> tuple[list[str], list[str]]:
        """Name the chunks that an index may touch: those that must be there, and the others."""
        bits = np.unpackbits(np.frombuffer(self.left_out, np.uint8))
        grid, touched = _grid(self.array), _chunks_of(index, self.array)
        names: tuple[list[str], list[str]] = ([], [])
        for place in itertools.product(*touched):
            number = np.ravel_multi_index(place, grid)
            names[bits[number]].append(self.array.metadata.encode_chunk_key(place))
        return names


def watched(value: Any) -> Any:
    """Give a Zarr array so that it is looked at again at every read; anything else as it is.

    Its store is listed once.
    """
    zarr: Any = sys.modules.get("zarr")
    if zarr is None or not isinstance(value, zarr.Array) or not value.shape:
        return value
    strict = value.with_config({"read_missing_chunks": False})
    there = _stored(value)
    names = map(value.metadata.encode_chunk_key, np.ndindex(_grid(value)))
    lacks = [f"{value.store_path.path}/{name}".lstrip("/") not in there for name in names]
    return ZarrRows(strict, np.packbits(lacks).tobytes() if any(lacks) else b"")


def _stored_shape(array: Any) -> tuple[int, ...]:
    """Give the shape of what is stored under one key: a shard, or a chunk."""
    return tuple(array.shards or array.chunks)


def _grid(array: Any) -> tuple[int, ...]:
    """Give the number of chunks, or shards, along each axis."""
    stored = zip(array.shape, _stored_shape(array), strict=True)
    return tuple(-(-length // size) for length, size in stored)


def _chunks_of(index: Any, array: Any) -> list[Iterable[int]]:
    """Give for each axis the numbers of the chunks (or shards) that an index may touch."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        parts = ()
    parts += (slice(None),) * (array.ndim - len(parts))
    touched: list[Iterable[int]] = []
    for part, length, size in zip(parts, array.shape, _stored_shape(array), strict=True):
        if isinstance(part, slice):
            rows = range(length)[part]
            ends = sorted((rows[0] // size, rows[-1] // size)) if rows else (0, -1)
            touched.append(range(ends[0], ends[1] + 1))
        else:
            touched.append(np.unique(np.arange(length)[part] // size).tolist())
    return touched


def _stored(array: Any) -> set[str]:
    """List the keys of an array's store."""
    from zarr.core.sync import sync  # stores are read in Zarr's own loop

    async def names() -> set[str]:
        place = array.store_path
        return {name async for name in place.store.list_prefix(place.path)}

    return sync(names())


def _missing(array: Any, names: list[str]) -> list[str]:
    """Give those of some chunks that the store lacks now; asked for by reading a byte of each.

    Whether they exist, a store may answer from what it has listed before.
    """
    from zarr.abc.store import RangeByteRequest
    from zarr.core.sync import sync

    async def look() -> list[str]:
        first = RangeByteRequest(0, 1)
        looks = [(array.store_path / name).get(byte_range=first) for name in names]
        found = zip(names, await asyncio.gather(*looks), strict=True)
        return [name for name, byte in found if byte is None]

    return sync(look())
