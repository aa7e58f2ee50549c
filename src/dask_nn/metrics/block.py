"""Loss and metrics of one block of rows, as partials that merge."""

from __future__ import annotations

import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.errors import ConfigurationError, DaskNNError, DataError
from dask_nn.grouping import map_inputs
from dask_nn.metrics.forward import count_rows, floating_dtype, outputs, targets_of
from dask_nn.metrics.heads import WHOLE
from dask_nn.metrics.merge import LossPartial, Partial
from dask_nn.metrics.streams import MetricStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from torch import Tensor, nn
    from torchmetrics import Metric

    from dask_nn.metrics.heads import Head, HeadMetrics
    from dask_nn.metrics.objective import Objective

    type Rows = np.ndarray[Any, Any] | Tensor | dict[str, np.ndarray[Any, Any] | Tensor]

__all__ = ["block_partials", "check_loss", "check_metrics"]


def block_partials(
    model: nn.Module,
    x: Rows,
    y: Rows,
    weight: Rows | None = None,
    *,
    metrics: Mapping[str, Metric],
    heads: Mapping[str, Head] | None = None,
    loss: Objective | None,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Partial]:
    """Evaluate a model on one block.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode and left in the mode it was in.
    x : ndarray or Tensor
        Shape (num_rows, ...). Floating rows are cast to the model's floating type.
    y : ndarray or Tensor
        Shape (num_rows, ...). Integers are cast to int64, floating targets as x.
    weight : ndarray or Tensor, optional
        Shape (num_rows,). They weigh the loss, not the metrics.
    metrics : mapping of str to Metric
        Copied, never changed.
    heads : mapping of str to Head, optional
        Which output and target each of them compares, by default the only ones.
    loss : Objective or None
        The loss, if it is wanted.
    batch_size : int
        Most rows that go through the model at a time. It may change the last bits.
    transform : callable, optional
        Applied to the tensor of a batch of x.

    Returns
    -------
    dict of str to partial
        ``"loss"`` if there is one, then the metrics. A block without rows gives neutral partials.
    """
    floating = floating_dtype(model)
    targets = targets_of(y, floating)
    weights = None if weight is None else targets_of(weight, floating).to(floating)
    # A divisor that counts the labels is right whether or not some of them are ignored.
    objective = None if loss is None else loss.with_ignored(True)
    streams = {name: MetricStream(name, metric) for name, metric in metrics.items()}
    head_of = {name: (heads or {}).get(name, WHOLE) for name in metrics}
    total = normalizer = 0.0
    for rows, output in outputs(model, x, batch_size=batch_size, transform=transform):
        wanted = map_inputs(operator.itemgetter(rows), targets)
        if objective is not None:
            part = None if weights is None else weights[rows]
            added, by = _loss_of(objective, output, wanted, part, rows.stop - rows.start)
            total, normalizer = total + added, normalizer + by
        for name, stream in streams.items():
            stream.update(*head_of[name].select(output, wanted))
    partials: dict[str, Partial] = {}
    if objective is not None:
        partials["loss"] = LossPartial(total=total, normalizer=normalizer)
    return partials | {name: stream.partial() for name, stream in streams.items()}


def check_loss(loss: Objective, output: Any, target: Any) -> None:
    """Try a loss on a few rows.

    Parameters
    ----------
    loss : Objective
        The loss.
    output, target : Tensor
        Shape (num_rows, ...).

    Raises
    ------
    DataError
        If it cannot compare such outputs and targets.
    ModelError
        If it returns no scalar.
    """
    count = count_rows(target)
    weight = torch.ones(count, dtype=output.dtype) if loss.weighted else None
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            # Outputs (n, 1) and targets (n,) broadcast to (n, n): PyTorch only warns.
            warnings.filterwarnings("error", message="Using a target size")
            _loss_of(loss, output, target, weight, count)
    except DaskNNError:
        raise
    except Exception as error:
        raise DataError(
            f"the loss cannot compare outputs {_described(output)} with targets y "
            f"{_described(target)}: {error}; reshape or cast y, or use another loss"
        ) from error


def check_metrics(found: HeadMetrics, outputs: Any, targets: Any) -> None:
    """Try metrics on a few rows.

    Parameters
    ----------
    found : HeadMetrics
        Copied, never changed.
    outputs : Tensor, or tuple or dict of them
        Shape (num_rows, ...).
    targets : Tensor, or dict of them
        Shape (num_rows, ...).

    Raises
    ------
    ConfigurationError
        If one cannot compare such outputs and targets; names it.
    """
    for name, metric in found.metrics.items():
        stream = MetricStream(name, metric)
        output, target = found.heads.get(name, WHOLE).select(outputs, targets)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about values; only types and shapes matter here
                stream.update(output, target)
        except DaskNNError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"metric {name!r} ({type(metric).__name__}) cannot compare outputs "
                f"{_described(output)} with targets y {_described(target)}: {error}"
            ) from error


def _loss_of(
    objective: Objective, output: Any, target: Any, weight: Tensor | None, count: int
) -> tuple[float, float]:
    with torch.inference_mode():
        if objective.kind == "mean_normalized":
            added, by = objective.sum_and_normalizer(output, target, weight)
            return float(added), float(by)
        value = float(objective.value(output, target))
    return (value if objective.kind == "sum" else value * count), float(count)


def _described(tensor: Any) -> str:
    if isinstance(tensor, dict):
        return ", ".join(f"{key} {_described(value)}" for key, value in tensor.items())
    if isinstance(tensor, tuple):
        return ", ".join(map(_described, tensor))
    shape = ", ".join(["n", *map(str, tensor.shape[1:])]) + ("," if tensor.dim() == 1 else "")
    return f"{str(tensor.dtype).removeprefix('torch.')} ({shape})"
