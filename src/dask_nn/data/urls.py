"""Data named by a URL: Zarr, Parquet, HDF5 and NumPy files, opened lazily."""

from __future__ import annotations

import glob
import importlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import dask.array as da
import numpy as np

from dask_nn.data.inputs.frames import nearest
from dask_nn.data.zarr_rows import watched
from dask_nn.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FORMATS", "open_data", "split_url"]

# Files without chunks of their own are read in blocks of about this size.
BLOCK_BYTES = 8 << 20
_EXTRAS = {"zarr": "zarr", "parquet": "dataframe", "hdf5": "hdf5"}
_PACKAGES = {"zarr": ("zarr",), "parquet": ("pandas", "pyarrow"), "hdf5": ("h5py",)}


def open_data(url: str, *, block_size_bytes: int = BLOCK_BYTES) -> Any:
    """Open stored data as a lazy Dask collection; nothing but its description is read.

    Parameters
    ----------
    url : str
        ``zarr:PLACE``, ``parquet:PLACE``, ``hdf5:FILE`` or ``npy:FILE``, with a path, or for Zarr
        and Parquet any URL that fsspec knows, such as ``zarr:s3://bucket/data.zarr``. Parquet and
        npy take patterns with ``*``. ``#NAME`` at the end names one array of a Zarr group or an
        HDF5 file.
    block_size_bytes : int
        Target size of the blocks of HDF5 and npy files.

    Returns
    -------
    dask.array.Array, dict of str to Array, or dask.dataframe.DataFrame
        A group or a file of several arrays is a dictionary of them. Every worker must be able
        to read the same place.

    Raises
    ------
    ConfigurationError
        If the format is not known, or its package is not installed.
    DataError
        If there is nothing at that place, or it cannot be read.
    """
    kind, place, name = split_url(url)
    for package in _PACKAGES.get(kind, ()):
        try:
            importlib.import_module(package)
        except ImportError as error:
            message = (
                f"{url}: reading {kind} needs the package {package}; install it with "
                f"pip install 'dask-nn[{_EXTRAS[kind]}]'"
            )
            raise ConfigurationError(message) from error
    try:
        return FORMATS[kind](place, name, block_size_bytes)
    except DataError as error:
        message = f"{url}: {error}"
        raise DataError(message) from error
    except Exception as error:  # each format has errors of its own
        message = f"{url} cannot be read: {type(error).__name__}: {error}"
        raise DataError(message) from error


def split_url(url: str) -> tuple[str, str, str | None]:
    """Split a data URL into format, place and name; paths become absolute.

    Raises
    ------
    ConfigurationError
        If it is none.
    """
    kind, colon, rest = str(url).partition(":")
    if not colon or kind not in FORMATS:
        expected = ", ".join(f"{known}:" for known in FORMATS)
        message = f"{url!r} is no data URL; it must begin with one of {expected}"
        raise ConfigurationError(message)
    place, _, name = rest.partition("#")
    if not place:
        message = f"{url!r} names no place: expected {kind}:PATH"
        raise ConfigurationError(message)
    if "://" not in place:  # workers may run in another folder
        place = str(Path(place).expanduser().absolute())
    return kind, place, name or None


@dataclass(frozen=True)
class _Hdf5Rows:
    """One dataset of an HDF5 file, opened anew for every read: open files do not travel."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        import h5py

        with h5py.File(self.path, "r") as file:
            dataset = file[self.name]
            _check_unchanged(f"{self.path}#{self.name}", dataset, self)
            found: np.ndarray[Any, Any] = dataset[index]
            return found


@dataclass(frozen=True)
class _NpyRows:
    """A NumPy file, of which only the wanted rows are read."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        # Header and rows come from one opening: the file may be replaced at any moment, and
        # np.load would open it twice.
        with Path(self.path).open("rb") as file:
            header = _NpyHeader.read(file)
            _check_unchanged(self.path, header, self)
            try:
                rows = header.map(file)
            except ValueError as error:
                message = f"{self.path} has fewer rows than its header says: {error}"
                raise ValueError(message) from error
            return np.array(rows[index])


