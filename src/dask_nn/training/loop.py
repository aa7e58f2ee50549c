"""The training loop of one rank."""

from __future__ import annotations

import pickle
import time
from typing import TYPE_CHECKING

from dask_nn.collectives.tree import shard_range
from dask_nn.data.batches import Batch, ShardBatches
from dask_nn.errors import NonFiniteLoss
from dask_nn.events import Progress
from dask_nn.metrics.merge import compute, merge_named
from dask_nn.metrics.streams import BufferedMetrics
from dask_nn.training.fold import LocalFold
from dask_nn.training.layout import STOP, LeafLayout, LeafViews
from dask_nn.training.step import ShardStep
from dask_nn.training.update import Update, is_finite

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    import torch

    from dask_nn.collectives.base import Communicator
    from dask_nn.data.reader import BlockReader
    from dask_nn.metrics.objective import Objective
    from dask_nn.training.randomness import ShardRandomness
    from dask_nn.training.spec import TrainingSpec
    from dask_nn.training.state import TrainingState
    from dask_nn.training.validation import Validation

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Goes through the epochs of a run, together with the other ranks of its gang.

    A step is: compute the leaves of this rank's shards into the communicator's slots, publish
    them, prepare the next batch while the peers finish, collect the total, update.

    Parameters
    ----------
    spec : TrainingSpec
        The run.
    state : TrainingState
        Where it stands; changed in place.
    comm : Communicator
        An open one.
    layout : LeafLayout
        Of the state's model.
    objective : Objective
        The loss.
    randomness : ShardRandomness
        Of this rank.
    reader : BlockReader
        Of the training blocks.
    dtypes : tuple of torch.dtype
        Types of the batches' tensors.
    validation : Validation, optional
        Run after every epoch.
    stop_event : threading.Event
        Makes this rank vote to stop at the next step boundary.
    device : torch.device
        Where the model is.
    on_progress : callable, optional
        Gets a Progress now and then, on rank 0.
    on_epoch : callable, optional
        Gets the record of every epoch, on rank 0.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        state: TrainingState,
        comm: Communicator,
        *,
        layout: LeafLayout,
        objective: Objective,
        randomness: ShardRandomness,
        reader: BlockReader,
        dtypes: tuple[torch.dtype, ...],
        validation: Validation | None,
        stop_event: threading.Event,
        device: torch.device,
        on_progress: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._spec = spec
        self._state = state
        self._comm = comm
        self._validation = validation
        self._stop_event = stop_event
        self._on_progress = on_progress
        self._on_epoch = on_epoch
        self._own = range(*shard_range(comm.rank, comm.world_size, spec.shards))
        self._shard_step = ShardStep(
            state.model,
            objective=objective,
            layout=layout,
            randomness=randomness,
            transform=spec.transform,
            weighted=spec.weighted,
            device=device,
        )
        self._fold = LocalFold(layout, shards=spec.shards, own=self._own, device=device)
        self._total = self._first_total(layout)
        self._update = Update(
            layout,
            self._total,
            base_buffers=self._shard_step.base_buffers,
            optimizer=state.optimizer,
            scheduler=state.step_scheduler,
            divides=objective.kind == "mean_normalized",
            clip_grad_norm=spec.clip_grad_norm,
        )
        self._batches = ShardBatches(
            spec.plan_of,
            epochs=range(state.epoch, spec.epochs),
            first_step=state.step,
            shards=self._own,
            reader=reader,
            fields=spec.fields,
            dtypes=dtypes,
            check=comm.check_abort,
        )
        self._metrics = {
            shard: BufferedMetrics(spec.metrics) for shard in self._own if spec.metrics
        }
        self._plan = spec.plan(state.epoch)
        self._step_count = 0
        self._full_steps = 0
        self._shard_batch_size = self._plan.shard_batch_size
        self._next_batch: Batch | None = None
        self._epoch_start = state.weights()
        self.history: list[dict[str, float]] = []
        self.last_loss = 0.0

    def run(self) -> bool:
        """Train until the last epoch ends or somebody votes to stop.

        Returns
        -------
        bool
            Whether all epochs were finished.

        Raises
        ------
        NonFiniteLoss
            If a global batch has a loss that is NaN or infinite; its update is not made.
        """
        self._batches.start()
        try:
            while self._state.epoch < self._spec.epochs:
                if not self._run_epoch():
                    return False
        finally:
            self._batches.close()
        return True

    def good_weights(self) -> dict[str, torch.Tensor]:
        """Copy the weights, or those of the epoch's start if the present ones are not finite."""
        return self._state.weights() if self._state.is_finite() else self._epoch_start

    def _first_total(self, layout: LeafLayout) -> LeafViews:
        """Learn where totals arrive, by one exchange of zeros."""
        for slot in self._comm.slots():
            slot.zero_()
        self._comm.publish()
        return layout.views(self._comm.collect())

    def _run_epoch(self) -> bool:
        """Run one epoch from the state's step; return False if somebody voted to stop."""
        spec, state, comm, update = self._spec, self._state, self._comm, self._update
        plan = self._plan = spec.plan(state.epoch)
        # Up to here every shard has a full batch, which needs no looking up.
        self._full_steps = plan.num_samples // spec.shards // plan.shard_batch_size
        whole = state.step == 0
        loss_sum = normalizer = 0.0
        samples = 0
        started = reported = time.perf_counter()
        reports = self._on_progress is not None
        stop = False
        while state.step < plan.num_steps:
            full = state.step < self._full_steps
            step_count = self._step_count = spec.batch_size if full else plan.step_count(state.step)
            self._fold.run(comm.slots(), self._compute_leaf)
            comm.check_abort()  # a peer that is never late leaves no wait that would notice
            comm.publish()
            self._prepare_next_batch()
            comm.collect()
            total = update.read()
            self.last_loss = total.mean_loss
            if not is_finite(total):
                raise NonFiniteLoss(self.last_loss, state.steps, state.epoch)
            update.apply(total, step_count)
            loss_sum += total.loss
            normalizer += total.normalizer
            samples += step_count
            state.step += 1
            state.steps += 1
            now = time.perf_counter()
            if reports and now - reported >= spec.progress_interval_s:
                reported = now
                self._report(loss_sum, normalizer, samples / (now - started))
            stop = total.stop
            if stop and state.step < plan.num_steps:
                return False
        seconds = time.perf_counter() - started
        record = {"epoch": float(state.epoch), "loss": loss_sum / normalizer if normalizer else 0.0}
        record |= self._epoch_metrics()
        if self._validation is not None:
            record |= self._validation.run(state.model)
        record |= {"samples_per_s": samples / seconds, "seconds": seconds}
        if whole:
            self.history.append(record)
        state.end_epoch(record.get("val_loss", record["loss"]))
        self._epoch_start = state.weights()
        if self._on_epoch is not None:
            self._on_epoch(record)
        return not stop

    def _compute_leaf(self, shard: int, views: LeafViews) -> None:
        """Write the leaf of one of this rank's shards for the step at hand."""
        state = self._state
        count = self._count(state.step, shard)
        batch, self._next_batch = self._next_batch, None
        if batch is None:
            batch = self._batches.next(shard, count) if count else ()
        output = self._shard_step.compute(
            views,
            batch,
            step=state.steps,
            shard=shard,
            count=count,
            step_count=self._step_count,
        )
        if output is not None and self._metrics:
            self._metrics[shard].update(*output)
        if self._stop_event.is_set():
            views.tail[STOP] = 1.0

    def _prepare_next_batch(self) -> None:
        """Gather the first shard's next batch while the peers finish their step."""
        step = self._state.step + 1
        if step < self._plan.num_steps and (count := self._count(step, self._own.start)):
            self._next_batch = self._batches.next(self._own.start, count)

    def _count(self, step: int, shard: int) -> int:
        """Give the rows of a shard in a step of this epoch."""
        if step < self._full_steps:
            return self._shard_batch_size
        return self._plan.count(step, shard)

    def _report(self, loss_sum: float, normalizer: float, samples_per_s: float) -> None:
        shown: dict[str, float] = {}
        if self._metrics:
            shown = self._metrics[self._own.start].compute_running()
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    epoch=self._state.epoch,
                    step=self._state.step,
                    num_steps=self._plan.num_steps,
                    loss=loss_sum / normalizer if normalizer else 0.0,
                    metrics=shown,
                    samples_per_s=samples_per_s,
                )
            )

    def _epoch_metrics(self) -> dict[str, float]:
        """Merge the metrics of all shards, in the order of shards, and begin anew."""
        if not self._spec.metrics:
            return {}
        parts = [self._metrics[shard].partial() for shard in self._own]
        gathered = self._comm.all_gather_bytes(pickle.dumps(parts))
        merged = merge_named([part for chunk in gathered for part in pickle.loads(chunk)])  # noqa: S301
        for metrics in self._metrics.values():
            metrics.reset()
        return compute(self._spec.metrics, merged)
