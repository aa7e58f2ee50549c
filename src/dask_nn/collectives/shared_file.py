"""A file that the processes of one host map, and that nobody else can find."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dask_nn.errors import Aborted, CollectiveError

if TYPE_CHECKING:
    from dask_nn.collectives.base import Communicator
    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["SharedFile", "remove_abandoned"]

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
    """Remove shared files of gangs whose makers were killed before all had mapped them.

    Parameters
    ----------
    run_id : str
        The run, which is over; names of gangs begin with that of their run.
    """
    for path in Path(FAST_FOLDER).glob(f"{PREFIX}{run_id}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


class SharedFile:
    """Made and announced by one rank, mapped by the others, and unlinked once all have it.

    Nothing is left behind however the processes end later; see `remove_abandoned` for what was
    left before.

    Parameters
    ----------
    rendezvous : Rendezvous
        Where its path is announced.
    key : str
        Under which key.
    gang : str
        A name that this gang alone has; the file's name begins with it.
    folder : str, optional
        Where the file goes if ``/dev/shm`` is missing or too small; the system's temporary folder
        if not given.
    """

    def __init__(
        self, rendezvous: Rendezvous, *, key: str, gang: str, folder: str | None = None
    ) -> None:
        self._rendezvous = rendezvous
        self._key = key
        self._prefix = f"{PREFIX}{gang}-"
        self._folder = folder or tempfile.gettempdir()
        self._path: Path | None = None

    def make(self, size_bytes: int) -> mmap.mmap:
        """Make the file, zeroed, and announce it.

        Raises
        ------
        CollectiveError
            If there is no room for it.
        """
        handle, path = tempfile.mkstemp(
            dir=choose_folder(size_bytes, self._folder), prefix=self._prefix
        )
        self._path = Path(path)
        try:
            # Reserve the blocks: without them a full tmpfs ends the process by SIGBUS.
            os.posix_fallocate(handle, 0, size_bytes)
            memory = mmap.mmap(handle, size_bytes)
        except OSError as error:
            self.unlink()
            message = f"no room for {size_bytes} bytes of shared memory in {path}: {error}"
            raise CollectiveError(message) from error
        finally:
            os.close(handle)
        self._rendezvous.set(self._key, path.encode())
        return memory

    def map(self, size_bytes: int, communicator: Communicator) -> mmap.mmap:
        """Wait, as long as a communicator may, for the file, and map it."""
        path = communicator.await_key(self._rendezvous, self._key).decode()
        try:
            with Path(path).open("r+b") as file:
                return mmap.mmap(file.fileno(), size_bytes)
        except FileNotFoundError as error:
            message = f"its maker gave up before rank {communicator.rank} had mapped {path}"
            raise Aborted(message) from error

    def unlink(self) -> None:
        """Take the file's name away, where this rank made it; may be called twice."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
