"""The IDX format of the MNIST files, read strictly.

A file is a big-endian header (two zero bytes, the type, the number of axes, then the length of
every axis as 32 bits) followed by the values, as described at
http://yann.lecun.com/exdb/mnist/. Only unsigned bytes are read here.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_images", "read_labels", "write_idx"]

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_images(path: Path) -> np.ndarray:
    """Read a file of 28x28 images, plain or compressed with gzip.

    Returns
    -------
    numpy.ndarray
        uint8, (num_images, 784), at least one image.

    Raises
    ------
    DataError
        If the file is missing, truncated, corrupt or holds something else; names the file and
        what was expected.
    """
    values = _read(path, "images", num_axes=3)
    if values.shape[1:] != (28, 28):
        message = (
            f"{path}: expected images of 28x28 pixels, got {values.shape[1]}x{values.shape[2]}"
        )
        raise DataError(message)
    return values.reshape(len(values), -1)


def read_labels(path: Path) -> np.ndarray:
    """Read a file of labels, plain or compressed with gzip.

    Returns
    -------
    numpy.ndarray
        int64 of 0 to 9, (num_labels,), at least one label.

    Raises
    ------
    DataError
        If the file is missing, truncated, corrupt or holds something else; names the file and
        what was expected.
    """
    values = _read(path, "labels", num_axes=1)
    if values.max() > 9:
        row = int(np.argmax(values > 9))
        message = f"{path}: expected labels of 0 to 9, got {values[row]} in row {row}"
        raise DataError(message)
    return values.astype(np.int64)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of unsigned bytes; gzip compresses it where the name ends in ``.gz``.

    Parameters
    ----------
    path : Path
        Destination; its folder must exist.
    values : numpy.ndarray
        uint8, of any shape.
    """
    lengths = np.array(values.shape, ">u4").tobytes()
    content = bytes((0, 0, _UNSIGNED_BYTE, values.ndim)) + lengths + values.tobytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _read(path: Path, what: str, num_axes: int) -> np.ndarray:
    content = _content(path)
    magic = bytes((0, 0, _UNSIGNED_BYTE, num_axes))
    header_bytes = 4 + 4 * num_axes
    if len(content) < header_bytes:
        message = (
            f"{path}: truncated, expected a header of {header_bytes} bytes, got {len(content)} "
            "bytes in all"
        )
        raise DataError(message)
    if content[:4] != magic:
        message = (
            f"{path}: expected an IDX file of {what} (magic number {_number(magic)}), got magic "
            f"number {_number(content[:4])}"
        )
        raise DataError(message)
    shape = tuple(_number(content[4 * axis : 4 * axis + 4]) for axis in range(1, num_axes + 1))
    size_bytes = len(content) - header_bytes
    if size_bytes != prod(shape):
        lengths = "x".join(map(str, shape))
        state = "truncated" if size_bytes < prod(shape) else "corrupt"
        message = (
            f"{path}: {state}, its header announces {lengths} {what}, expected "
            f"{header_bytes + prod(shape)} bytes, got {len(content)}"
        )
        raise DataError(message)
    if not shape[0] or not size_bytes:
        message = f"{path}: expected at least one of its {what}, got none"
        raise DataError(message)
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape).copy()


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if content[:2] == _GZIP_MAGIC:
            return gzip.decompress(content)
    except FileNotFoundError as error:
        message = f"{path}: no such file, expected an IDX file, plain or .gz"
        raise DataError(message) from error
    except EOFError as error:
        message = f"{path}: truncated, expected a whole gzip file, got {len(content)} bytes of one"
        raise DataError(message) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        message = f"{path}: corrupt, expected a valid gzip file: {error}"
        raise DataError(message) from error
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror or error}"
        raise DataError(message) from error
    if path.suffix == ".gz":
        message = f"{path}: corrupt, expected a gzip file, it begins with {content[:2].hex()!r}"
        raise DataError(message)
    return content


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big")
