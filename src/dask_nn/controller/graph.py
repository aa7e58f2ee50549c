"""The graph engine: every shard gradient, addition and update is a Dask task of its own.

Steps are submitted in groups. A group's tasks depend on each other through the snapshots that the
updates return, so the scheduler sees, places and retries every piece of work by itself.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
import traceback
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from distributed import KilledWorker
from distributed.client import FutureCancelledError

from dask_nn.controller import graph_tasks as tasks
from dask_nn.controller.cluster import scheduler_address
from dask_nn.controller.graph_steps import BlockTasks, StepTasks, same_bits
from dask_nn.data.sending import send
from dask_nn.errors import ClusterError, RankFailed, WorkerLost
from dask_nn.events import Event, Progress
from dask_nn.metrics.merge import compute, merge_named
from dask_nn.training.checkpointing import Checkpointer
from dask_nn.training.outcome import RankOutcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client, Future

    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.listening import Listener
    from dask_nn.controller.placement import Seating
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.data.plan import Plan
    from dask_nn.training.outcome import Status
    from dask_nn.training.snapshot import Snapshot

__all__ = ["run_graph"]

# Steps of one submission: enough to keep workers busy, few enough to stop soon.
GROUP_STEPS = 16
POLL_S = 0.2
# After Ctrl-C the steps under way may take so long to finish.
STOP_S = 1.2


def run_graph(
    payload: RankPayload,
    *,
    client: Client,
    seating: Seating,
    listener: Listener,
    recovery: Recovery,
    restore_blocks: Callable[[], None],
) -> tuple[list[RankOutcome], bool]:
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
        How often to start again where the scheduler cannot go on by itself.
    restore_blocks : callable
        Puts blocks that only the client can make again back on the cluster.

    Returns
    -------
    list of RankOutcome
        One, with the trained state.
    bool
        Whether Ctrl-C ended the run.
    """
    run = _GraphRun(
        payload,
        client=client,
        listener=listener,
        recovery=recovery,
        restore_blocks=restore_blocks,
    )
    try:
        run.compare_workers([worker.address for worker in seating.workers])
        listener.on_start()
        return [run.train()], run.interrupted
    except RankFailed as error:
        # A future refers to its error, and the error to the frames that hold the run's futures.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        outcome = RankOutcome(
            rank=error.rank,
            address=error.address,
            status="failed",
            steps=error.step,
            error=error.message,
            traceback=error.traceback,
        )
        return [outcome], run.interrupted
    finally:
        run.close()