class _NpyHeader(NamedTuple):
    shape: tuple[int, ...]
    column_major: bool
    dtype: np.dtype[Any]

    @classmethod
    def read(cls, file: BinaryIO) -> _NpyHeader:
        version = np.lib.format.read_magic(file)
        first = version == (1, 0)
        layout = np.lib.format
        read = layout.read_array_header_1_0 if first else layout.read_array_header_2_0
        return cls(*read(file))

    def map(self, file: BinaryIO) -> np.ndarray[Any, Any]:
        """Map the rows that follow the header just read."""
        order: Literal["F", "C"] = "F" if self.column_major else "C"
        return np.memmap(file, self.dtype, "r", file.tell(), self.shape, order)


def _check_unchanged(where: str, now: Any, before: Any) -> None:
    if (now.shape, now.dtype) != (before.shape, before.dtype):
        message = (
            f"{where} has changed since it was opened: shape {now.shape} and type {now.dtype}, "
            f"expected {before.shape} and {before.dtype}"
        )
        raise ValueError(message)


def _open_zarr(place: str, name: str | None, _: int) -> Any:
    import zarr

    if "://" not in place and not Path(place).exists():
        message = "there is no such folder"
        raise DataError(message)
    node = zarr.open(place, mode="r")
    if isinstance(node, zarr.Array):
        return _of_zarr(node)
    return _chosen(dict(node.arrays()), name, _of_zarr)


def _of_zarr(array: Any) -> Any:
    return da.from_array(
        watched(array),
        chunks=array.chunks,
        name=f"dask-nn-zarr-{uuid.uuid4().hex}",
        meta=np.empty((0,) * array.ndim, array.dtype),
    )


def _open_hdf5(place: str, name: str | None, block_size_bytes: int) -> Any:
    import h5py

    found: dict[str, _Hdf5Rows] = {}
    with h5py.File(place, "r") as file:

        def visit(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.shape:
                found[key] = _Hdf5Rows(place, key, item.shape, item.dtype)

        file.visititems(visit)
    return _chosen(found, name, lambda rows: _in_blocks(rows, block_size_bytes))


def _open_npy(place: str, _: str | None, block_size_bytes: int) -> Any:
    paths = sorted(glob.glob(place)) if "*" in place else [place]  # noqa: PTH207 - a pattern
    if not paths:
        message = "no file fits the pattern"
        raise DataError(message)
    rows = []
    for path in paths:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
        rows.append(_NpyRows(path, header.shape, header.dtype))
        first = rows[0]
        if (rows[-1].shape[1:], rows[-1].dtype) != (first.shape[1:], first.dtype):
            message = (
                f"{path} holds rows of shape {header.shape[1:]} and type {header.dtype}, expected "
                f"{first.shape[1:]} and {first.dtype} as in {first.path}"
            )
            raise DataError(message)
    arrays = [_in_blocks(one, block_size_bytes) for one in rows]
    return da.concatenate(arrays)


def _open_parquet(place: str, _: str | None, __: int) -> Any:
    import dask.dataframe as dd

    if "://" not in place and not glob.glob(place):  # noqa: PTH207 - a pattern
        message = "there is no such file"
        raise DataError(message)
    return dd.read_parquet(place)


def _in_blocks(rows: Any, block_size_bytes: int) -> Any:
    if not rows.shape:
        message = "it holds a single number, expected an array of rows"
        raise DataError(message)
    row_bytes = max(1, int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize)
    length = max(1, block_size_bytes // row_bytes)
    return da.from_array(
        rows,
        chunks=(length, *rows.shape[1:]),
        name=f"dask-nn-{type(rows).__name__.strip('_').lower()}-{uuid.uuid4().hex}",
        meta=np.empty((0,) * rows.ndim, rows.dtype),
    )


def _chosen(arrays: dict[str, Any], name: str | None, make: Callable[[Any], Any]) -> Any:
    """Make one array, or all of them."""
    if not arrays:
        message = "there are no arrays"
        raise DataError(message)
    if name is None:
        return {key: make(array) for key, array in arrays.items()}
    if name not in arrays:
        raise DataError(nearest(name, _names(arrays), kind="array"))
    return make(arrays[name])


def _names(arrays: dict[str, Any]) -> Sequence[str]:
    return sorted(arrays)


FORMATS: dict[str, Callable[[str, str | None, int], Any]] = {
    "zarr": _open_zarr,
    "parquet": _open_parquet,
    "hdf5": _open_hdf5,
    "npy": _open_npy,
}
