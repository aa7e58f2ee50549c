"""Predictions as a collection of the kind that they were made from."""

from __future__ import annotations

import math
import sys
from typing import Any

import dask.array as da
import numpy as np

from dask_nn.data.inputs.frames import is_dask_frame, is_frame
from dask_nn.data.inputs.labelled import batch_dim_of, is_labelled, is_labelled_set
from dask_nn.data.inputs.parts import delayed_parts

__all__ = ["like_input"]


def like_input(predictions: Any, X: Any, *, name: str, batch_dim: str | None) -> Any:
    """Give predictions the index, coordinates or kind of what they were made from.

    Parameters
    ----------
    predictions : dask.array.Array or numpy.ndarray
        Shape (num_rows, ...).
    X : collection
        What they were made from.
    name : str
        Of a column or array of predictions.
    batch_dim : str, optional
        The dimension of samples of an xarray object.
    """
    if is_frame(X):
        return (
            _dask_frame(predictions, X, name)
            if is_dask_frame(X)
            else _frame(predictions, X.index, name)
        )
    if is_labelled(X) or is_labelled_set(X):
        return _labelled(predictions, X, name, batch_dim_of(X, batch_dim))
    if isinstance(predictions, da.Array):
        bag = sys.modules.get("dask.bag")
        if bag is not None and isinstance(X, bag.Bag):
            return bag.from_delayed(_blocks(predictions))
        if delayed_parts(X) is not None:
            blocks = _blocks(predictions)
            return blocks if isinstance(X, list | tuple) else blocks[0]
    return predictions


def _blocks(predictions: da.Array) -> list[Any]:
    """Give the blocks of predictions, which are cut along the first axis alone."""
    return list(predictions.to_delayed().ravel())


def _frame(values: np.ndarray[Any, Any], index: Any, name: str) -> Any:
    import pandas as pd

    if values.ndim == 1:
        return pd.Series(values, index=index, name=name)
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    columns = [f"{name}_{number}" for number in range(flat.shape[1])]
    return pd.DataFrame(flat, index=index, columns=columns)


def _dask_frame(predictions: da.Array, X: Any, name: str) -> Any:
    import dask.dataframe as dd
    from dask.delayed import delayed

    meta = _frame(np.empty((0, *predictions.shape[1:]), predictions.dtype), X._meta.index, name)  # noqa: SLF001
    join = delayed(_frame, pure=True)
    indexes = X.index.to_delayed()
    blocks = _blocks(predictions)
    parts = [join(block, index, name) for block, index in zip(blocks, indexes, strict=True)]
    return dd.from_delayed(parts, meta=meta, divisions=X.divisions, verify_meta=False)


def _labelled(predictions: Any, X: Any, name: str, batch_dim: str) -> Any:
    import xarray as xr

    extra = [f"{name}_{axis}" for axis in range(1, predictions.ndim)]
    coords = {key: value for key, value in X.coords.items() if value.dims == (batch_dim,)}
    return xr.DataArray(predictions, dims=[batch_dim, *extra], coords=coords, name=name)
