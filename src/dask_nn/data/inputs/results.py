"""Predictions as a collection of the kind that they were made from."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import dask.array as da
import numpy as np

from dask_nn.data.inputs.bags import is_bag
from dask_nn.data.inputs.frames import is_dask_frame, is_frame
from dask_nn.data.inputs.labelled import batch_dim_of, coords_along, is_labelled, is_labelled_set
from dask_nn.data.inputs.parts import delayed_parts

__all__ = ["frame_of", "like_input"]


def like_input(predictions: Any, X: Any, *, name: str, batch_dim: str | None) -> Any:
    """Give predictions the index, coordinates or kind of what they were made from.

    Parameters
    ----------
    predictions : dask.array.Array or numpy.ndarray
        Shape (num_rows, ...). Where X is a table of Dask, the blocks are made by `frame_of`.
    X : collection
        What they were made from.
    name : str
        Of a column or array of predictions.
    batch_dim : str, optional
        The dimension of samples of an xarray object.
    """
    if is_dask_frame(X):
        return _dask_frame(predictions, X, name)
    if is_frame(X):
        return _pandas_frame(predictions, X.index, name)
    if is_labelled(X) or is_labelled_set(X):
        return _labelled(predictions, X, name, batch_dim_of(X, batch_dim))
    if isinstance(predictions, da.Array):
        if is_bag(X):
            from dask.bag import from_delayed

            return from_delayed(_blocks(predictions))
        if delayed_parts(X) is not None:
            blocks = _blocks(predictions)
            return blocks if isinstance(X, list | tuple) else blocks[0]
    return predictions


def frame_of(values: np.ndarray[Any, Any], index: Any, name: str) -> Any:
    """Make a Series of predictions, or a DataFrame where a row has more than one number.

    Parameters
    ----------
    values : ndarray
        Shape (num_rows, ...).
    index : pandas.Index
        Of the rows.
    name : str
        Of the Series; begins the names of the columns.
    """
    import pandas as pd

    if values.ndim == 1:
        return pd.Series(values, index=index, name=name)
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    columns = [f"{name}_{number}" for number in range(flat.shape[1])]
    return pd.DataFrame(flat, index=index, columns=columns)


def _blocks(predictions: da.Array) -> list[Any]:
    """Give the blocks of predictions, which are cut along the first axis alone.

    Not optimized: each of several predictions would compute what they have in common.
    """
    return list(predictions.to_delayed(optimize_graph=False).ravel())


def _dask_frame(predictions: da.Array, X: Any, name: str) -> Any:
    import dask.dataframe as dd

    meta = frame_of(_no_rows(predictions), X._meta.index, name)  # noqa: SLF001
    parts = _blocks(predictions)
    # Dask may join partitions where it reads some of the columns.
    divisions = X.divisions if len(parts) == X.npartitions else (None,) * (len(parts) + 1)
    return dd.from_delayed(parts, meta=meta, divisions=divisions)


def _pandas_frame(predictions: Any, index: Any, name: str) -> Any:
    if not isinstance(predictions, da.Array):
        return frame_of(predictions, index, name)
    # Made together with other arrays, of Dask.
    import dask.dataframe as dd
    from dask.delayed import delayed

    join = delayed(frame_of, pure=True)
    bounds = pairwise(accumulate(predictions.chunks[0], initial=0))
    parts = [
        join(block, index[start:stop], name)
        for block, (start, stop) in zip(_blocks(predictions), bounds, strict=True)
    ]
    meta = frame_of(_no_rows(predictions), index[:0], name)
    return dd.from_delayed(parts, meta=meta)


def _no_rows(predictions: da.Array) -> np.ndarray[Any, Any]:
    return np.empty((0, *predictions.shape[1:]), predictions.dtype)


def _labelled(predictions: Any, X: Any, name: str, batch_dim: str) -> Any:
    import xarray as xr

    extra = [f"{name}_{axis}" for axis in range(1, predictions.ndim)]
    coords = coords_along(X, batch_dim)
    return xr.DataArray(predictions, dims=[batch_dim, *extra], coords=coords, name=name)
