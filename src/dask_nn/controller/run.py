"""A prepared run from its first step to its result."""

from __future__ import annotations

import copy
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.controller.graph import run_graph
from dask_nn.controller.listening import Listener
from dask_nn.controller.rank_group import choose_collective
from dask_nn.controller.resume import (
    SavedRun,
    check_best,
    check_shared,
    describe_run,
    newest_checkpoint,
)
from dask_nn.controller.spmd import run_spmd
from dask_nn.controller.worker_side import RankPayload
from dask_nn.errors import (
    NonFiniteLoss,
    RankFailed,
    TrainingError,
    TrainingInterrupted,
    WorkerLost,
)
from dask_nn.events import Event, Progress, RunInfo
from dask_nn.presses import Presses
from dask_nn.training.in_process import run_in_process
from dask_nn.training.result import TrainingResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distributed import Client

    from dask_nn.callbacks.base import Callback
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.config import Settings
    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.options import Engine
    from dask_nn.controller.preparation import PreparedRun
    from dask_nn.training.outcome import RunEnd
    from dask_nn.training.snapshot import Snapshot

__all__ = ["execute"]

logger = logging.getLogger("dask_nn")


def execute(
    prepared: PreparedRun,
    *,
    engine: Engine,
    callbacks: Sequence[Callback],
    client: Client | None,
    settings: Settings,
    called_s: float,
    recovery: Recovery,
    checkpoint: Checkpoint | None,
    saved: SavedRun | None,
    resume: bool = False,
) -> TrainingResult:
    """Train and give the result.

    Parameters
    ----------
    prepared : PreparedRun
        What to train, and where.
    engine : str
        ``"spmd"`` or ``"graph"``; without a client both train in this process.
    callbacks : sequence of Callback
        Told how it goes.
    client : Client or None
        Of the cluster.
    settings : Settings
        In force.
    called_s : float
        When the user called, by ``time.monotonic()``.
    recovery : Recovery
        How to go on when workers are lost, hang or join.
    checkpoint : Checkpoint or None
        Where the run is saved.
    saved : SavedRun, optional
        The checkpoint from which to go on.
    resume : bool
        Whether one was asked for.

    Raises
    ------
    TrainingInterrupted
        After Ctrl-C; carries what is trained so far.
    NonFiniteLoss
        Carries the last good state.
    RankFailed
        If a rank raised an exception.
    WorkerLost
        If workers were lost and the run did not go on; carries what is trained so far.
    """
    spec, seating = prepared.spec, prepared.seating
    collective = "serial"
    if seating is not None:
        collective = (
            "tasks"
            if engine == "graph"
            else choose_collective(seating, device=spec.device, wanted=settings.collective)
        )
    info = RunInfo(
        engine=engine,
        strategy="synchronous",
        num_workers=len(prepared.workers),
        world_size=1 if seating is None else len(seating.workers),
        shards=spec.shards,
        threads_per_rank=spec.threads_per_rank,
        collective=collective,
        num_samples=prepared.blocks.num_samples,
        num_blocks=len(prepared.blocks.lengths),
        size_bytes=prepared.blocks.size_bytes,
        streamed=prepared.blocks.stream is not None,
        window=spec.window,
        num_steps=spec.plan(0).num_steps,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
    )
    story = _Story(info, callbacks, called_s)
    for name, details in prepared.notes:
        story.on_named_event(name, details)
    configuration = describe_run(spec, saved=checkpoint is not None)
    if checkpoint is not None:
        check_best(checkpoint, spec, validated=prepared.validation is not None)
        if client is not None and seating is not None:
            check_shared(checkpoint, client, seating.addresses)
    start = None
    if saved is not None:
        saved.check(configuration)
        start = saved.snapshot
        story.num_epochs = start.epoch
        _tell_of_resumption(saved, story)
    elif resume and checkpoint is not None:
        story.on_named_event("no-checkpoint", {"path": str(checkpoint.url)})
    presses = Presses()
    if client is None or seating is None:
        train = partial(
            run_in_process,
            spec,
            prepared.blocks,
            prepared.validation,
            presses=presses,
            start=start,
            checkpoint=checkpoint,
            configuration=configuration,
            on_start=story.on_start,
            on_progress=story.on_progress,
            on_epoch=story.on_epoch,
            on_event=story.on_named_event,
        )
        with presses.kept():
            return _finish(train, story, prepared, presses)
    payload = RankPayload(
        spec=spec,
        data=prepared.blocks.source,
        validation=None if prepared.validation is None else prepared.validation.source,
        settings=settings,
        start=start,
        checkpoint=checkpoint,
        configuration=configuration,
    )
    if engine == "graph":
        train = partial(
            run_graph,
            payload,
            client=client,
            seating=seating,
            listener=story.listener,
            recovery=recovery,
            restore_blocks=partial(_restore, prepared, client),
        )
        return _finish(train, story, prepared, presses)  # it hears of Ctrl-C by itself
    train = partial(
        run_spmd,
        payload,
        client=client,
        workers=prepared.workers,
        seating=seating,
        listener=story.listener,
        recovery=recovery,
        restore_blocks=partial(_restore, prepared, client),
        reload=partial(_reload, checkpoint, configuration, story),
        presses=presses,
    )
    with presses.kept():
        return _finish(train, story, prepared, presses)


