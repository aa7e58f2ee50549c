"""Predictions of a network as a lazy Dask array."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import dask.array as da
import numpy as np
import torch
from torch import Tensor, nn

from dask_nn.errors import ConfigurationError, ModelError
from dask_nn.metrics.forward import (
    check_batch_size,
    one_thread_per_task,
    outputs,
    probe,
    sendable,
)
from dask_nn.metrics.row_blocks import as_array, one_chunk_per_row_block, per_block, shipped
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["predict"]

Output = Literal["label", "proba", "raw"]


def predict(
    model: nn.Module,
    X: Any,
    *,
    output: Output = "label",
    batch_size: int = 1024,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Predict every row, where it lies.

    Parameters
    ----------
    model : nn.Module
        Used in evaluation mode, and left as it is. Each worker receives it once.
    X : dask.array.Array or array_like
        Shape (num_rows, ...). Floating rows are cast to the model's floating type.
    output : {"label", "proba", "raw"}
        ``"raw"``: the outputs as they are. ``"proba"``: their softmax over axis 1, or the sigmoid
        of a single output. ``"label"``: the index of the largest along axis 1 as int64, or 1
        where a single output is positive and 0 elsewhere; axis 1 is dropped.
    batch_size : int
        Most rows that go through the model at a time.
    transform : callable, optional
        Picklable; applied to the tensor of a batch, for example to scale stored bytes.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        Shape (num_rows, ...). For a Dask array a lazy one with the same row chunks, for which
        nothing is computed but the outputs for two rows of zeros; else a NumPy array.

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
    rows = as_array("X", X)
    if not isinstance(rows, da.Array):
        like = _like(model, rows, output, transform)
        return _predict_rows(
            rows, [model, transform], output=output, batch_size=batch_size, like=like
        )
    rows = one_chunk_per_row_block("X", rows)
    payload, sent = sendable(model)
    objects = shipped(payload, dumps(transform, "transform"))
    like = _like(sent, rows, output, transform)
    return per_block(
        partial(_predict_block, output=output, batch_size=int(batch_size), like=like),
        rows,
        row_shape=like.shape[1:],
        meta=like,
        name="dask-nn-predict",
        objects=objects,
    )


def _like(
    model: nn.Module, X: Any, output: Output, transform: Callable[[Tensor], Tensor] | None
) -> np.ndarray[Any, Any]:
    """Find what a prediction of no rows looks like."""
    row_shape = tuple(map(int, X.shape[1:]))
    probed = _FINISH[output](probe(model, row_shape, X.dtype, transform=transform))
    return _to_numpy(probed)[:0]


def _predict_block(
    X: np.ndarray[Any, Any], objects: list[Any], **options: Any
) -> np.ndarray[Any, Any]:
    with one_thread_per_task():
        return _predict_rows(X, objects, **options)


def _predict_rows(
    X: np.ndarray[Any, Any],
    objects: list[Any],
    *,
    output: Output,
    batch_size: int,
    like: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    model, transform = objects
    found = np.empty((len(X), *like.shape[1:]), dtype=like.dtype)
    for rows, raw in outputs(model, X, batch_size=batch_size, transform=transform):
        with torch.inference_mode():
            finished = _to_numpy(_FINISH[output](raw))
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
