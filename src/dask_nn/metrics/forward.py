"""A network's outputs, batch by batch, without gradients."""

from __future__ import annotations

import contextlib
import pickle
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from distributed import get_worker
from psutil import Process
from torch import Tensor, nn

from dask_nn.allocator import keeping_freed_memory
from dask_nn.errors import ConfigurationError, DataError, ModelError
from dask_nn.grouping import call_model, map_inputs
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "PROBE_ROWS",
    "between_tasks_s",
    "check_batch_size",
    "count_rows",
    "evaluating",
    "floating_dtype",
    "one_tensor",
    "one_thread_per_task",
    "outputs",
    "probe",
    "sendable",
    "targets_of",
]

type Transform = Callable[[Tensor], Tensor]

# Networks that squeeze their outputs lose the first axis of a single row.
PROBE_ROWS = 2
# A worker that has computed no block for so long gives back what its allocator kept.
LINGER_S = 1.0
# Of a worker's memory; by default Dask begins to spill there.
SPILL_FRACTION = 0.7


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

    The allocator keeps what batches free, for the next task. The main thread (a call without a
    scheduler) keeps its settings.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with keeping_freed_memory(linger_s=between_tasks_s):
            yield
    finally:
        torch.set_num_threads(before)


def between_tasks_s() -> float:
    """Give for how long this process may keep memory between tasks: not where Dask would spill."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:  # no task of a cluster
        return LINGER_S
    return LINGER_S if not limit or Process().memory_info().rss < SPILL_FRACTION * limit else 0.0


def outputs(
    model: nn.Module,
    X: Any,
    *,
    batch_size: int,
    transform: Transform | None = None,
) -> Iterator[tuple[slice, Any]]:
    """Run a model in evaluation mode over rows.

    Parameters
    ----------
    model : nn.Module
        Left in the mode it was in.
    X : ndarray or Tensor, or dict of str to them
        Shape (num_rows, ...). Floating rows are cast to the model's floating type, others reach
        the transform as they are. Rows are copied, so that a transform may work in place. The
        members of a dictionary are the module's keyword arguments.
    batch_size : int
        Most rows at a time.
    transform : callable, optional
        Applied to the tensor of a batch.

    Yields
    ------
    tuple of slice and outputs
        The rows of a batch and their outputs, of shape (batch, ...): a tensor, or a tuple or
        dictionary of them. Nothing for no rows.

    Raises
    ------
    ModelError
        If the model returns anything but tensors with a row for each row of the batch.
    """
    floating = floating_dtype(model)
    device = _device(model)
    num_rows = count_rows(X)
    for start in range(0, num_rows, batch_size):
        rows = slice(start, min(start + batch_size, num_rows))
        with evaluating(model), torch.inference_mode():
            batch = map_inputs(partial(_to_batch, rows=rows, floating=floating, device=device), X)
            output = call_model(model, batch if transform is None else transform(batch))
        yield rows, _checked(output, rows.stop - rows.start)


def one_tensor(output: Any) -> Tensor:
    """Check that a module returned one tensor.

    Raises
    ------
    ModelError
        If it returned something else.
    """
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the module returned {type(output).__name__}, expected one tensor; wrap it in a "
            "module that returns the tensor of interest"
        )
    return output


def count_rows(X: Any) -> int:
    """Count the rows of an array, or of the members of a dictionary."""
    return int((next(iter(X.values())) if isinstance(X, dict) else X).shape[0])


def _checked(output: Any, count: int) -> Any:
    """Give outputs in the host's memory, once each has a row for each row of the batch."""
    if isinstance(output, dict):
        return {key: _checked(value, count) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(_checked(value, count) for value in output)
    tensor = one_tensor(output)
    if tensor.dim() == 0 or tensor.shape[0] != count:
        raise ModelError(
            f"the module returned a tensor of shape {tuple(tensor.shape)} for {count} rows, "
            "expected one row for each"
        )
    return tensor.cpu()


def probe(model: nn.Module, like: Any, *, transform: Transform | None = None) -> Any:
    """Run a model on two rows of zeros to learn what it returns.

    Parameters
    ----------
    model : nn.Module
        Left in the mode it was in.
    like : array, or dict of str to array
        Shape (any number, ...): the shape of a row and the type of X as it is stored.
    transform : callable, optional
        Applied to the batch.

    Returns
    -------
    Tensor, or a tuple or dictionary of them
        Shape (2, ...).

    Raises
    ------
    ModelError
        If transform or model cannot process such rows.
    """
    zeros = map_inputs(
        lambda x: np.zeros((PROBE_ROWS, *map(int, x.shape[1:])), dtype=x.dtype), like
    )
    try:
        return next(outputs(model, zeros, batch_size=PROBE_ROWS, transform=transform))[1]
    except (ModelError, DataError):
        raise
    except Exception as error:
        hint = ""
        arrays = zeros if isinstance(zeros, dict) else {"": zeros}
        if transform is None and any(x.dtype.kind not in "fc" for x in arrays.values()):
            hint = "; integer features stay as they are: make them floating with transform="
        rows = ", ".join(
            f"{key + ' ' if key else ''}of shape {x.shape[1:]} and type {x.dtype}"
            for key, x in arrays.items()
        )
        raise ModelError(
            f"the module cannot process rows {rows}: {type(error).__name__}: {error}{hint}"
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


def targets_of(y: Any, floating: torch.dtype) -> Any:
    """Copy targets or weights to tensors: integers as int64, floating ones as ``floating``."""
    if isinstance(y, dict):
        return {key: targets_of(value, floating) for key, value in y.items()}
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


def _to_batch(X: Any, *, rows: slice, floating: torch.dtype, device: torch.device) -> Tensor:
    return _to_tensor(X[rows], floating).to(device)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
