"""How ranks that know only a name find each other before they can exchange anything."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

from dask_nn.errors import CollectiveTimeout

__all__ = ["FileRendezvous", "LocalRendezvous", "Rendezvous"]

POLL_S = 0.002


class Rendezvous(ABC):
    """A small store of bytes that every rank of one gang reaches."""

    @abstractmethod
    def set(self, key: str, value: bytes) -> None:
        """Store a value; ranks that wait for the key wake up."""

    @abstractmethod
    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a key and give its value.

        Raises
        ------
        CollectiveTimeout
            If nobody set the key within ``timeout_s`` seconds.
        """


def not_found(key: str, timeout_s: float) -> CollectiveTimeout:
    """Make the error for a key that nobody set in time."""
    return CollectiveTimeout(
        f"no rank announced {key!r} within {timeout_s:g} s: a peer did not start, or lost its "
        "connection; the worker's log tells more"
    )


class LocalRendezvous(Rendezvous):
    """Ranks that are threads of one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a key and give its value."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise not_found(key, timeout_s)
            return self._values[key]


class FileRendezvous(Rendezvous):
    """Ranks that are processes of one host and share a folder.

    Parameters
    ----------
    folder : path
        An existing folder that belongs to this gang alone; the caller removes it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def set(self, key: str, value: bytes) -> None:
        """Store a value in a file of its own."""
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(value)
        Path(temporary).replace(self._path(key))

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a key's file and give its content."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._path(key).read_bytes()
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise not_found(key, timeout_s) from None
                time.sleep(POLL_S)

    def _path(self, key: str) -> Path:
        return self._folder / key.encode().hex()
