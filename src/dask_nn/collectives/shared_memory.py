"""Ranks that are processes of one host."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dask_nn.collectives.slots import SlotCommunicator
from dask_nn.errors import Aborted, CollectiveError

if TYPE_CHECKING:
    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["SharedMemoryCommunicator", "remove_abandoned"]

KEY = "shared-memory"
PREFIX = "dask-nn-"
FAST_FOLDER = "/dev/shm"  # noqa: S108  (the kernel's shared memory; the file gets a private name)
# tmpfs of this host may also be wanted by others: leave some of it free.
SPARE_BYTES = 8 << 20


def choose_folder(size_bytes: int, fallback: str) -> str:
    """Give the folder for a shared file: memory where it fits, else the worker's own disk."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(FAST_FOLDER).free > size_bytes + SPARE_BYTES:
            return FAST_FOLDER
    return fallback


def remove_abandoned(run_id: str) -> None:
    """Remove shared files of gangs whose rank 0 was killed before all had mapped them.

    Parameters
    ----------
    run_id : str
        The run, which is over; names of gangs begin with that of their run.
    """
    for path in Path(FAST_FOLDER).glob(f"{PREFIX}{run_id}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


class SharedMemoryCommunicator(SlotCommunicator):
    """The exchange through a file that all ranks of one host map.

    Rank 0 makes the file and unlinks it as soon as everybody has mapped it, so that nothing is
    left behind however the processes end later; see `remove_abandoned` for what was left before.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event, slice_above_bytes
        See :class:`~dask_nn.collectives.slots.SlotCommunicator`.
    rendezvous : Rendezvous
        Where rank 0 announces the file.
    gang : str
        A name that this gang alone has; the file's name begins with it.
    folder : str
        Where the file goes if ``/dev/shm`` is missing or too small; the system's temporary
        folder if not given.
    """

    name: ClassVar[str] = "shared_memory"

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
        self._rendezvous = rendezvous
        self._prefix = f"{PREFIX}{gang}-"
        self._folder = folder or tempfile.gettempdir()
        self._path: Path | None = None

    def map_memory(self, size_bytes: int) -> mmap.mmap:
        """Make and announce the file (rank 0), or map the one that was announced."""
        if self.rank == 0:
            handle, path = tempfile.mkstemp(
                dir=choose_folder(size_bytes, self._folder), prefix=self._prefix
            )
            self._path = Path(path)
            try:
                # Reserve the blocks: without them a full tmpfs ends the process by SIGBUS.
                os.posix_fallocate(handle, 0, size_bytes)
                memory = mmap.mmap(handle, size_bytes)
            except OSError as error:
                self._unlink()
                message = f"no room for {size_bytes} bytes of shared memory in {path}: {error}"
                raise CollectiveError(message) from error
            finally:
                os.close(handle)
            self._rendezvous.set(KEY, path.encode())
            return memory
        path = self.await_key(self._rendezvous, KEY).decode()
        try:
            with Path(path).open("r+b") as file:
                return mmap.mmap(file.fileno(), size_bytes)
        except FileNotFoundError as error:
            message = f"rank 0 gave up before rank {self.rank} had mapped {path}"
            raise Aborted(message) from error

    def memory_mapped(self) -> None:
        """Unlink the file: all ranks have mapped it."""
        self._unlink()

    def close(self) -> None:
        """Drop the memory, and the file's name where the gang never became whole."""
        self._unlink()
        super().close()

    def _unlink(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
