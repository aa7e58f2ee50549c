"""Files of checkpoints on any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dask_nn.checkpoints.whole_file import whole_file
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["REMOVED", "Storage"]

# Begins the names of folders that are about to vanish.
REMOVED = ".removed."


class Storage:
    """A folder of checkpoints.

    On a local (or mounted) file system every file, and every folder of files, is written aside,
    synchronised to disk and renamed; object stores make a file appear whole or not at all by
    themselves.

    Parameters
    ----------
    url : str
        The folder.

    Raises
    ------
    CheckpointError
        If the URL's kind is not known or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            message = f"checkpoints cannot be written to {url}: {error}"
            raise CheckpointError(message) from error
        self._is_local = isinstance(self._fs, LocalFileSystem)

    @property
    def renames(self) -> bool:
        """Whether folders are written under another name and renamed."""
        return self._is_local

    def path(self, *parts: str) -> str:
        """Give the path of something below the folder, for humans."""
        return posixpath.join(self.url.rstrip("/"), *parts)

    def folders(self) -> list[str]:
        """Give the names of the folders below, sorted; none if there is nothing yet."""
        self._fs.invalidate_cache()
        try:
            entries: Iterable[dict[str, Any]] = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        names = (posixpath.basename(entry["name"].rstrip("/")) for entry in entries)
        return sorted(name for name in names if name)

    def read(self, folder: str, name: str) -> bytes:
        """Read a whole file.

        Raises
        ------
        OSError
            If it is missing or cannot be read.
        """
        data: bytes = self._fs.cat_file(self._join(folder, name))
        return data

    def exists(self, folder: str, name: str) -> bool:
        """Tell whether there is such a file."""
        return bool(self._fs.exists(self._join(folder, name)))

    def size(self, folder: str, name: str) -> int | None:
        """Give the bytes of a file; None if it is missing."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.size(self._join(folder, name)))
        except FileNotFoundError:
            return None

    def changed(self, folder: str, name: str | None = None) -> float | None:
        """Give when a file, or anything in a folder, last changed, by the storage's own clock.

        None where there is nothing, or where the file system does not tell.
        """
        try:
            if name is not None or self._is_local:
                path = self._root_of(folder) if name is None else self._join(folder, name)
                return float(self._fs.modified(path).timestamp())
            files: Iterable[str] = self._fs.find(self._root_of(folder))
            return max(float(self._fs.modified(path).timestamp()) for path in files)
        except Exception:  # each file system has errors of its own, and some know no times
            return None

    def write(self, folder: str, name: str, data: bytes) -> None:
        """Write a file that is whole or absent, into a folder of `begin`, or beside all of them.

        Raises
        ------
        OSError
            If that fails, or somebody removed the folder; what was there before stays.
        """
        target = self._join(folder, name)
        if not folder:
            self._fs.makedirs(self._root, exist_ok=True)
        if not self._is_local:
            self._fs.pipe_file(target, data)
            return
        with whole_file(target) as file:
            file.write(data)
        _sync_folder(Path(target).parent)

    def begin(self, folder: str, writer: str) -> str:
        """Make the folder under whose name another is written until it is whole; give that name.

        Object stores have no folders that could be made or renamed: there it is written in place.

        Parameters
        ----------
        folder : str
            What it will be.
        writer : str
            Becomes part of the name, for whoever clears up after writers that died.
        """
        if not self._is_local:
            return folder
        written = f".{folder}.{writer}.{uuid.uuid4().hex[:8]}"
        self._fs.makedirs(self._root, exist_ok=True)
        Path(self._root_of(written)).mkdir()
        return written

    def commit(self, written: str, folder: str) -> None:
        """Give a folder that is whole its own name.

        Raises
        ------
        FileExistsError
            If there is such a folder.
        """
        if written == folder:
            return
        target = Path(self._root_of(folder))
        if target.exists():
            raise FileExistsError(target)
        try:
            Path(self._root_of(written)).rename(target)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                raise FileExistsError(target) from error
            raise
        _sync_folder(target.parent)

    def remove(self, folder: str, name: str | None = None) -> None:
        """Remove a file or a whole folder, if it is there."""
        target = self._root_of(folder) if name is None else self._join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if name is None and self._is_local and not folder.startswith(REMOVED):
                # At once: who may still be writing into it must not end with half of it.
                aside = self._root_of(f"{REMOVED}{uuid.uuid4().hex[:8]}")
                Path(target).rename(aside)
                target = aside
            self._fs.rm(target, recursive=name is None)

    def _root_of(self, folder: str) -> str:
        return posixpath.join(self._root, folder) if folder else self._root

    def _join(self, folder: str, name: str) -> str:
        return posixpath.join(self._root_of(folder), name)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
