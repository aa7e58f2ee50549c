"""One step on a few rows, on the client: what would fail on every rank fails here, and says why."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from dask_nn.data.batches import batch_dtypes
from dask_nn.data.randomness import SeededRandomness, restored_generator
from dask_nn.errors import ConfigurationError, DaskNNError, DataError, ModelError
from dask_nn.grouping import call_model, group_of, map_inputs
from dask_nn.metrics.objective import Objective
from dask_nn.training.layout import LeafLayout
from dask_nn.training.runtime import task_runtime
from dask_nn.training.state import TrainingState
from dask_nn.training.step import ShardOutput, ShardStep

if TYPE_CHECKING:
    from torch import nn

    from dask_nn.data.peek import LabelRange
    from dask_nn.training.spec import TrainingSpec

__all__ = ["check_labels", "try_step"]


def try_step(spec: TrainingSpec, labels: LabelRange | None = None) -> ShardOutput:
    """Compute leaves from the spec's sample, of a full and of the smallest batch, for nothing.

    Parameters
    ----------
    spec : TrainingSpec
        With a sample.
    labels : LabelRange, optional
        What class labels occur, for a better message.

    Returns
    -------
    ShardOutput
        What the model returned for the sample, and its targets, shapes (rows, ...).

    Raises
    ------
    ConfigurationError
        If optimizer, scheduler or loss cannot be used.
    DataError
        If labels lie outside the model's outputs.
    ModelError
        If transform, model or loss fail on the sample.
    """
    # Ranks of another run may be threads of this process.
    randomness = SeededRandomness(spec.seed)
    with restored_generator():
        return _try_step(spec, labels, randomness)


def _try_step(
    spec: TrainingSpec, labels: LabelRange | None, randomness: SeededRandomness
) -> ShardOutput:
    if spec.sample is None:
        message = "a spec needs sample rows to be tried on"
        raise ConfigurationError(message)
    randomness.run_once(lambda: TrainingState(spec, torch.device("cpu")), "state")
    model = copy.deepcopy(spec.model).cpu().train()
    dtypes = batch_dtypes(spec.fields, LeafLayout(model).floating)
    batch = tuple(
        torch.from_numpy(np.array(array)).to(dtype)
        for array, dtype in zip(spec.sample, dtypes, strict=True)
    )
    count = len(batch[0])
    fewest = min(count, _fewest_rows(spec))
    output = None
    for rows in sorted({count, fewest}, reverse=True):
        part = tuple(tensor[:rows].clone() for tensor in batch)
        try:
            found = _compute(spec, model, part, randomness)
        except DaskNNError:
            raise
        except Exception as error:
            if labels is not None:
                _blame_labels(spec, model, part, labels)
            message = _failure(spec, part, error)
            if output is not None:
                message += (
                    f". The last batch of an epoch leaves a shard with {rows} row(s): choose "
                    f"another batch_size ({spec.batch_size}) or other shards ({spec.shards}), or "
                    "leave some rows out"
                )
            raise ModelError(message) from error
        output = found if output is None else output
    if output is None:
        message = "the sample has no rows"
        raise DataError(message)
    return output


def _compute(
    spec: TrainingSpec,
    model: nn.Module,
    batch: tuple[torch.Tensor, ...],
    randomness: SeededRandomness,
) -> ShardOutput | None:
    layout = LeafLayout(model)
    step = ShardStep(
        model,
        objective=Objective(spec.loss, weighted=spec.weighted),
        layout=layout,
        randomness=randomness,
        transform=spec.transform,
        grouping=spec.grouping,
        device=torch.device("cpu"),
    )
    views = layout.views(torch.zeros(layout.size, dtype=layout.dtype))
    count = len(batch[0])
    with (
        task_runtime(torch.get_num_threads(), deterministic=spec.bitwise),
        warnings.catch_warnings(),
    ):
        # Outputs (n, 1) and targets (n,) broadcast to (n, n): PyTorch only warns.
        warnings.filterwarnings("error", message="Using a target size")
        return step.compute(views, batch, step=0, shard=0, count=count, step_count=count)


def _fewest_rows(spec: TrainingSpec) -> int:
    """Count the rows of the smallest batch that a shard ever computes."""
    plan = spec.plan(0)
    counts = [plan.count(plan.num_steps - 1, shard) for shard in range(plan.shards)]
    return min(count for count in counts if count)


def _blame_labels(
    spec: TrainingSpec, model: nn.Module, batch: tuple[torch.Tensor, ...], labels: LabelRange
) -> None:
    """Raise the error of labels outside the outputs if the model itself works."""
    try:
        with torch.no_grad():
            x = map_inputs(torch.clone, spec.grouping.inputs(batch))
            x = x if spec.transform is None else spec.transform(x)
            num_outputs = int(call_model(copy.deepcopy(model).eval(), x).shape[1])
    except Exception:
        return  # the labels are not to blame
    check_labels(spec, labels, num_outputs)


def _failure(spec: TrainingSpec, batch: tuple[torch.Tensor, ...], error: Exception) -> str:
    inputs = ", ".join(
        f"{field.name} {str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
        for field, tensor in zip(spec.fields, batch, strict=True)
    )
    return (
        f"one step on {len(batch[0])} rows failed before any work started, with {inputs}: "
        f"{type(error).__name__}: {error}{_remedy(spec, batch, error)}"
    )


def check_labels(spec: TrainingSpec, labels: LabelRange, num_outputs: int) -> None:
    """Check that every class label names an output of the model.

    Raises
    ------
    DataError
        If a label is negative or not below ``num_outputs``.
    """
    if labels.low <= labels.high and not 0 <= labels.low <= labels.high < num_outputs:
        message = (
            f"y has labels from {labels.low} to {labels.high}, but the model has {num_outputs} "
            f"outputs, so labels must be in 0..{num_outputs - 1}; relabel y, or give "
            f"{type(spec.model).__name__} more outputs"
        )
        raise DataError(message)


def _remedy(spec: TrainingSpec, batch: tuple[torch.Tensor, ...], error: Exception) -> str:
    """Guess what to say about the most common mistakes."""
    if "does not have a deterministic implementation" in str(error):
        return ". Synchronous(bitwise=False) allows it, and weights may differ from run to run"
    if "Using a target size" in str(error):
        return ". Reshape y, or let the model squeeze its output"
    named = dict(zip([field.name for field in spec.fields], batch, strict=True))
    integers = [
        name for name, x in named.items() if group_of(name) == "X" and not x.is_floating_point()
    ]
    if spec.transform is None and integers:
        return (
            f". {integers[0]} is {named[integers[0]].dtype}: most layers expect floats, so pass a "
            "transform= that makes them, such as a function returning x.float() / 255"
        )
    return _remedy_for_target(spec, named["y"]) if "y" in named else ""


def _remedy_for_target(spec: TrainingSpec, target: torch.Tensor) -> str:
    if isinstance(spec.loss, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss):
        if target.is_floating_point():
            return ". This loss expects integer class labels: use y.astype('int64')"
    elif not target.is_floating_point():
        return ". Losses other than cross-entropy usually expect floats: use y.astype('float32')"
    return ""
