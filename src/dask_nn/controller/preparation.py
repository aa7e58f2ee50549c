"""From arguments and data to a run that is known to work on a few rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dask_nn.controller.cluster import inspect_workers
from dask_nn.controller.data_sets import DataSets, check_targets, parts_of_validation
from dask_nn.controller.locality import seat_where_data_lies
from dask_nn.controller.options import Options, check_sizes
from dask_nn.controller.placement import Seating, WorkerFacts, seat_ranks
from dask_nn.data.peek import LabelRange, label_range, sample
from dask_nn.data.problem import of_validation_data
from dask_nn.errors import DataError
from dask_nn.metrics.heads import num_outputs_of, resolve_heads
from dask_nn.metrics.objective import Objective
from dask_nn.training.preflight import check_labels, try_step
from dask_nn.training.spec import TrainingSpec
from dask_nn.training.strategies import default_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

    from dask_nn.config import Settings
    from dask_nn.data.blocks import Blocks

__all__ = ["PreparedRun", "prepare"]

# Rows on which the client tries a step, and from which the ranks' canary is computed.
MAX_SAMPLE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start.

    Parameters
    ----------
    spec : TrainingSpec
        What is trained.
    blocks, validation : Blocks
        Where the data lies.
    workers : tuple of WorkerFacts
        All workers of the cluster; empty without one.
    seating : Seating or None
        Which workers run ranks; None without a cluster.
    notes : tuple of (str, dict)
        What the user should know: events by name.
    """

    spec: TrainingSpec
    blocks: Blocks
    validation: Blocks | None
    workers: tuple[WorkerFacts, ...]
    seating: Seating | None
    notes: tuple[tuple[str, dict[str, Any]], ...] = ()


def prepare(
    options: Options,
    X: Any,
    y: Any,
    *,
    sample_weight: Any,
    validation: Sequence[Any] | None,
    client: Client | None,
    settings: Settings,
) -> PreparedRun:
    """Check everything, put the data in place, and try one step on a few rows.

    Raises
    ------
    DaskNNError
        One of its kinds, for whatever could not work.
    """
    model = options.make_model()
    Objective(options.loss, weighted=sample_weight is not None)
    if client is not None:
        options.check_pickles(model)
    workers = tuple(inspect_workers(client)) if client is not None else ()
    shards = options.strategy.shards or _default_shards(options, workers)
    _check_known_sizes(X, options, shards)

    data = DataSets(options, workers, client=client, settings=settings)
    blocks = data.place(X, y, sample_weight)
    weighted = any(field.name == "sample_weight" for field in blocks.fields)
    objective = Objective(options.loss, weighted=weighted)
    check_sizes(blocks.num_samples, batch_size=options.batch_size, shards=shards)
    validation_blocks = None
    if validation is not None:
        parts = parts_of_validation(validation, y, sample_weight)
        with of_validation_data():
            validation_blocks = data.place(*parts)
        _check_same_rows(blocks, validation_blocks)

    seating = None
    threads = options.strategy.threads_per_rank
    if workers:
        seating = seat_ranks(
            workers, shards=shards, threads_per_rank=threads, device=options.device
        )
        threads = seating.threads_per_rank
    window = data.fit_window(blocks, validation_blocks, model=model, seating=seating, shards=shards)
    spec = TrainingSpec(
        model=model,
        loss=options.loss,
        optimizer=options.optimizer,
        lr_scheduler=options.lr_scheduler,
        lr_scheduler_every=options.lr_scheduler_every,
        clip_grad_norm=options.clip_grad_norm,
        transform=options.transform,
        weighted=weighted,
        fields=blocks.fields,
        block_lengths=blocks.lengths,
        validation_lengths=() if validation_blocks is None else validation_blocks.lengths,
        epochs=int(options.epochs),
        batch_size=int(options.batch_size),
        shards=shards,
        window=window,
        shuffle=options.plan_shuffle,
        seed=int(options.seed),
        threads_per_rank=threads or _own_threads(),
        bitwise=options.strategy.bitwise,
        device=options.device,
        streamed=blocks.stream is not None,
        progress_interval_s=settings.progress_interval_s,
        sample=sample(blocks, min(MAX_SAMPLE_ROWS, options.batch_size // shards), client=client),
    )
    check_targets(blocks, client)
    if validation_blocks is not None:
        with of_validation_data():
            check_targets(validation_blocks, client)
    labels = _label_range(objective, blocks, client)
    output, target = try_step(spec, labels)
    found = resolve_heads(options.metrics, output, target, ignore_index=objective.ignore_index)
    spec = replace(spec, metrics=found.metrics, heads=found.heads)
    if labels is not None and isinstance(output, torch.Tensor):
        num_outputs = num_outputs_of(output)
        check_labels(spec, labels, num_outputs)
        spec = replace(spec, ignored_labels=labels.ignored)
        if validation_blocks is not None:
            with of_validation_data():
                validated = _label_range(objective, validation_blocks, client)
                if validated is not None:
                    check_labels(spec, validated, num_outputs)
    if seating is not None and client is not None and blocks.keys is not None:
        seating = seat_where_data_lies(seating, spec.plan(0), blocks.keys, client)
    return PreparedRun(
        spec=spec,
        blocks=blocks,
        validation=validation_blocks,
        workers=workers,
        seating=seating,
        notes=tuple(data.notes),
    )


def _default_shards(options: Options, workers: tuple[WorkerFacts, ...]) -> int:
    """Give one shard to each worker that can run a rank: a host has no more of them than cores."""
    if not workers:
        return 1
    seating = seat_ranks(
        workers,
        shards=options.batch_size,
        threads_per_rank=options.strategy.threads_per_rank,
        device=options.device,
    )
    return default_shards(options.batch_size, len(seating.workers))


def _label_range(objective: Objective, blocks: Blocks, client: Client | None) -> LabelRange | None:
    """Find the range of class labels where they lie; None if y holds no class labels."""
    ignore = objective.ignore_index
    place = _target_place(blocks)
    if ignore is None or place is None or blocks.fields[place].dtype.kind not in "iu":
        return None
    return label_range(blocks, ignore=ignore, place=place, client=client)


def _target_place(blocks: Blocks) -> int | None:
    """Find the field that is y; None where y is a dictionary."""
    names = [field.name for field in blocks.fields]
    return names.index("y") if "y" in names else None


def _check_known_sizes(features: Any, options: Options, shards: int) -> None:
    """Refuse too little data before any of it is computed, where its length is known."""
    shape = getattr(features, "shape", None)
    if not isinstance(shape, tuple) or not shape:
        return
    dims = getattr(features, "dims", ())  # of xarray
    axis = dims.index(options.batch_dim) if options.batch_dim in dims else 0
    if isinstance(shape[axis], int | np.integer):
        check_sizes(int(shape[axis]), batch_size=options.batch_size, shards=shards)


def _check_same_rows(blocks: Blocks, validation: Blocks) -> None:
    names = [[field.name for field in found.fields] for found in (blocks, validation)]
    if names[0] != names[1]:
        message = f"training data has {', '.join(names[0])}, but validation data {names[1]}"
        raise DataError(message)
    for field, other in zip(blocks.fields, validation.fields, strict=True):
        if field.shape != other.shape:
            message = (
                f"rows of {field.name} have shape {field.shape} in the training data, but "
                f"{other.shape} in the validation data"
            )
            raise DataError(message)


def _own_threads() -> int:
    return torch.get_num_threads()
