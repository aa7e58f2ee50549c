"""One step on a few rows, on the client: what would fail on every rank fails here, and says why."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from dask_nn.data.batches import batch_dtypes
from dask_nn.errors import ConfigurationError, DaskNNError, DataError, ModelError
from dask_nn.metrics.objective import Objective
from dask_nn.training.layout import LeafLayout
from dask_nn.training.randomness import ShardRandomness, restored_generator
from dask_nn.training.state import TrainingState
from dask_nn.training.step import ShardStep

if TYPE_CHECKING:
    from dask_nn.data.peek import LabelRange
    from dask_nn.training.spec import TrainingSpec

__all__ = ["check_labels", "try_step"]


def try_step(spec: TrainingSpec) -> torch.Tensor:
    """Compute one leaf from the spec's sample and throw it away.

    Returns
    -------
    Tensor
        The model's output for the sample, shape (rows, ...).

    Raises
    ------
    ConfigurationError
        If optimizer, scheduler or loss cannot be used.
    ModelError
        If transform, model or loss fail on the sample.
    """
    if spec.sample is None:
        message = "a spec needs sample rows to be tried on"
        raise ConfigurationError(message)
    TrainingState(spec, torch.device("cpu"))
    model = copy.deepcopy(spec.model).cpu().train()
    layout = LeafLayout(model)
    dtypes = batch_dtypes(spec.fields, layout.dtype)
    batch = tuple(
        torch.from_numpy(np.array(array)).to(dtype)
        for array, dtype in zip(spec.sample, dtypes, strict=True)
    )
    step = ShardStep(
        model,
        objective=Objective(spec.loss, weighted=spec.weighted),
        layout=layout,
        randomness=ShardRandomness(spec.seed, shared=False),
        transform=spec.transform,
        weighted=spec.weighted,
        device=torch.device("cpu"),
    )
    views = layout.views(torch.zeros(layout.size, dtype=layout.dtype))
    count = len(batch[0])
    try:
        with restored_generator():
            output = step.compute(views, batch, step=0, shard=0, count=count, step_count=count)
    except DaskNNError:
        raise
    except Exception as error:
        inputs = ", ".join(
            f"{field.name} {str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
            for field, tensor in zip(spec.fields, batch, strict=True)
        )
        message = (
            f"one step on {count} rows failed before any work started, with {inputs}: "
            f"{type(error).__name__}: {error}{_remedy(spec, batch)}"
        )
        raise ModelError(message) from error
    if output is None:
        message = "the sample has no rows"
        raise DataError(message)
    return output.output


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


def _remedy(spec: TrainingSpec, batch: tuple[torch.Tensor, ...]) -> str:
    """Guess what to say about the most common mistakes."""
    if spec.transform is None and not batch[0].is_floating_point():
        return (
            f". X is {batch[0].dtype}: most layers expect floats, so pass a transform= that "
            "makes them, such as a function returning x.float() / 255"
        )
    if isinstance(spec.loss, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss):
        if batch[1].is_floating_point():
            return ". This loss expects integer class labels: use y.astype('int64')"
    elif not batch[1].is_floating_point():
        return ". Losses other than cross-entropy usually expect floats: use y.astype('float32')"
    return ""