class _GraphRun:
    def __init__(
        self,
        payload: RankPayload,
        *,
        client: Client,
        listener: Listener,
        recovery: Recovery,
        restore_blocks: Callable[[], None],
    ) -> None:
        self._spec = payload.spec
        self._data = payload.data
        self._validation = payload.validation
        self._client = client
        self._listener = listener
        self._run_id = uuid.uuid4().hex[:12]
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._pickled = cloudpickle.dumps(payload.spec, protocol=pickle.HIGHEST_PROTOCOL)
        self._failures = 0
        self._send_payload()
        self._bitwise = True
        self._history: list[dict[str, float]] = []
        self._latest: Snapshot
        self._state: Future[Any]
        self._start = payload.start
        self._recovery = recovery
        self._restore_blocks = restore_blocks
        self._checkpointer = None
        if payload.checkpoint is not None:
            self._checkpointer = Checkpointer(
                payload.checkpoint,
                configuration=payload.configuration | {"run_id": self._run_id},
                on_event=self._tell,
            )
        self.interrupted = False
        self._cut_short = False

    def _pass_on(self) -> None:
        """Tell, in this thread, what the thread that writes checkpoints had to tell."""
        while not self._told.empty():
            self._listener.on_event(self._told.get())

    def _tell(self, name: str, details: dict[str, Any]) -> None:
        self._told.put(Event(name=name, time_s=time.time(), details=details))

    def _send_payload(self) -> None:
        self._payload = send(self._client, self._pickled, broadcast=True)
        self._steps = StepTasks(
            self._client,
            self._spec,
            payload=self._payload,
            data=self._data,
            run_id=self._run_id,
            # A second attempt must not meet the tasks of the first.
            suffix=f"-{self._failures}" if self._failures else "",
        )

    def compare_workers(self, addresses: list[str]) -> None:
        """Check that the workers compute the same bits."""
        self._bitwise = same_bits(
            self._client, self._payload, self._run_id, addresses, refuse=self._spec.bitwise
        )

    def train(self) -> RankOutcome:
        """Go through the epochs; Ctrl-C ends them with the last snapshot that is known."""
        if self._start is None:
            self._state = self._client.submit(
                tasks.first_snapshot, self._payload, self._run_id, pure=False
            )
            self._latest = self._wait(self._state)
        else:
            self._latest = self._start
            self._history = list(self._start.history)
            self._state = send(self._client, self._start)
        epoch_start = self._latest
        self._cut_short = True  # until it is known how the run ended: what it reached is saved
        if self._checkpointer is not None:
            self._checkpointer.begin(self)
        status: Status = "stopped"
        try:
            for epoch in range(self._latest.epoch, self._spec.epochs):
                epoch_start = self._latest
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
            self.interrupted = True
        self._cut_short = self.interrupted
        snapshot = self._latest
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
            bitwise=self._bitwise,
            collective="tasks",
        )

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        return self._latest.steps

    @property
    def epoch(self) -> int:
        """Epochs completed over the whole run."""
        return self._latest.epoch

    def snapshot(self) -> Snapshot:
        """Give the latest state with the records of the finished epochs."""
        return replace(self._latest, history=tuple(self._history))

    def close(self) -> None:
        """Let the workers forget the run."""
        if self._checkpointer is not None:
            if self._cut_short:
                self._checkpointer.save(self.snapshot())
            self._checkpointer.finish(self._pass_on)
            self._checkpointer.close()
        self._pass_on()
        with contextlib.suppress(Exception):
            self._client.run(tasks.forget_benches, self._run_id, on_error="ignore")

    def _run_epoch(self, epoch: int) -> dict[str, float] | None:
        """Run one epoch from the latest snapshot; None if it was ended early."""
        plan = self._spec.plan(epoch)
        started = time.perf_counter() - self._latest.seconds
        partials: list[list[Any]] = [[] for _ in range(self._spec.shards)]
        samples = self._latest.samples
        for first in range(self._latest.step, plan.num_steps, GROUP_STEPS):
            steps = range(first, min(first + GROUP_STEPS, plan.num_steps))
            found = self._persist(partial(self._run_group, plan, epoch, steps))
            for shard, part in enumerate(found):
                partials[shard].append(part)
            samples += sum(plan.step_count(t) for t in steps)
            snapshot = self._latest
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
        record = {"epoch": float(epoch), "loss": _mean_loss(self._latest)}
        record |= self._metrics(partials) | self._persist(self._validate)
        record |= {"samples_per_s": plan.num_samples / seconds, "seconds": seconds}
        self._persist(partial(self._end_epoch, record.get("val_loss", record["loss"])))
        return record

    def _run_group(self, plan: Plan, epoch: int, steps: range) -> list[Any]:
        """Run some steps from the latest snapshot; give each shard's metrics."""
        state, found = self._steps.submit(plan, epoch, steps, self._state)
        snapshot = self._wait(state)
        partials: list[Any] = self._client.gather(found)
        self._steps.drop_before(steps.stop)
        self._state, self._latest = state, snapshot
        return partials

    def _end_epoch(self, monitored: float) -> None:
        state = self._client.submit(
            tasks.end_epoch, self._payload, self._run_id, self._state, monitored, pure=False
        )
        self._latest = self._wait(state)
        self._state = state

    def _persist[T](self, work: Callable[[], T]) -> T:
        """Do some work of tasks; where Dask itself cannot heal it, again from the last snapshot.

        The scheduler computes again what a lost worker had computed. It gives up where data was
        lost that was sent, not computed, or where a task was on too many workers that died.
        """
        while True:
            try:
                return work()
            except (KilledWorker, FutureCancelledError, OSError) as error:
                if self._client.status != "running":
                    message = f"the connection to the scheduler is {self._client.status}"
                    raise ClusterError(message) from error
                self._start_again(error)

    def _start_again(self, error: BaseException) -> None:
        """Put the latest snapshot, and what else only the client has, on the cluster anew."""
        began = time.monotonic()
        self._failures += 1
        limit = self._recovery.max_failures
        if limit is not None and self._failures > limit:
            reason = f"{self._failures} failures, more than max_failures={limit}: {error}"
            raise WorkerLost("", -1, reason) from error
        try:
            self._client.wait_for_workers(
                self._recovery.min_workers, timeout=self._recovery.workers_timeout_s
            )
        except TimeoutError as late:
            raise WorkerLost("", -1, f"{late}") from error
        self._restore_blocks()
        self._send_payload()
        self._state = send(self._client, self._latest)
        details = {
            "lost": [],
            "ranks": len(self._client.scheduler_info(n_workers=-1)["workers"]),
            "step": self._latest.steps,
            "seconds": time.monotonic() - began,
            "reason": f"{error}",
        }
        self._listener.on_event(Event(name="recovered", time_s=time.time(), details=details))

    def _metrics(self, partials: list[list[Any]]) -> dict[str, float]:
        if not self._spec.metrics:
            return {}
        merged = merge_named([merge_named(parts) for parts in partials])
        return compute(self._spec.metrics, merged)

    def _validate(self) -> dict[str, float]:
        if self._validation is None:
            return {}
        futures = [
            self._client.submit(
                tasks.validate_block,
                self._payload,
                self._run_id,
                self._state,
                block,
                pure=False,
            )
            for block in BlockTasks(self._client, self._validation).all()
        ]
        merged = merge_named(self._client.gather(futures))
        return {f"val_{name}": value for name, value in compute(self._spec.metrics, merged).items()}

    def _wait(self, future: Future[Any]) -> Any:
        """Give a future's value; Ctrl-C leaves it a moment, for a step boundary to be reached."""
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        deadline: float | None = None
        while not done.is_set():
            if deadline is not None and time.monotonic() > deadline:
                raise KeyboardInterrupt
            try:
                done.wait(POLL_S)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True
                deadline = time.monotonic() + STOP_S
        return future.result()


def _mean_loss(snapshot: Snapshot) -> float:
    return snapshot.loss_sum / snapshot.normalizer if snapshot.normalizer else 0.0
