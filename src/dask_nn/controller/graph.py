"""The graph engine: every shard gradient, addition and update is a Dask task of its own.

Steps are submitted in groups. A group's tasks depend on each other through the snapshots that the
updates return, so the scheduler sees, places and retries every piece of work by itself.
"""

from __future__ import annotations

import contextlib
import queue
import time
import traceback
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from distributed import KilledWorker
from distributed.client import FutureCancelledError

from dask_nn.controller import graph_tasks as tasks
from dask_nn.controller.cluster import (
    ask_workers,
    list_workers,
    scheduler_address,
    scheduler_lost,
)
from dask_nn.controller.graph_healing import Healing
from dask_nn.controller.graph_progress import GraphProgress
from dask_nn.controller.graph_waits import TaskWaits
from dask_nn.controller.graph_watch import WorkerWatch
from dask_nn.controller.leases import Leases
from dask_nn.errors import RankFailed
from dask_nn.events import Event, Progress
from dask_nn.metrics.merge import compute, merge_named
from dask_nn.training.checkpointing import Checkpointer
from dask_nn.training.outcome import RankOutcome, RunEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.listening import Listener
    from dask_nn.controller.placement import Seating
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.training.outcome import Status
    from dask_nn.training.snapshot import Snapshot

__all__ = ["run_graph"]

# Steps of one submission: enough to keep workers busy, few enough to stop soon.
GROUP_STEPS = 16
FORGET_S = 1.0
# What Dask raises where it cannot go on by itself; the user's errors come as RankFailed.
BROKEN = (KilledWorker, FutureCancelledError, OSError, KeyError)


def run_graph(
    payload: RankPayload,
    *,
    client: Client,
    seating: Seating,
    listener: Listener,
    recovery: Recovery,
    restore_blocks: Callable[[], None],
) -> RunEnd:
    """Train by tasks.

    Parameters
    ----------
    payload : RankPayload
        What is trained, and the keys of its blocks.
    client : Client
        Of the cluster.
    seating : Seating
        Its workers are compared before training; tasks may run on any worker.
    listener : Listener
        Told of starts, progress and epochs.
    recovery : Recovery
        When workers are given up, and how often to start again where the scheduler cannot go on
        by itself.
    restore_blocks : callable
        Puts blocks that only the client can make again back on the cluster.

    Returns
    -------
    RunEnd
        With one outcome, which has the trained state or says what failed; with none where Ctrl-C
        came before there was one.

    Raises
    ------
    WorkerLost
        If workers were lost and `recovery` says not to go on.
    ClusterError
        If the scheduler is gone, or other trainings keep the workers for too long.
    """
    run = _GraphRun(
        payload,
        client=client,
        seating=seating,
        listener=listener,
        recovery=recovery,
        restore_blocks=restore_blocks,
    )
    outcomes: list[RankOutcome] = []
    try:
        with run.at_work():
            outcomes.append(run.train())
    except RankFailed as error:
        # A future refers to its error, and the error to the frames that hold the run's futures.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        failed = RankOutcome(
            rank=error.rank,
            address=error.address,
            status="failed",
            steps=error.step,
            error=error.message,
            traceback=error.traceback,
        )
        return RunEnd(outcomes=[failed], interrupted=run.interrupted)
    except KeyboardInterrupt:
        return RunEnd(outcomes=outcomes, interrupted=True)
    return RunEnd(outcomes=outcomes, interrupted=run.interrupted)


