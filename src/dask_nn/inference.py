"""Predictions of a network as a lazy collection of the input's kind."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import dask.array as da
import numpy as np
import torch
from torch import Tensor, nn

from dask_nn.data.inputs.read import read_inputs
from dask_nn.data.inputs.results import like_input
from dask_nn.errors import ConfigurationError, ModelError
from dask_nn.grouping import Grouping, group_of
from dask_nn.metrics.forward import (
    check_batch_size,
    count_rows,
    one_tensor,
    one_thread_per_task,
    outputs,
    probe,
    sendable,
)
from dask_nn.metrics.row_blocks import (
    aligned,
    as_array,
    check_same_rows,
    one_chunk_per_row_block,
    per_block,
    shipped,
)
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["predict"]

Output = Literal["label", "proba", "raw"]


def predict(
    model: nn.Module,
    X: Any,
    *,
    output: Output = "label",
    features: Sequence[str] | None = None,
    batch_dim: str | None = None,
    batch_size: int = 256,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Predict every row, where it lies.

    Parameters
    ----------
    model : nn.Module
        Used in evaluation mode, and left as it is. Each worker receives it once.
    X : collection, shape (num_rows, ...)
        Of any kind that :func:`dask_nn.train` takes, without targets. Floating rows are cast to
        the model's floating type.
    output : {"label", "proba", "raw"}
        ``"raw"``: the outputs as they are. ``"proba"``: their softmax over axis 1, or the sigmoid
        of a single output. ``"label"``: the index of the largest along axis 1 as int64, or 1
        where a single output is positive and 0 elsewhere; axis 1 is dropped.
    features : list of str, optional
        Columns of X that are features; all of them by default.
    batch_dim : str, optional
        The dimension of xarray objects along which rows lie; the first by default.
    batch_size : int
        Most rows that go through the model at a time.
    transform : callable, optional
        Picklable; applied to the tensor of a batch, for example to scale stored bytes.

    Returns
    -------
    collection
        Of X's kind, shape (num_rows, ...), lazy where X is: for a Dask array one with the same
        row chunks; for a table a Series or DataFrame with the same index; for an xarray object a
        DataArray with the coordinates of its rows; for Delayed a list of them; for a Bag a Bag of
        one prediction for each row; for a torch dataset a Dask array; else a NumPy array. Nothing
        is computed before but the outputs for two rows of zeros, and the first of Delayed parts.

    Raises
    ------
    ConfigurationError
        For a bad option.
    DataError
        If X holds no numbers.
    ModelError
        If the model cannot be pickled or cannot process rows of X.
    """
    if output not in _FINISH:
        valid = ", ".join(map(repr, _FINISH))
        raise ConfigurationError(f"output must be one of {valid}, got {output!r}")
    check_batch_size(batch_size)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = read_inputs(X, features=features, batch_dim=batch_dim, needs_target=False)
    inputs = {name: as_array(name, value) for name, value in found.items() if group_of(name) == "X"}
    predictions = _predict_arrays(
        model, inputs, output=output, batch_size=batch_size, transform=transform
    )
    return like_input(predictions, X, name=output, batch_dim=batch_dim)


def _predict_arrays(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    output: Output,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> Any:
    grouping = Grouping.of(list(inputs))
    rows = list(inputs.values())
    if not any(isinstance(array, da.Array) for array in rows):
        check_same_rows(rows)
        X = grouping.inputs(rows)
        like = _like(model, X, output, transform)
        return _predict_rows(X, [model, transform], output=output, batch_size=batch_size, like=like)
    rows = [one_chunk_per_row_block("X", rows[0])] if len(inputs) == 1 else aligned(inputs)
    payload, sent = sendable(model)
    objects = shipped(payload, dumps(transform, "transform"))
    like = _like(sent, grouping.inputs(rows), output, transform)
    return per_block(
        partial(
            _predict_block, grouping=grouping, output=output, batch_size=int(batch_size), like=like
        ),
        *rows,
        row_shape=like.shape[1:],
        meta=like,
        name="dask-nn-predict",
        objects=objects,
    )


def _like(
    model: nn.Module, X: Any, output: Output, transform: Callable[[Tensor], Tensor] | None
) -> np.ndarray[Any, Any]:
    """Find what a prediction of no rows looks like."""
    probed = _FINISH[output](one_tensor(probe(model, X, transform=transform)))
    return _to_numpy(probed)[:0]


def _predict_block(
    *rows_and_objects: Any, grouping: Grouping, **options: Any
) -> np.ndarray[Any, Any]:
    *rows, objects = rows_and_objects
    check_same_rows(rows)
    with one_thread_per_task():
        return _predict_rows(grouping.inputs(rows), objects, **options)


def _predict_rows(
    X: Any,
    objects: list[Any],
    *,
    output: Output,
    batch_size: int,
    like: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    model, transform = objects
    found = np.empty((count_rows(X), *like.shape[1:]), dtype=like.dtype)
    for rows, raw in outputs(model, X, batch_size=batch_size, transform=transform):
        with torch.inference_mode():
            finished = _to_numpy(_FINISH[output](one_tensor(raw)))
        if finished.shape[1:] != like.shape[1:]:
            raise ModelError(
                f"the module gives {finished.shape[1:]} per row for some rows and "
                f"{like.shape[1:]} for others, expected the same shape for all"
            )
        found[rows] = finished
    return found


def _raw(raw: Tensor) -> Tensor:
    return raw


def _proba(raw: Tensor) -> Tensor:
    return raw.sigmoid() if _is_single(raw) else raw.softmax(dim=1)


def _label(raw: Tensor) -> Tensor:
    if not _is_single(raw):
        return raw.argmax(dim=1)
    single = raw if raw.dim() == 1 else raw[:, 0]
    return (single > 0).long()


def _is_single(raw: Tensor) -> bool:
    return raw.dim() == 1 or raw.shape[1] == 1


_FINISH: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "label": _label,
    "proba": _proba,
    "raw": _raw,
}


def _to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy
        tensor = tensor.float()
    return tensor.detach().numpy()
