"""Data that is named on the command line: read from URLs, written to them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from dask_nn.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_target",
    "discard",
    "is_url",
    "rows_of_known_length",
    "select",
    "select_features",
    "write",
]

# What was begun is removed within this time, however often tasks go on to write to it.
REMOVE_S, PAUSE_S = 5.0, 0.1
ABSENT_TIMES = 3
WRITABLE = ("zarr", "parquet", "npy")


def select(
    url: str, *, x: Any = None, y: Any = None, sample_weight: Any = None
) -> tuple[Any, Any, Any]:
    """Open a data URL and choose inputs, targets and weights.

    Parameters
    ----------
    url : str
        As for :func:`dask_nn.open_data`.
    x, y, sample_weight : str or list of str, optional
        Arrays or columns of it, or URLs of their own. Without `x` everything else is X.

    Returns
    -------
    tuple
        X, y and weights; None for those not asked for.

    Raises
    ------
    ConfigurationError, DataError
        If there is no such data, or no such name in it.
    """
    from dask_nn.data.inputs.frames import is_frame
    from dask_nn.data.urls import open_data

    data = open_data(url)
    others = {"y": y, "sample_weight": sample_weight}
    given = {key: open_data(value) if is_url(value) else value for key, value in others.items()}
    named = {
        name
        for value in given.values()
        if isinstance(value, str | list)
        for name in ([value] if isinstance(value, str) else value)
    }
    if isinstance(data, dict):
        found = {
            key: _member(data, value, key, url) if isinstance(value, str | list) else value
            for key, value in given.items()
        }
        rest = [name for name in data if name not in named]
        wanted = x if x is not None else (rest[0] if len(rest) == 1 else rest)
        return _member(data, wanted, "x", url), found["y"], found["sample_weight"]
    if not is_frame(data):
        if x is not None or named:
            text = f"{url} is one array; x, y and sample_weight name members of a group or table"
            raise ConfigurationError(text)
        return data, given["y"], given["sample_weight"]
    rest = [name for name in data.columns if name not in named]
    features = rest if x is None else [x] if isinstance(x, str) else x
    picked = {
        key: _columns(data, value, key, url) if isinstance(value, str | list) else value
        for key, value in given.items()
    }
    return _columns(data, features, "x", url), picked["y"], picked["sample_weight"]


def select_features(url: str, *, x: Any = None, without: Sequence[Any] = ()) -> Any:
    """Open a data URL and choose inputs alone.

    Parameters
    ----------
    url : str
        As for :func:`dask_nn.open_data`.
    x : str or list of str, optional
        Arrays or columns of it. A single array is x, whatever x is called elsewhere.
    without : sequence
        Names, or lists of them, of what is none of the inputs, should it be there.
    """
    from dask_nn.data.inputs.frames import is_frame
    from dask_nn.data.urls import open_data

    data = open_data(url)
    if not isinstance(data, dict) and not is_frame(data):
        if isinstance(x, list) and len(x) > 1:
            raise ConfigurationError(f"{url} is one array, but x names {', '.join(x)}")
        return data
    if x is None:
        left_out = {
            name
            for value in without
            if not is_url(value) and value is not None
            for name in ([value] if isinstance(value, str) else value)
        }
        names = list(data.columns) if is_frame(data) else list(data)
        x = [name for name in names if name not in left_out]
        if not is_frame(data) and len(x) == 1:
            (x,) = x
    if is_frame(data):
        return _columns(data, [x] if isinstance(x, str) else x, "x", url)
    return _member(data, x, "x", url)


def is_url(value: Any) -> bool:
    """Tell whether something is a data URL, and not the name of an array or column."""
    from dask_nn.data.urls import FORMATS

    return isinstance(value, str) and value.split(":", 1)[0] in FORMATS and ":" in value


def check_target(url: str) -> tuple[str, str]:
    """Check that predictions can be written to a URL, and give its format and place.

    Raises
    ------
    ConfigurationError
        If the format cannot be written, its folder does not exist, or something is there already.
    """
    from dask_nn.data.urls import FORMATS, split_url

    if url.split(":", 1)[0] not in FORMATS:
        url = f"npy:{url}"
    kind, place, _ = split_url(url)
    if kind not in WRITABLE:
        expected = ", ".join(f"{known}:" for known in WRITABLE)
        raise ConfigurationError(f"{url}: predictions can be written to {expected}, not to {kind}:")
    if kind == "npy" and "://" in place:
        raise ConfigurationError(f"{url}: a .npy file is written to a path, not to a URL")
    if "://" not in place:
        path = Path(place)
        if not path.parent.is_dir():
            raise DataError(f"{place}: its folder does not exist, expected one to write to")
        if kind == "npy" and path.is_dir():
            raise DataError(f"{place}: is a directory, expected a file to write")
    if kind != "npy" and _exists(place):
        raise DataError(f"{place} exists already; remove it, or choose another place")
    return kind, place


def _exists(place: str) -> bool:
    try:
        system, path = url_to_fs(place)
        return bool(system.exists(path))
    except Exception as error:
        message = f"{place}: it cannot be told whether something is there: {error}"
        raise DataError(message) from error


def write(predictions: Any, kind: str, place: str) -> None:
    """Write predictions block by block: they are never in one memory, but for npy.

    Parameters
    ----------
    predictions : dask.array.Array, numpy.ndarray, dask.dataframe collection, or dict of them
        Lazy or not; of a dictionary Zarr gets one array each, and Parquet columns.
    kind, place : str
        From `check_target`.

    Raises
    ------
    DataError
        If that fails; what was begun is removed.
    """
    try:
        _WRITERS[kind](predictions, place)
    except ConfigurationError:
        raise
    except BaseException as error:
        if kind != "npy":
            discard(place)  # nothing was there before: `check_target` made sure of it
        if not isinstance(error, Exception):
            raise  # Ctrl-C
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"{place}: cannot be written: {reason}") from error


def discard(place: str) -> None:
    """Remove what was written; tasks that are still at it may write some more meanwhile."""
    deadline = time.monotonic() + REMOVE_S
    absent = 0
    while absent < ABSENT_TIMES and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            system, path = url_to_fs(place)
            if system.exists(path):
                absent = 0
                system.rm(path, recursive=True)
            else:
                absent += 1
        time.sleep(PAUSE_S)


def _write_zarr(predictions: Any, place: str) -> None:
    import dask

    if not isinstance(predictions, dict):
        _as_zarr_array(predictions).to_zarr(place)
        return
    # Together: the model runs once for all outputs.
    dask.compute(
        *(
            _as_zarr_array(part).to_zarr(place, component=str(name), compute=False)
            for name, part in predictions.items()
        )
    )


def rows_of_known_length(X: Any) -> Any:
    """Give a Dask table as an array whose blocks have known lengths; anything else as it is.

    Zarr has to know where each block goes. The table is read once more for it, which takes less
    than to run the model twice.
    """
    from dask_nn.data.inputs.frames import is_dask_frame
    from dask_nn.data.inputs.read import read_inputs

    if not is_dask_frame(X):
        return X
    return read_inputs(X, needs_target=False)["X"].compute_chunk_sizes()


def _as_zarr_array(predictions: Any) -> Any:
    """Give an array whose chunks are of one length, as those of Zarr are."""
    import dask.array as da

    if not isinstance(predictions, da.Array):
        predictions = da.from_array(predictions)
    chunks = predictions.chunks[0]
    if len(set(chunks[:-1])) > 1 or chunks[-1] > chunks[0]:
        # Only neighbours are joined or cut for it.
        predictions = predictions.rechunk({0: max(chunks)}, method="tasks")
    return predictions


def _write_parquet(predictions: Any, place: str) -> None:
    import dask.dataframe as dd

    from dask_nn.data.inputs.frames import is_dask_frame

    single = not isinstance(predictions, dict)
    named = {"prediction": predictions} if single else predictions
    indexed = all(map(is_dask_frame, named.values()))
    frames = []
    for name, part in named.items():
        if not indexed:
            frames.append(_as_frame(part, str(name)))
        elif part.ndim == 1:
            frames.append(part.to_frame(str(name)))
        else:
            prefix = "" if single else f"{name}_"
            frames.append(part.rename(columns={c: f"{prefix}{c}" for c in part.columns}))
    # Partitions of the same rows, one for one.
    table = frames[0] if single else dd.concat(frames, axis=1)
    table.to_parquet(place, write_index=indexed)


def _as_frame(predictions: Any, name: str) -> Any:
    import dask.array as da
    import dask.dataframe as dd

    if not isinstance(predictions, da.Array):
        predictions = da.from_array(predictions)
    flat = predictions.reshape(len(predictions), -1) if predictions.ndim > 2 else predictions
    if flat.ndim == 1:
        return dd.from_dask_array(flat, columns=name).to_frame()
    return dd.from_dask_array(flat, columns=[f"{name}_{n}" for n in range(flat.shape[1])])


def _write_npy(predictions: Any, place: str) -> None:
    import numpy as np

    from dask_nn.checkpoints.whole_file import whole_file

    if isinstance(predictions, dict):
        listed = ", ".join(map(str, predictions))
        text = f"a .npy file holds one array, but the model gives {listed}; use zarr: or parquet:"
        raise ConfigurationError(text)
    computed = predictions.compute() if hasattr(predictions, "compute") else predictions
    with whole_file(Path(place)) as file:
        # Not np.save: a full disk would be "100 requested and 7 written".
        np.lib.format.write_array(_Plain(file), np.asarray(computed), allow_pickle=False)


class _Plain:
    """A file of which NumPy does not know that it is one, so that errors are the system's own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


_WRITERS = {"zarr": _write_zarr, "parquet": _write_parquet, "npy": _write_npy}


def _member(data: dict[str, Any], wanted: Any, key: str, url: str) -> Any:
    from dask_nn.data.inputs.frames import nearest

    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in data:
            raise DataError(f"{url}: {key}: {nearest(name, sorted(data), kind='array')}")
    if isinstance(wanted, str):
        return data[wanted]
    return {name: data[name] for name in names}


def _columns(data: Any, wanted: Any, key: str, url: str) -> Any:
    from dask_nn.data.inputs.frames import nearest

    columns = list(data.columns)
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in columns:
            raise DataError(f"{url}: {key}: {nearest(name, columns)}")
    return data[wanted]
