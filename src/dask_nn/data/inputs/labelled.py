"""Arrays with named dimensions, as xarray has them."""

from __future__ import annotations

import sys
from typing import Any

from dask_nn.data.inputs.frames import nearest
from dask_nn.errors import DataError

__all__ = ["batch_dim_of", "coords_along", "is_labelled", "is_labelled_set", "rows_first"]


def is_labelled(value: Any) -> bool:
    """Tell whether something is a DataArray, or a Variable."""
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(value, xarray.DataArray | xarray.Variable)


def is_labelled_set(value: Any) -> bool:
    """Tell whether something is a Dataset of xarray."""
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(value, xarray.Dataset)


def batch_dim_of(value: Any, batch_dim: str | None) -> str:
    """Give the dimension whose entries are samples: the named one, else the first."""
    if batch_dim is None:
        if is_labelled_set(value):
            value = next(iter(value.data_vars.values()))
        if not value.dims:
            message = "an array without dimensions has no samples"
            raise DataError(message)
        return str(value.dims[0])
    if batch_dim not in value.dims:
        message = f"batch_dim: {nearest(batch_dim, list(value.dims), kind='dimension')}"
        raise DataError(message)
    return batch_dim


def coords_along(value: Any, batch_dim: str) -> Any:
    """Give the coordinates of samples, and those that have no dimension, with their indexes.

    Coordinates along other dimensions are left out: what is made of the samples lacks those.
    """
    if not hasattr(value, "coords"):  # a Variable
        return {}
    coords = value.coords.to_dataset()
    return coords.drop_dims([dim for dim in coords.dims if dim != batch_dim]).coords


def rows_first(value: Any, batch_dim: str, name: str) -> Any:
    """Give the array inside, samples along its first axis.

    Parameters
    ----------
    value : xarray.DataArray or xarray.Variable
        Of NumPy or Dask.
    batch_dim : str
        The dimension of samples.
    name : str
        How errors call it.
    """
    if batch_dim not in value.dims:
        message = (
            f"{name} has no dimension {batch_dim!r} along which samples lie; its dimensions are "
            f"{', '.join(map(str, value.dims))}"
        )
        raise DataError(message)
    return value.transpose(batch_dim, ...).data
