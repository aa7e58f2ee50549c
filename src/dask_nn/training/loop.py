"""The training loop of one rank."""

from __future__ import annotations

import pickle
import time
from functools import partial
from typing import TYPE_CHECKING

from dask_nn import faults
from dask_nn.collectives.tree import shard_range
from dask_nn.data.batches import Batch, ShardBatches, needs_of
from dask_nn.data.memory import windows_at_a_time
from dask_nn.errors import NonFiniteLoss
from dask_nn.events import Progress
from dask_nn.metrics.merge import compute, merge_named
from dask_nn.metrics.streams import BufferedMetrics
from dask_nn.training.fold import LocalFold
from dask_nn.training.layout import FIRST_MARK, STOP, LeafLayout, LeafViews
from dask_nn.training.snapshot import Keepsake, Snapshot
from dask_nn.training.step import ShardStep
from dask_nn.training.sums import EpochSums
from dask_nn.training.update import StepTotal, Update, is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from dask_nn.collectives.base import Communicator
    from dask_nn.data.randomness import SeededRandomness
    from dask_nn.data.reader import BlockReader
    from dask_nn.metrics.merge import Partial
    from dask_nn.metrics.objective import Objective
    from dask_nn.training.checkpointing import Checkpointer
    from dask_nn.training.orders import Orders
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
    randomness : SeededRandomness
        Of this rank.
    reader : BlockReader
        Of the training blocks.
    dtypes : tuple of torch.dtype
        Types of the batches' tensors.
    validation : Validation, optional
        Run after every epoch.
    orders : Orders
        What this rank is told; it votes so, and hears how its peers vote.
    device : torch.device
        Where the model is.
    on_progress : callable, optional
        Gets a Progress now and then, on rank 0.
    on_epoch : callable, optional
        Gets the record of every epoch, on rank 0.
    start : Snapshot, optional
        The state's own origin, where it is not the beginning: what it had summed up so far.
    carried : sequence of dict
        Partial metrics of this epoch from earlier gangs, merged with this rank's own.
    checkpointer : Checkpointer, optional
        Saves the run, on rank 0.
    room_bytes : int, optional
        What windows may take in this process; without it, two for each shard.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        state: TrainingState,
        comm: Communicator,
        *,
        layout: LeafLayout,
        objective: Objective,
        randomness: SeededRandomness,
        reader: BlockReader,
        dtypes: tuple[torch.dtype, ...],
        validation: Validation | None,
        orders: Orders,
        device: torch.device,
        on_progress: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        start: Snapshot | None = None,
        carried: Sequence[dict[str, Partial]] = (),
        checkpointer: Checkpointer | None = None,
        room_bytes: int | None = None,
    ) -> None:
        self._spec = spec
        self._state = state
        self._comm = comm
        self._randomness = randomness
        self._validation = validation
        self._orders = orders
        self._on_progress = on_progress
        self._on_epoch = on_epoch
        self._place = partial(_place, comm, state)
        self._own = range(*shard_range(comm.rank, comm.world_size, spec.shards))
        self._shard_step = ShardStep(
            state.model,
            objective=objective,
            layout=layout,
            randomness=randomness,
            transform=spec.transform,
            grouping=spec.grouping,
            device=device,
            place=self._place,
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
            randomness=randomness,
        )
        self._batches = ShardBatches(
            spec.plan_of,
            epochs=range(state.epoch, spec.epochs),
            first_step=state.step,
            shards=self._own,
            reader=reader,
            fields=spec.fields,
            dtypes=dtypes,
            check=comm.at_work,
            windows=self._windows_at_a_time(layout.floating, room_bytes, reader.loaders),
        )
        self._metrics = {
            shard: BufferedMetrics(spec.metrics, spec.heads) for shard in self._own if spec.metrics
        }
        self._plan = spec.plan(state.epoch)
        self._step_count = 0
        self._full_steps = 0
        self._shard_batch_size = self._plan.shard_batch_size
        self._next_batch: Batch | None = None
        self._epoch_start = state.weights()
        self._checkpointer = checkpointer
        self._carried = list(carried)
        # Outputs of the step under way: they count once the step is completed.
        self._pending: list[tuple[BufferedMetrics, torch.Tensor, torch.Tensor]] = []
        self._sums = EpochSums(start)
        self.history: list[dict[str, float]] = []
        self.last_loss = 0.0
        if start is not None:
            self.history = list(start.history)
            self.last_loss = start.last_loss

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
            if self._checkpointer is not None:
                self._checkpointer.begin(self)
            while self._state.epoch < self._spec.epochs:
                if not self._run_epoch():
                    return False
        finally:
            self._batches.stop()
        return True

    def close(self) -> None:
        """Wait for the rows that were being loaded when the loop ended; that may take long."""
        self._batches.close(self._comm.show_life)

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        return self._state.steps

    @property
    def epoch(self) -> int:
        """Epochs completed over the whole run."""
        return self._state.epoch

    def good_weights(self) -> dict[str, torch.Tensor]:
        """Copy the weights, or those of the epoch's start if the present ones are not finite."""
        return self._state.weights() if self._state.is_finite() else self._epoch_start

    def snapshot(self) -> Snapshot:
        """Copy the state after the last completed step, with what was summed up so far."""
        return Snapshot.take(
            self._state,
            last_loss=self.last_loss,
            history=tuple(self.history),
            **self._sums.as_fields(),
        )

    def keepsake(self) -> Keepsake:
        """Give what the next gang of this run may go on from; only after the loop has ended."""
        self._shard_step.restore_buffers()
        return Keepsake(
            snapshot=self.snapshot(),
            metrics=list(self._metrics.values()),
            pending=self._pending,
            carried=self._carried,
        )

    def _first_total(self, layout: LeafLayout) -> LeafViews:
        """Learn where totals arrive, by one exchange of zeros."""
        for slot in self._comm.slots():
            slot.zero_()
        self._comm.publish()
        return layout.views(self._comm.collect())

    def _windows_at_a_time(
        self, floating: torch.dtype, room_bytes: int | None, loaders: int
    ) -> int:
        """Give 2 if this rank has room for the next window of each shard beside the one in use."""
        return windows_at_a_time(
            needs_of(
                self._spec.fields,
                self._spec.block_lengths,
                floating,
                validation_lengths=self._spec.validation_lengths,
                loaders=loaders,
            ),
            window=self._spec.window,
            shards=len(self._own),
            room_bytes=room_bytes,
        )

    def _run_epoch(self) -> bool:
        """Run one epoch from the state's step; return False if somebody voted to stop."""
        spec, state, comm = self._spec, self._state, self._comm
        plan = self._plan = spec.plan(state.epoch)
        # Up to here every shard has a full batch, which needs no looking up.
        self._full_steps = plan.num_samples // spec.shards // plan.shard_batch_size
        reported = time.perf_counter()
        reports = self._on_progress is not None
        stop = False
        while state.step < plan.num_steps:
            full = state.step < self._full_steps
            step_count = self._step_count = spec.batch_size if full else plan.step_count(state.step)
            self._pending.clear()
            self._fold.run(comm.slots(), self._compute_leaf)
            if faults.hook is not None:
                faults.hook("before exchange", self._place())
            comm.publish()
            self._prepare_next_batch()
            if faults.hook is not None:
                faults.hook("between fold and gather", self._place())
            comm.collect()
            total = self._update.read()
            self.last_loss = total.mean_loss
            if not is_finite(total):
                raise NonFiniteLoss(self.last_loss, state.steps, state.epoch)
            self._complete(total, step_count)
            now = time.perf_counter()
            if reports and now - reported >= spec.progress_interval_s:
                reported = now
                self._report()
            stop = total.stop
            if stop:
                self._orders.hear(save=total.save, wait=total.wait)
            if stop and state.step < plan.num_steps:
                return False
            if self._checkpointer is not None and state.step < plan.num_steps:
                self._checkpointer.after_step(self)
        self._end_epoch()
        return not stop

    def _complete(self, total: StepTotal, step_count: int) -> None:
        """Update, and count the step as done."""
        if faults.hook is not None:
            faults.hook("in the optimizer", self._place())
        self._update.apply(total, step_count, self._state.steps)
        self._sums.add(total, step_count)
        self._state.step += 1
        self._state.steps += 1
        for metrics, output, target in self._pending:
            metrics.update(output, target)
        if faults.hook is not None:
            faults.hook("applied", self._place())

    def _end_epoch(self) -> None:
        """Complete the epoch's record, and begin the next epoch."""
        state = self._state
        self._pending.clear()
        record = {"epoch": float(state.epoch), "loss": self._sums.loss}
        pace = self._sums.pace()
        record |= self._epoch_metrics()
        if self._validation is not None:
            record |= self._validation.run(state.model, state.steps)
        record |= pace
        for metrics in self._metrics.values():
            metrics.reset()
        self._carried = []
        self.history.append(record)
        monitored = record.get("val_loss", record["loss"])
        self._randomness.run_once(partial(state.end_epoch, monitored), "epoch", state.epoch)
        self._sums.restart()
        self._epoch_start = state.weights()
        if self._on_epoch is not None:
            self._on_epoch(record)
        if self._checkpointer is not None:
            self._checkpointer.after_epoch(self, record)

    def _compute_leaf(self, shard: int, views: LeafViews) -> None:
        """Write the leaf of one of this rank's shards for the step at hand."""
        state = self._state
        # A peer that is never late leaves no wait that would notice.
        self._comm.at_work()
        if faults.hook is not None:
            faults.hook("reading", self._place() | {"shard": shard})
        count = self._count(state.step, shard)
        batch, self._next_batch = self._next_batch, None
        if batch is None:
            batch = self._batches.next(shard, count) if count else ()
        if faults.hook is not None:
            faults.hook("forward", self._place() | {"shard": shard, "batch": batch})
        output = self._shard_step.compute(
            views,
            batch,
            step=state.steps,
            shard=shard,
            count=count,
            step_count=self._step_count,
        )
        if output is not None and self._metrics:
            self._pending.append((self._metrics[shard], *output))
        if self._orders.stop.is_set():
            for place, vote in zip(range(STOP, FIRST_MARK), self._orders.votes(), strict=True):
                views.tail[place] = vote

    def _prepare_next_batch(self) -> None:
        """Gather the first shard's next batch, if it is there, while the peers finish their step.

        If it never comes, the step under way is completed nevertheless: peers may have done so.
        """
        step = self._state.step + 1
        if step < self._plan.num_steps and (count := self._count(step, self._own.start)):
            self._next_batch = self._batches.next_if_there(self._own.start, count)

    def _count(self, step: int, shard: int) -> int:
        """Give the rows of a shard in a step of this epoch."""
        if step < self._full_steps:
            return self._shard_batch_size
        return self._plan.count(step, shard)

    def _report(self) -> None:
        shown: dict[str, float] = {}
        if self._metrics:
            shown = self._metrics[self._own.start].compute_running()
        blocks = rows = 0
        if self._spec.streamed:
            blocks, rows = self._plan.opened(self._state.step)
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    epoch=self._state.epoch,
                    step=self._state.step,
                    num_steps=self._plan.num_steps,
                    loss=self._sums.loss,
                    metrics=shown,
                    samples_per_s=self._sums.pace()["samples_per_s"],
                    blocks=blocks,
                    bytes=rows * self._spec.row_bytes,
                )
            )

    def _epoch_metrics(self) -> dict[str, float]:
        """Merge the metrics of all shards, in the order of shards."""
        if not self._spec.metrics:
            return {}
        parts = [*self._carried, *(self._metrics[shard].partial() for shard in self._own)]
        gathered = self._comm.all_gather_bytes(pickle.dumps(parts))
        merged = merge_named([part for chunk in gathered for part in pickle.loads(chunk)])  # noqa: S301
        return compute(self._spec.metrics, merged)


def _place(comm: Communicator, state: TrainingState) -> dict[str, int]:
    """Say where a rank is, for whoever breaks it in a test."""
    return {"rank": comm.rank, "step": state.steps}
