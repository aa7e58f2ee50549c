"""Predictions of a network as a lazy collection of the input's kind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import dask.array as da
import numpy as np
import torch
from torch import Tensor, nn

from dask_nn.data.blocks import as_array
from dask_nn.data.inputs.frames import Indexed
from dask_nn.data.inputs.read import read_rows
from dask_nn.data.inputs.results import frame_of, like_input
from dask_nn.data.inputs.slices import cut_to_fit
from dask_nn.data.reader import RETRY_PAUSES_S
from dask_nn.data.row_blocks import aligned, check_lengths, per_block, shipped, told_by
from dask_nn.errors import ConfigurationError, ModelError
from dask_nn.grouping import Grouping
from dask_nn.metrics.forward import (
    check_batch_size,
    count_rows,
    floating_dtype,
    one_tensor,
    one_thread_per_task,
    outputs,
    probe,
    sendable,
)
from dask_nn.metrics.guards import guarded
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["predict"]

Output = Literal["label", "proba", "raw"]


def predict(
    model: nn.Module,
    X: Any,
    *,
    output: Output | Mapping[str, Output] = "label",
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
    output : {"label", "proba", "raw"}, or mapping of str to them
        ``"raw"``: the outputs as they are. ``"proba"``: their softmax over axis 1, or the sigmoid
        of a single output. ``"label"``: the index of the largest along axis 1 as int64, or 1
        where a single output is positive and 0 elsewhere; axis 1 is dropped. For a module that
        returns a dictionary, a mapping says it for each member; members it does not name are left
        out.
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
    collection, or dict or tuple of them
        Of X's kind, shape (num_rows, ...), lazy where X is: for a Dask array one with the same
        row chunks; for a table a Series or DataFrame with the same index; for an xarray object a
        DataArray with the coordinates of its rows; for Delayed a list of them; for a Bag a Bag of
        one prediction for each row; for a torch dataset a Dask array; else a NumPy array. Nothing
        is computed before but the outputs for two rows of zeros, the first of Delayed parts, and
        the lengths of an array whose number of columns is unknown.
        A module that returns a dictionary or tuple gives one of these for each member; compute
        them together, and the model runs once.

    Raises
    ------
    ConfigurationError
        For a bad option.
    DataError
        If X holds no numbers.
    ModelError
        If the model cannot be pickled or cannot process rows of X.
    """
    for wanted in output.values() if isinstance(output, Mapping) else [output]:
        if wanted not in _FINISH:
            valid = ", ".join(map(repr, _FINISH))
            raise ConfigurationError(f"output must be one of {valid}, got {wanted!r}")
    check_batch_size(batch_size)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows = read_rows(X, features=features, batch_dim=batch_dim)
    inputs = {name: as_array(name, value) for name, value in rows.arrays.items()}
    with _hinting(X, features):
        predictions = _predict_arrays(
            model,
            inputs,
            indexed=rows.indexed,
            output=output,
            batch_size=batch_size,
            transform=transform,
        )

    def like_rows(predictions: Any, name: str) -> Any:
        return like_input(predictions, rows.like, name=name, batch_dim=batch_dim)

    if isinstance(predictions, dict):
        return {name: like_rows(part, str(name)) for name, part in predictions.items()}
    if isinstance(predictions, tuple):
        return tuple(like_rows(part, str(place)) for place, part in enumerate(predictions))
    return like_rows(predictions, str(output))