class _GraphRun:
    def __init__(
        self,
        payload: RankPayload,
        *,
        client: Client,
        seating: Seating,
        listener: Listener,
        recovery: Recovery,
        restore_blocks: Callable[[], None],
    ) -> None:
        self._spec = payload.spec
        self._client = client
        self._listener = listener
        self._seating = seating
        self._settings = payload.settings
        self._run_id = uuid.uuid4().hex[:12]
        self._leases = Leases(client, self._run_id)
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._history: list[dict[str, float]] = []
        self._restore_blocks = restore_blocks
        self._healing = Healing(client, recovery, listener)
        self._watch = WorkerWatch(
            client,
            seating.workers,
            self._run_id,
            hang_timeout_s=recovery.hang_timeout_s,
            start_timeout_s=payload.settings.start_timeout_s,
            # Nothing here may refer to this object: a cycle would keep its futures.
            on_loss=self._healing.note,
        )
        self._waits = TaskWaits(client, self._watch)
        self._progress = GraphProgress(
            payload, client=client, waits=self._waits, run_id=self._run_id
        )
        self._checkpointer = None
        if payload.checkpoint is not None:
            self._checkpointer = Checkpointer(
                payload.checkpoint,
                configuration=payload.configuration | {"run_id": self._run_id},
                on_event=self._tell,
            )
        self._cut_short = False

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self._waits.interrupted

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the workers for the length of a block; nothing of the run stays after it."""
        try:
            self._take_turns()
            with self._watch:
                yield
        finally:
            self._close()

    def _take_turns(self) -> None:
        """Wait until no other training has one of the workers: tasks may run on any of them."""
        self._leases.wait_for(
            list_workers(self._client),
            self._settings.queue_timeout_s,
            lambda others: self._listener.on_event(
                Event(name="queued", time_s=time.time(), details={"workers": sorted(others)})
            ),
        )

    def _pass_on(self) -> None:
        """Tell, in this thread, what the thread that writes checkpoints had to tell."""
        while not self._told.empty():
            self._listener.on_event(self._told.get())

    def _tell(self, name: str, details: dict[str, Any]) -> None:
        self._told.put(Event(name=name, time_s=time.time(), details=details))

    def _begin(self) -> Snapshot:
        """Give the state before the first step."""
        return self._progress.begin(
            [worker.address for worker in self._seating.workers], self._watch.is_present
        )

    def train(self) -> RankOutcome:
        """Go through the epochs; Ctrl-C ends them with the last snapshot that is known."""
        begun = self._persist(self._begin)
        self._history = list(begun.history)
        self._listener.on_start()
        epoch_start = begun
        self._cut_short = True  # until it is known how the run ended: what it reached is saved
        if self._checkpointer is not None:
            self._checkpointer.begin(self)
        status: Status = "stopped"
        interrupted = False
        try:
            for epoch in range(begun.epoch, self._spec.epochs):
                epoch_start = self._progress.latest
                record = self._run_epoch(epoch)
                if record is None:
                    break
                self._history.append(record)
                self._listener.on_epoch(record)
                if self._checkpointer is not None:
                    self._checkpointer.after_epoch(self, record)
            else:
                status = "finished"
        except KeyboardInterrupt:
            interrupted = self._waits.interrupted = True
        self._cut_short = interrupted or self.interrupted
        snapshot = self._progress.latest
        if snapshot.non_finite:
            status = "non_finite"
        finite = all(
            bool(torch.isfinite(value).all())
            for value in snapshot.weights.values()
            if value.is_floating_point()
        )
        kept = snapshot if finite else epoch_start
        return RankOutcome(
            rank=0,
            address=scheduler_address(self._client),
            status=status,
            steps=snapshot.steps,
            epoch=snapshot.epoch,
            history=self._history,
            state=kept.weights,
            optimizer_state=kept.optimizer,
            loss=snapshot.last_loss,
            bitwise=snapshot.bitwise,
            collective="tasks",
        )

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        return self._progress.steps

    @property
    def epoch(self) -> int:
        """Epochs completed over the whole run."""
        return self._progress.latest.epoch

    def snapshot(self) -> Snapshot:
        """Give the latest state with the records of the finished epochs."""
        return replace(self._progress.latest, history=tuple(self._history))

    def _close(self) -> None:
        """Save what is reached, and let the workers forget the run."""
        try:
            if self._checkpointer is not None:
                self._finish_saving(self._checkpointer)
            self._pass_on()
        finally:
            self._let_go()

    def _finish_saving(self, checkpointer: Checkpointer) -> None:
        try:
            if self._cut_short:
                checkpointer.save(self.snapshot())
            checkpointer.finish(self._pass_on)
        finally:
            checkpointer.close()

    def _let_go(self) -> None:
        with contextlib.suppress(Exception):  # what ended the run says more
            if self._client.status == "running":
                self._leases.release()
                ask_workers(
                    self._client,
                    tasks.forget_benches,
                    self._watch.present,
                    self._run_id,
                    timeout_s=FORGET_S,
                ).result(2 * FORGET_S)

    def _run_epoch(self, epoch: int) -> dict[str, float] | None:
        """Run one epoch from the latest snapshot; None if it was ended early."""
        plan = self._spec.plan(epoch)
        snapshot = self._progress.latest
        started = time.perf_counter() - snapshot.seconds
        partials: list[list[Any]] = [[] for _ in range(self._spec.shards)]
        samples = snapshot.samples
        for first in range(snapshot.step, plan.num_steps, GROUP_STEPS):
            steps = range(first, min(first + GROUP_STEPS, plan.num_steps))
            found = self._persist(partial(self._progress.run_group, plan, epoch, steps))
            for shard, part in enumerate(found):
                partials[shard].append(part)
            samples += sum(plan.step_count(t) for t in steps)
            snapshot = self._progress.latest
            if snapshot.non_finite or (self.interrupted and steps.stop < plan.num_steps):
                return None
            self._listener.on_progress(
                Progress(
                    epoch=epoch,
                    step=steps.stop,
                    num_steps=plan.num_steps,
                    loss=_mean_loss(snapshot),
                    samples_per_s=samples / (time.perf_counter() - started),
                )
            )
            if self._checkpointer is not None and steps.stop < plan.num_steps:
                self._checkpointer.after_step(self)
            self._pass_on()
        seconds = time.perf_counter() - started
        record = {"epoch": float(epoch), "loss": _mean_loss(self._progress.latest)}
        record |= self._metrics(partials) | self._validation_metrics()
        record |= {"samples_per_s": plan.num_samples / seconds, "seconds": seconds}
        self._persist(partial(self._progress.end_epoch, record.get("val_loss", record["loss"])))
        return record

    def _persist[T](self, work: Callable[[], T]) -> T:
        """Do some work of tasks; where Dask itself cannot heal it, again from the last snapshot.

        The scheduler computes again what a lost worker had computed. It gives up where data was
        lost that was sent, not computed, or where a task was on too many workers that died.
        """
        progress = self._progress
        self._healing.steps = progress.steps
        while True:
            try:
                if not progress.is_sent:
                    if self._healing.failures:
                        self._waits.apart(self._restore_blocks)
                    progress.send(self._healing.failures)
                found = work()
            except BROKEN as error:
                if self._client.status != "running":
                    raise scheduler_lost(self._client) from error
                progress.is_sent = False
                self._healing.count(error)
                self._healing.wait_until_able(self._watch)
            else:
                self._healing.tell(len(self._watch.present))
                return found

    def _metrics(self, partials: list[list[Any]]) -> dict[str, float]:
        if not self._spec.metrics:
            return {}
        merged = merge_named([merge_named(parts) for parts in partials])
        return compute(self._spec.metrics, merged)

    def _validation_metrics(self) -> dict[str, float]:
        parts = self._persist(self._progress.validate)
        found = compute(self._spec.metrics, merge_named(parts)) if parts else {}
        return {f"val_{name}": value for name, value in found.items()}


def _mean_loss(snapshot: Snapshot) -> float:
    return snapshot.loss_sum / snapshot.normalizer if snapshot.normalizer else 0.0
