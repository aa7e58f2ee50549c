"""Zarr arrays that say so when their store is gone, instead of giving the fill value.

A chunk that is missing from a Zarr store reads as the fill value, because stores leave out chunks
that hold nothing else. A store that was deleted or cut shorter therefore reads as zeros.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ZarrRows", "watched"]


@dataclass(frozen=True)
class ZarrRows:
    """One array of a store, looked at again at every read.

    Parameters
    ----------
    array : zarr.Array
        As it was when it was opened.
    complete : bool
        Whether every chunk was in the store then, so that none may be missing later.
    """

    array: Any
    complete: bool

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
        # The setting belongs to an array from its opening on: `now` cannot be read instead.
        try:
            return self.array[index]
        except ChunkNotFoundError as error:
            message = f"{where} lacks a chunk that it had when it was opened: {error}"
            raise FileNotFoundError(message) from error


def watched(value: Any) -> Any:
    """Give a Zarr array so that it is looked at again at every read; anything else as it is."""
    zarr: Any = sys.modules.get("zarr")
    if zarr is None or not isinstance(value, zarr.Array) or not value.shape:
        return value
    complete = int(value.nchunks_initialized) == int(value.nchunks)
    strict = value.with_config({"read_missing_chunks": False}) if complete else value
    return ZarrRows(strict, complete)