@contextmanager
def _hinting(X: Any, features: Any) -> Iterator[None]:
    """Say of a model that cannot process all that X has, that X may have too much."""
    try:
        yield
    except ModelError as error:
        names = X if isinstance(X, Mapping) else getattr(X, "columns", getattr(X, "data_vars", ()))
        if features is not None or not len(names):
            raise
        raise ModelError(
            f"{error}; all of {', '.join(map(str, names))} are given to the module: if some of "
            "them are no features (y, weights), name those that are with features="
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One of the tensors that a module returns.

    Parameters
    ----------
    output : Output
        What is predicted from it.
    like : ndarray
        A prediction of no rows.
    name : str
        How it is called in a table.
    """

    output: Output
    like: np.ndarray[Any, Any]
    name: str

    def finish(self, raw: Any) -> np.ndarray[Any, Any]:
        """Make predictions, shape (num_rows, ...), of the module's output for some rows."""
        return _finish(self.output, raw)


# By key or position; the only tensor of a module has neither.
type _Parts = dict[Any, _Part]


def _predict_arrays(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    indexed: str | None,
    output: Output | Mapping[str, Output],
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> Any:
    grouping = Grouping.of(list(inputs))
    if not any(isinstance(array, da.Array) for array in inputs.values()):
        rows = list(inputs.values())
        check_lengths(inputs)
        X = grouping.inputs(rows)
        returned = probe(model, X, transform=transform)
        parts = _parts(returned, output)
        found = _predict_rows(X, [model, transform], batch_size=batch_size, parts=parts)
        return _shaped(found, returned)
    blocks = aligned(cut_to_fit(inputs), reference=indexed)
    payload, sent = sendable(model)
    objects = shipped(payload, dumps(transform, "transform"))
    returned = probe(sent, grouping.inputs(blocks), transform=transform)
    parts = _parts(returned, output)
    function = partial(_predict_block, grouping=grouping, batch_size=int(batch_size), parts=parts)
    options: dict[str, Any] = {
        "name": "dask-nn-predict",
        "objects": objects,
        "check": told_by(dict(zip(inputs, blocks, strict=True)), floating_dtype(sent)),
    }
    if list(parts) == [None]:
        like = parts[None].like
        lazy = per_block(
            partial(_only_part, function), *blocks, row_shape=like.shape[1:], meta=like, **options
        )
        return guarded(lazy, pauses_s=RETRY_PAUSES_S)
    together = per_block(function, *blocks, row_shape=(), meta=np.empty(0, dtype=object), **options)
    together = guarded(together, pauses_s=RETRY_PAUSES_S)
    members = {
        key: per_block(
            partial(_one_part, key),
            together,
            row_shape=part.like.shape[1:],
            meta=part.like,
            name=f"dask-nn-predict-{key}",
        )
        for key, part in parts.items()
    }
    return _shaped(members, returned)


def _parts(returned: Any, output: Output | Mapping[str, Output]) -> _Parts:
    """Choose what is predicted of each tensor that the module returned for a few rows."""
    if isinstance(returned, dict):
        wanted = dict(output) if isinstance(output, Mapping) else dict.fromkeys(returned, output)
        for name in wanted:
            if name not in returned:
                raise ConfigurationError(
                    f"output names {name!r}, but the module returns {', '.join(map(str, returned))}"
                )
        members = {name: (returned[name], kind) for name, kind in wanted.items()}
    elif isinstance(output, Mapping):
        raise ConfigurationError(
            f"output is a mapping, but the module returns {type(returned).__name__} and no "
            f"dictionary; give one of {', '.join(map(repr, _FINISH))}"
        )
    elif isinstance(returned, tuple):
        members = {place: (member, output) for place, member in enumerate(returned)}
    else:
        members = {None: (returned, output)}
    return {
        key: _Part(
            output=kind,
            like=_finish(kind, tensor)[:0],
            name=str(kind) if key is None else str(key),
        )
        for key, (tensor, kind) in members.items()
    }


def _shaped(found: dict[Any, Any], returned: Any) -> Any:
    """Put predictions together as the module returned its outputs."""
    if isinstance(returned, dict):
        return found
    return tuple(found.values()) if isinstance(returned, tuple) else found[None]


def _predict_block(
    *blocks_and_objects: Any, grouping: Grouping, parts: _Parts, **options: Any
) -> dict[Any, Any]:
    *blocks, objects = blocks_and_objects
    index = next((block.index for block in blocks if isinstance(block, Indexed)), None)
    rows = [block.rows if isinstance(block, Indexed) else block for block in blocks]
    with one_thread_per_task():
        found = _predict_rows(grouping.inputs(rows), objects, parts=parts, **options)
    if index is None:
        return found
    return {key: frame_of(values, index, parts[key].name) for key, values in found.items()}


def _only_part(function: Callable[..., Any], *blocks_and_objects: Any) -> Any:
    return function(*blocks_and_objects)[None]


def _one_part(key: Any, together: dict[Any, Any], _: None) -> Any:
    return together[key]


def _predict_rows(
    X: Any, objects: list[Any], *, batch_size: int, parts: _Parts
) -> dict[Any, np.ndarray[Any, Any]]:
    model, transform = objects
    found = {
        key: np.empty((count_rows(X), *part.like.shape[1:]), dtype=part.like.dtype)
        for key, part in parts.items()
    }
    for rows, raw in outputs(model, X, batch_size=batch_size, transform=transform):
        for key, part in parts.items():
            finished = part.finish(raw if key is None else raw[key])
            if finished.shape[1:] != part.like.shape[1:]:
                raise ModelError(
                    f"the module gives {finished.shape[1:]} per row for some rows and "
                    f"{part.like.shape[1:]} for others, expected the same shape for all"
                )
            found[key][rows] = finished
    return found


def _finish(output: Output, raw: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return _to_numpy(_FINISH[output](one_tensor(raw)))


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
