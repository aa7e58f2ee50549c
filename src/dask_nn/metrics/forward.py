"""A network's outputs, batch by batch, without gradients."""

from __future__ import annotations

import contextlib
import pickle
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dask_nn.errors import ConfigurationError, DataError, ModelError
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "check_batch_size",
    "evaluating",
    "floating_dtype",
    "one_thread_per_task",
    "outputs",
    "probe",
    "sendable",
    "targets_of",
]

type Transform = Callable[[Tensor], Tensor]

# Networks that squeeze their outputs lose the first axis of a single row.
PROBE_ROWS = 2


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating parameter or buffer, or torch's default."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def check_batch_size(batch_size: object) -> None:
    """Raise a ConfigurationError unless ``batch_size`` is a positive integer."""
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool):
        raise ConfigurationError(f"batch_size must be an integer, got {batch_size!r}")
    if int(batch_size) < 1:
        raise ConfigurationError(f"batch_size must be positive, got {batch_size}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every part of a model to evaluation, and back to what it was."""
    training = [module for module in model.modules() if module.training]
    if not training:  # the usual case in tasks, whose threads share one model
        yield
        return
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def one_thread_per_task() -> Iterator[None]:
    """Compute on one core in a thread of a scheduler, which runs a task on every core it has.

    The main thread (a call without a scheduler) keeps its setting.
    """
    before = torch.get_num_threads()
    if before == 1 or threading.current_thread() is threading.main_thread():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outputs(
    model: nn.Module,
    X: np.ndarray[Any, Any] | Tensor,
    *,
    batch_size: int,
    transform: Transform | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Run a model in evaluation mode over rows.

    Parameters
    ----------
    model : nn.Module
        Left in the mode it was in.
    X : ndarray or Tensor
        Shape (num_rows, ...). Floating rows are cast to the model's floating type, others reach
        the transform as they are. Rows are copied, so that a transform may work in place.
    batch_size : int
        Most rows at a time.
    transform : callable, optional
        Applied to the tensor of a batch.

    Yields
    ------
    tuple of slice and Tensor
        The rows of a batch and their outputs, of shape (batch, ...); nothing for no rows.

    Raises
    ------
    ModelError
        If the model returns anything but one tensor with a row for each row of the batch.
    """
    floating = floating_dtype(model)
    device = _device(model)
    for start in range(0, X.shape[0], batch_size):
        rows = slice(start, min(start + batch_size, X.shape[0]))
        with evaluating(model), torch.inference_mode():
            batch = _to_tensor(X[rows], floating).to(device)
            output = model(batch if transform is None else transform(batch))
        if not isinstance(output, Tensor):
            raise ModelError(
                f"the module returned {type(output).__name__}, expected one tensor; wrap it in a "
                "module that returns the tensor of interest"
            )
        count = rows.stop - rows.start
        if output.dim() == 0 or output.shape[0] != count:
            raise ModelError(
                f"the module returned a tensor of shape {tuple(output.shape)} for {count} rows, "
                "expected one row for each"
            )
        yield rows, output.cpu()


def probe(
    model: nn.Module,
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    transform: Transform | None = None,
) -> Tensor:
    """Run a model on two rows of zeros to learn what it returns.

    Parameters
    ----------
    model : nn.Module
        Left in the mode it was in.
    row_shape : tuple of int
        Shape of one row of X.
    dtype : numpy.dtype
        Type of X as it is stored.
    transform : callable, optional
        Applied to the batch.

    Returns
    -------
    Tensor
        Shape (2, ...).

    Raises
    ------
    ModelError
        If transform or model cannot process such rows.
    """
    zeros = np.zeros((PROBE_ROWS, *row_shape), dtype=dtype)
    try:
        return next(outputs(model, zeros, batch_size=PROBE_ROWS, transform=transform))[1]
    except (ModelError, DataError):
        raise
    except Exception as error:
        hint = ""
        if dtype.kind not in "fc" and transform is None:
            hint = "; integer features stay as they are: make them floating with transform="
        raise ModelError(
            f"the module cannot process rows of shape {row_shape} and type {dtype}: "
            f"{type(error).__name__}: {error}{hint}"
        ) from error


def sendable(model: nn.Module) -> tuple[bytes, nn.Module]:
    """Pickle a model for the workers, on the CPU, and return also what they will unpickle.

    Raises
    ------
    ModelError
        If the model cannot be pickled; names the attribute.
    """
    payload = dumps(model, "module")
    sent: nn.Module = pickle.loads(payload)  # noqa: S301 - pickled above
    tensors = (*sent.parameters(), *sent.buffers())
    if any(tensor.device.type != "cpu" for tensor in tensors):  # which workers may lack
        payload = dumps(sent.cpu(), "module")
    return payload, sent


def targets_of(y: np.ndarray[Any, Any] | Tensor, floating: torch.dtype) -> Tensor:
    """Copy targets or weights to a tensor: integers as int64, floating ones as ``floating``."""
    tensor = _to_tensor(y, floating)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    return tensor.long()


def _to_tensor(rows: np.ndarray[Any, Any] | Tensor, floating: torch.dtype) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.to(floating if rows.is_floating_point() else rows.dtype, copy=True)
    native = rows.dtype.newbyteorder("=")
    try:
        # A copy: stored blocks may be read-only, and must not be kept alive by a view.
        tensor = torch.from_numpy(np.array(rows, dtype=native, order="C"))
    except TypeError as error:
        raise DataError(
            f"X, y and weights must hold numbers, got an array of type {rows.dtype}"
        ) from error
    return tensor.to(floating) if tensor.is_floating_point() else tensor


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
