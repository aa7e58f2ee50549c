"""Ranks that are processes of one host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_nn.collectives.shared_file import SharedFile
from dask_nn.collectives.slots import SlotCommunicator

if TYPE_CHECKING:
    import mmap

    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["SharedMemoryCommunicator"]

KEY = "shared-memory"


class SharedMemoryCommunicator(SlotCommunicator):
    """The exchange through a file that all ranks of one host map.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event, slice_above_bytes
        See :class:`~dask_nn.collectives.slots.SlotCommunicator`.
    rendezvous, gang, folder
        See :class:`~dask_nn.collectives.shared_file.SharedFile`.
    """

    name = "shared_memory"

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        rendezvous: Rendezvous,
        gang: str = "gang",
        folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rank, world_size, **options)
        self._file = SharedFile(rendezvous, key=KEY, gang=gang, folder=folder)

    def map_memory(self, size_bytes: int) -> mmap.mmap:
        """Make and announce the file (rank 0), or map the one that was announced."""
        return self._file.make(size_bytes) if not self.rank else self._file.map(size_bytes, self)

    def memory_mapped(self) -> None:
        """Unlink the file: all ranks have mapped it."""
        self._file.unlink()

    def close(self) -> None:
        """Drop the memory, and the file's name where the gang never became whole."""
        self._file.unlink()
        super().close()
