"""Validation inside the gang: every rank reads its share of the blocks, all merge the same way."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dask_nn.collectives.tree import shard_range
from dask_nn.data.batches import stored_dtype
from dask_nn.data.casts import check_cast
from dask_nn.data.lengths import check_shape
from dask_nn.data.problem import of_validation_data
from dask_nn.data.randomness import SeededRandomness
from dask_nn.metrics.merge import compute, merge_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dask_nn.collectives.base import Communicator
    from dask_nn.data.reader import BlockReader
    from dask_nn.metrics.merge import Partial
    from dask_nn.metrics.objective import Objective
    from dask_nn.training.spec import TrainingSpec

__all__ = ["Validation", "evaluate_block"]

BATCH_SIZE = 1024


class Validation:
    """Loss and metrics over the validation blocks, the same bits for any number of ranks.

    Parameters
    ----------
    spec : TrainingSpec
        Its metrics, transform and number of validation blocks.
    objective : Objective
        The loss.
    reader : BlockReader
        Of the validation blocks.
    dtypes : tuple of torch.dtype
        Types in which model and loss see the fields.
    comm : Communicator
        An open one.

    Random numbers that the model draws depend on the run's seed, the step and the block.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        *,
        objective: Objective,
        reader: BlockReader,
        dtypes: tuple[torch.dtype, ...],
        comm: Communicator,
    ) -> None:
        self._spec = spec
        self._objective = objective
        self._reader = reader
        self._dtypes = dtypes
        self._comm = comm
        self._randomness = SeededRandomness(spec.seed)

    def run(self, model: nn.Module, step: int) -> dict[str, float]:
        """Evaluate the model; every rank calls it and gets the same values.

        Parameters
        ----------
        model : torch.nn.Module
            Its mode is kept.
        step : int
            Steps completed over the whole run.

        Returns
        -------
        dict of str to float
            ``val_loss`` and one ``val_<metric>`` for each metric.
        """
        lo, hi = shard_range(
            self._comm.rank, self._comm.world_size, len(self._spec.validation_lengths)
        )
        parts = []
        for block in range(lo, hi):
            self._comm.at_work()
            with of_validation_data():
                arrays = self._reader.read(block)
                part = evaluate_block(
                    model,
                    block,
                    arrays,
                    self._dtypes,
                    spec=self._spec,
                    objective=self._objective,
                    randomness=self._randomness,
                    step=step,
                )
            parts.append(part)
        # Partials are plain states made by these same ranks a moment ago.
        gathered = self._comm.all_gather_bytes(pickle.dumps(parts))
        merged = merge_named([part for chunk in gathered for part in pickle.loads(chunk)])  # noqa: S301
        return {f"val_{name}": value for name, value in compute(self._spec.metrics, merged).items()}


def evaluate_block(
    model: nn.Module,
    block: int,
    arrays: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    *,
    spec: TrainingSpec,
    objective: Objective,
    randomness: SeededRandomness,
    step: int,
) -> dict[str, Partial]:
    """Evaluate a model on one block.

    Parameters
    ----------
    model : torch.nn.Module
        Its mode is kept.
    block : int
        Its number among the validation blocks.
    arrays : sequence of numpy.ndarray
        X, y and, if weighted, sample weights, shape (rows, ...).
    dtypes : sequence of torch.dtype
        Types in which model and loss see them.
    spec : TrainingSpec
        Its fields, validation lengths, metrics and transform.
    objective : Objective
        The loss.
    randomness : SeededRandomness
        For a model that draws random numbers in evaluation, too.
    step : int
        Steps completed over the whole run.

    Raises
    ------
    DataError
        If the block has another shape than was said, or values that its type cannot hold.
    """
    from dask_nn.metrics.block import block_partials

    for field, array, dtype in zip(spec.fields, arrays, dtypes, strict=True):
        what = f"block {block} of {field.name}"
        check_shape(array.shape, field.shape, what, length=spec.validation_lengths[block])
        check_cast(array, stored_dtype(dtype), what)

    def evaluate(_: bool) -> dict[str, Partial]:
        tensors = [
            torch.from_numpy(array.astype(stored_dtype(dtype))).to(dtype)
            for array, dtype in zip(arrays, dtypes, strict=True)
        ]
        grouping = spec.grouping
        return block_partials(
            model,
            grouping.inputs(tensors),
            grouping.targets(tensors),
            grouping.weights(tensors),
            metrics=spec.metrics,
            heads=spec.heads,
            loss=objective,
            batch_size=BATCH_SIZE,
            transform=spec.transform,
        )

    return randomness.run(evaluate, "validation", step, block)
