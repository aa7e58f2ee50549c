"""Exact metrics of a network, computed where the data lies."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import dask.array as da
import numpy as np
from dask.delayed import delayed
from torch import Tensor, nn

from dask_nn.data.blocks import as_array, fields_of
from dask_nn.data.inputs.read import read_inputs
from dask_nn.data.inputs.slices import cut_to_fit
from dask_nn.data.reader import RETRY_PAUSES_S
from dask_nn.data.row_blocks import (
    aligned,
    as_told,
    check_finite,
    check_lengths,
    per_block,
    shipped,
    told_by,
)
from dask_nn.errors import ConfigurationError, DataError, ModelError
from dask_nn.grouping import Grouping, map_inputs
from dask_nn.metrics.block import block_partials, check_loss, check_metrics
from dask_nn.metrics.forward import (
    PROBE_ROWS,
    check_batch_size,
    floating_dtype,
    one_thread_per_task,
    probe,
    sendable,
    targets_of,
)
from dask_nn.metrics.guards import guarded
from dask_nn.metrics.heads import WHOLE, num_outputs_of, resolve_heads
from dask_nn.metrics.merge import Partial, compute, merge_named
from dask_nn.metrics.objective import Objective
from dask_nn.metrics.streams import classifies
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distributed import Client
    from torchmetrics import Metric

    from dask_nn.metrics.heads import Head
    from dask_nn.metrics.names import Metrics

__all__ = ["evaluate"]

# Partials merged by one task; a power of two keeps the tree, and so the bits, the same.
SPLIT_EVERY: Final = 8


def evaluate(
    model: nn.Module,
    X: Any,
    y: Any = None,
    *,
    metrics: Metrics | Mapping[str, Metrics] = ("accuracy",),
    loss: Callable[..., Tensor] | None = None,
    sample_weight: Any = None,
    features: Sequence[str] | None = None,
    batch_dim: str | None = None,
    batch_size: int = 256,
    transform: Callable[[Tensor], Tensor] | None = None,
    client: Client | None = None,
) -> dict[str, float]:
    """Compute metrics, and a loss, over all rows.

    The values are those over the whole array, whatever its chunks: every task returns partial
    states of its block, and a tree of tasks merges them.

    Parameters
    ----------
    model : nn.Module
        Used in evaluation mode, and left as it is. Each worker receives it once.
    X : collection, shape (num_rows, ...)
        Of any kind that :func:`dask_nn.train` takes. What Dask or a torch dataset holds is
        evaluated on the cluster, block by block; anything else in this process.
    y : collection, str or list of str, optional
        Shape (num_rows, ...), chunked in any way, or names of columns of X; may be left out where
        X brings it.
    metrics : str, Metric, sequence of them, or mapping of str to them
        Names, such as ``"accuracy"``, or torchmetrics objects. Of a module with several outputs:
        a mapping from the name of an output to its metrics, which are called
        ``"<output>_<metric>"``.
    loss : callable, optional
        ``loss(outputs, targets)`` returning a scalar; its mean over all rows is ``"loss"``, also
        for a loss with ``reduction="sum"``.
    sample_weight : collection or str, optional
        Shape (num_rows,). They weigh the loss, not the metrics.
    features : list of str, optional
        Columns of X that are features; by default all that are not y or weights.
    batch_dim : str, optional
        The dimension of xarray objects along which rows lie; the first by default.
    batch_size : int
        Most rows that go through the model at a time.
    transform : callable, optional
        Picklable; applied to the tensor of a batch of X.
    client : distributed.Client, optional
        Default: the current client or, without one, Dask's scheduler in this process.

    Returns
    -------
    dict of str to float
        ``"loss"`` if wanted, then the metrics in the order given. What a metric computes in
        float32 is given as the shortest decimal that rounds to it.

    Raises
    ------
    ConfigurationError
        For a bad option, or a metric that is unknown or cannot be merged exactly.
    DataError
        If inputs are empty, differ in length or hold no numbers, or labels lie outside the
        outputs.
    ModelError
        If the model cannot be pickled or cannot process rows of X.
    """
    check_batch_size(batch_size)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if sample_weight is not None and loss is None:
        raise ConfigurationError("sample_weight weighs the loss, but there is none; pass loss=")
    objective = None if loss is None else Objective(loss, weighted=sample_weight is not None)
    with client.as_current() if client is not None else nullcontext():
        inputs = read_inputs(X, y, sample_weight, features=features, batch_dim=batch_dim)
        arrays = {name: as_array(name, value) for name, value in inputs.items()}
        _check_arrays(arrays)
        grouping = Grouping.of(list(arrays))
        if any(isinstance(array, da.Array) for array in arrays.values()):
            return _on_cluster(model, arrays, grouping, metrics, objective, batch_size, transform)
        rows = list(arrays.values())
        criteria = _criteria(model, rows, grouping, metrics, objective, transform)
        rows = as_told(fields_of(arrays), floating_dtype(model), rows)
        criteria.check(grouping.targets(rows), grouping.weights(rows))
        partials = block_partials(
            model,
            grouping.inputs(rows),
            grouping.targets(rows),
            grouping.weights(rows),
            metrics=criteria.metrics,
            heads=criteria.heads,
            loss=objective,
            batch_size=batch_size,
            transform=transform,
        )
    return compute(criteria.metrics, partials)


@dataclass(frozen=True, kw_only=True)
class _Criteria:
    """What is computed, and which labels there may be.

    Parameters
    ----------
    metrics : mapping of str to Metric
        Resolved.
    heads : mapping of str to Head
        Which output and target each of them compares.
    loss : Objective or None
        The loss.
    num_classes : mapping of Head to int
        Labels of that target are below it; heads whose targets are no labels are missing.
    ignore_index : int or None
        A label beside the classes.
    """

    metrics: Mapping[str, Metric]
    heads: Mapping[str, Head]
    loss: Objective | None
    num_classes: Mapping[Head, int]
    ignore_index: int | None

    def check(self, targets: Any, weights: np.ndarray[Any, Any] | None) -> None:
        """Check the values of some targets and weights.

        Raises
        ------
        DataError
            If one is no number, or a label lies outside the outputs.
        """
        members = targets if isinstance(targets, dict) else {None: targets}
        for key, values in members.items():
            check_finite("y" if key is None else f"y[{key!r}]", values)
        if weights is not None:
            check_finite("sample_weight", weights)
        for head, num_classes in self.num_classes.items():
            y = head.target_of(targets)
            kept = y if self.ignore_index is None else y[y != self.ignore_index]
            if kept.size and not 0 <= kept.min() <= kept.max() < num_classes:
                name = "y" if head.target is None else f"y[{head.target!r}]"
                raise DataError(
                    f"{name} has labels from {kept.min()} to {kept.max()}, but the outputs of the "
                    f"module are for labels from 0 to {num_classes - 1}; relabel y, or give the "
                    "module more outputs"
                )


def _criteria(
    model: nn.Module,
    arrays: Sequence[Any],
    grouping: Grouping,
    metrics: Metrics | Mapping[str, Metrics],
    objective: Objective | None,
    transform: Callable[[Tensor], Tensor] | None,
) -> _Criteria:
    """Choose the metrics from two rows of zeros, on which everything is tried."""
    output = probe(model, grouping.inputs(arrays), transform=transform)
    y = grouping.targets(arrays)
    zeros = map_inputs(
        lambda array: np.zeros((PROBE_ROWS, *map(int, array.shape[1:])), dtype=array.dtype), y
    )
    target = targets_of(zeros, floating_dtype(model))
    ignore_index = None if objective is None else objective.ignore_index
    found = resolve_heads(metrics, output, target, ignore_index=ignore_index)
    if objective is not None:
        check_loss(objective, output, target)
    check_metrics(found, output, target)
    needing = [found.heads.get(name, WHOLE) for name, m in found.metrics.items() if classifies(m)]
    num_classes = {}
    for head, task in found.tasks.items():
        # To the loss alone, floats of a cross entropy are shares.
        in_loss = ignore_index is not None and head.target_of(y).dtype.kind in "iu"
        if head in needing or in_loss:
            many = task == "multiclass" or ignore_index is not None
            num_classes[head] = num_outputs_of(head.output_of(output)) if many else 2
    return _Criteria(
        metrics=found.metrics,
        heads=found.heads,
        loss=objective,
        num_classes=num_classes,
        ignore_index=ignore_index,
    )


def _on_cluster(
    model: nn.Module,
    inputs: dict[str, Any],
    grouping: Grouping,
    metrics: Metrics | Mapping[str, Metrics],
    objective: Objective | None,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> dict[str, float]:
    arrays = aligned(cut_to_fit(inputs))
    payload, sent = sendable(model)
    objects = [payload, dumps(transform, "transform")]
    if objective is not None:
        dumps(objective.loss, "loss")  # to name the attribute as the user knows it
    criteria = _criteria(sent, arrays, grouping, metrics, objective, transform)
    objects.append(dumps(criteria, "metrics"))
    blocks = per_block(
        partial(_evaluate_block, grouping=grouping, batch_size=int(batch_size)),
        *arrays,
        objects=shipped(*objects),
        row_shape=(),
        meta=np.empty(0, dtype=object),
        name="dask-nn-evaluate",
        check=told_by(dict(zip(inputs, arrays, strict=True)), floating_dtype(sent)),
    )
    parts = list(guarded(blocks, pauses_s=RETRY_PAUSES_S).to_delayed().ravel())
    merge_parts = delayed(merge_named, pure=True)
    while len(parts) > 1:
        groups = range(0, len(parts), SPLIT_EVERY)
        parts = [merge_parts(parts[start : start + SPLIT_EVERY]) for start in groups]
    return compute(criteria.metrics, parts[0].compute())


def _evaluate_block(
    *rows_and_objects: Any, grouping: Grouping, batch_size: int
) -> dict[str, Partial]:
    *rows, (model, transform, criteria) = rows_and_objects
    targets = grouping.targets(rows)
    criteria.check(targets, grouping.weights(rows))
    with one_thread_per_task():
        return block_partials(
            model,
            grouping.inputs(rows),
            targets,
            grouping.weights(rows),
            metrics=criteria.metrics,
            heads=criteria.heads,
            loss=criteria.loss,
            batch_size=batch_size,
            transform=transform,
        )


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    """Check that all inputs have as many rows as X, as far as their lengths are known."""
    if check_lengths(arrays) == 0:
        raise DataError("there is nothing to evaluate: X and y have 0 rows")