def _finish(
    train: Callable[[], RunEnd],
    story: _Story,
    prepared: PreparedRun,
    presses: Presses,
) -> TrainingResult:
    """Train, and give the result or the error; to who pressed Ctrl-C meanwhile, as just that."""
    try:
        result = _conclude(train(), story, prepared)
    except Exception as error:
        if isinstance(error, TrainingError):
            error.events = story.events
        if presses.pending:
            raise TrainingInterrupted(getattr(error, "result", None)) from error
        raise
    if presses.pending:
        raise TrainingInterrupted(result)
    return result


class _Story:
    """Passes on what happens to the callbacks, and keeps it for the result."""

    def __init__(self, info: RunInfo, callbacks: Sequence[Callback], called_s: float) -> None:
        self.info = info
        self.events: list[Event] = []
        self.start_s = float("nan")
        self.num_epochs = 0
        self._callbacks = callbacks
        self._called_s = called_s

    @property
    def listener(self) -> Listener:
        return Listener(
            on_start=self.on_start,
            on_progress=self.on_progress,
            on_epoch=self.on_epoch,
            on_event=self.on_event,
        )

    def on_start(self) -> None:
        self.start_s = time.monotonic() - self._called_s
        for callback in self._callbacks:
            callback.on_train_start(self.info)

    def on_progress(self, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_progress(progress)

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        logger.info("%s %s", event.name, event.details)
        for callback in self._callbacks:
            callback.on_event(event)

    def on_named_event(self, name: str, details: dict[str, Any]) -> None:
        self.on_event(Event(name=name, time_s=time.time(), details=details))

    def on_epoch(self, record: dict[str, float]) -> None:
        if record["epoch"] < self.num_epochs:
            return  # told already, by a gang that was lost before the next step
        self.num_epochs += 1
        for callback in self._callbacks:
            callback.on_epoch_end(dict(record))

    def on_end(self, result: TrainingResult) -> None:
        for callback in self._callbacks:
            callback.on_train_end(result)


def _restore(prepared: PreparedRun, client: Client) -> None:
    for blocks in (prepared.blocks, prepared.validation):
        if blocks is not None:
            blocks.restore(client)


def _reload(
    checkpoint: Checkpoint | None,
    configuration: dict[str, Any],
    story: _Story,
) -> Snapshot | None:
    """Give the newest checkpoint of this run after all its ranks were lost."""
    # Not a check whether it can be written: a disk that is full may still be read.
    saved = None if checkpoint is None else newest_checkpoint(checkpoint)
    if saved is None:
        return None
    saved.check(configuration)
    _tell_of_resumption(saved, story)
    return saved.snapshot


def _tell_of_resumption(saved: SavedRun, story: _Story) -> None:
    for path, reason in saved.skipped:
        story.on_named_event("checkpoint-refused", {"path": path, "reason": reason})
    story.on_named_event("resumed", {"path": saved.path, "steps": saved.snapshot.steps})
    now = torch.__version__.split("+")[0]
    if saved.torch != now:
        story.on_named_event("other-torch", {"saved": saved.torch, "now": now})


def _tell_the_rest(story: _Story, result: TrainingResult, *, over: bool) -> None:
    """Tell callbacks of what they have not heard yet, and of the end."""
    try:
        for record in result.history[story.num_epochs :]:
            story.on_epoch(record)
        if over:
            story.on_end(result)
    except KeyboardInterrupt:
        raise TrainingInterrupted(result) from None


def _conclude(end: RunEnd, story: _Story, prepared: PreparedRun) -> TrainingResult:
    """Turn outcomes into a result, or into the error that explains them best."""
    outcomes, interrupted, lost = end.outcomes, end.interrupted, end.lost
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed and not (interrupted or lost):
        first = failed[0]
        if first.exception is not None and not first.steps:
            raise first.exception
        raise RankFailed(first.error, first.rank, first.steps, first.address, first.traceback)
    leader = next((o for o in outcomes if o.rank == 0 and o.state), None)
    if leader is None:
        if lost is not None:
            raise lost
        if interrupted:
            raise TrainingInterrupted(None)
        ended = outcomes[0] if outcomes else None
        message = "the gang ended without a result" if ended is None else ended.error
        raise RankFailed(
            message,
            -1 if ended is None else ended.rank,
            0 if ended is None else ended.steps,
            "?" if ended is None else ended.address,
            "" if ended is None else ended.traceback,
        )
    model = copy.deepcopy(prepared.spec.model).cpu()
    model.load_state_dict(leader.state)
    result = TrainingResult(
        model=model.eval(),
        history=leader.history,
        run=story.info,
        start_s=story.start_s,
        steps=leader.steps,
        bitwise=leader.bitwise,
        optimizer_state=leader.optimizer_state,
        events=story.events,
    )
    _tell_the_rest(story, result, over=lost is None)
    if lost is not None:
        raise WorkerLost(lost.address, lost.rank, lost.reason, result)
    is_finite = leader.status != "non_finite"
    # No variable may hold an error that is raised: the cycle would keep the run's blocks.
    not_finite = partial(NonFiniteLoss, leader.loss, leader.steps, leader.epoch, result)
    if leader.status == "stopped" or interrupted:
        raise TrainingInterrupted(result) from (None if is_finite else not_finite())
    if not is_finite:
        raise not_finite()
    return result
