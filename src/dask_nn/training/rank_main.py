"""One rank from its first exchange to its outcome."""

from __future__ import annotations

import copy
import logging
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.data.batches import batch_dtypes
from dask_nn.data.randomness import SeededRandomness, restored_generator
from dask_nn.errors import (
    Aborted,
    CollectiveTimeout,
    DaskNNError,
    IncompatibleWorkers,
    NonFiniteLoss,
)
from dask_nn.metrics.objective import Objective
from dask_nn.training.canary import (
    canary_of,
    compare_canaries,
    expected_bits,
    fingerprint,
)
from dask_nn.training.checkpointing import Checkpointer
from dask_nn.training.layout import LeafLayout
from dask_nn.training.loop import TrainingLoop
from dask_nn.training.orders import Orders
from dask_nn.training.outcome import RankOutcome, Status
from dask_nn.training.runtime import rank_runtime
from dask_nn.training.snapshot import Keepsake
from dask_nn.training.state import TrainingState
from dask_nn.training.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.collectives.base import Communicator
    from dask_nn.data.reader import BlockReader
    from dask_nn.events import Progress
    from dask_nn.training.checkpointing import LastSave
    from dask_nn.training.snapshot import Snapshot
    from dask_nn.training.spec import TrainingSpec

__all__ = ["RankEnvironment", "rank_main"]

logger = logging.getLogger("dask_nn.training")


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """What a rank is given by whoever runs it.

    Parameters
    ----------
    comm : Communicator
        Not yet open; closed when the rank ends.
    reader, validation_reader : BlockReader
        Of the training and the validation blocks.
    address : str
        The rank's worker, for messages.
    orders : Orders
        What the rank is told while it trains.
    waiting : callable, optional
        Called now and then while it waits for checkpoints; raises Aborted to wait no longer.
    last_save : LastSave, optional
        What earlier gangs of this run have saved.
    start : callable, optional
        Gives the state from which to start; None for the beginning.
    carried : Keepsake, optional
        What an earlier rank of this run left in this process.
    canary : bytes
        The fingerprint that the run's first gang agreed on; empty for the first gang.
    keep : callable, optional
        Takes what this rank leaves for the next gang.
    checkpoint : Checkpoint, optional
        Where rank 0 saves the run.
    configuration : dict
        What every checkpoint says of the run.
    room_bytes : int, optional
        What windows of rows may take in this process.
    on_start, on_progress, on_epoch : callable, optional
        Told of the first step, of progress and of each epoch's record, on rank 0 alone.
    on_event : callable, optional
        Told of what else happens: a name and details.
    """

    comm: Communicator
    reader: BlockReader
    validation_reader: BlockReader | None = None
    address: str = "this process"
    orders: Orders = field(default_factory=Orders)
    waiting: Callable[[], None] | None = None
    last_save: LastSave | None = None
    start: Callable[[], Snapshot | None] | None = None
    carried: Keepsake | None = None
    canary: bytes = b""
    keep: Callable[[Keepsake], None] | None = None
    checkpoint: Checkpoint | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    room_bytes: int | None = None
    on_start: Callable[[dict[str, Any]], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None
    on_event: Callable[[str, dict[str, Any]], None] | None = None


def rank_main(spec: TrainingSpec, env: RankEnvironment) -> RankOutcome:
    """Train one rank; never raises, the outcome says how it ended."""
    standing = _Standing()
    outcome = _run(spec, env, standing)
    try:
        standing.leave(env)
    except BaseException:  # for want of memory, for example; what was trained is in the outcome
        logger.exception("rank %d leaves no state to the next gang", env.comm.rank)
        outcome = replace(outcome, has_state=False)
    finally:
        standing.close()
        env.comm.close()
    return outcome


def _run(spec: TrainingSpec, env: RankEnvironment, standing: _Standing) -> RankOutcome:
    """Train; whatever happens, peers hear of it."""
    comm = env.comm
    outcome: RankOutcome
    try:
        if torch.device(spec.device).type == "cuda":
            torch.cuda.init()  # else its generator is neither seeded at first nor given back
        with (
            rank_runtime(spec.threads_per_rank, deterministic=spec.bitwise),
            restored_generator(waiting=comm.at_work),
        ):
            try:
                return _train(spec, env, standing)
            finally:
                # At once: whoever publishes before peers hear of it completes the step alone.
                if standing.unfinished:
                    comm.abort()
    except (Aborted, CollectiveTimeout) as error:
        outcome = _failed(env, standing, "aborted", error)
    except BaseException as error:
        outcome = _failed(env, standing, "failed", error)
    finally:
        if standing.unfinished:
            comm.abort()
    return outcome


@dataclass
class _Standing:
    """How far the rank has come, for the outcome of a failure."""

    state: TrainingState | None = None
    start: Keepsake | None = None
    loop: TrainingLoop | None = None
    checkpointer: Checkpointer | None = None
    unfinished: bool = True
    over: bool = False
    failed: bool = False

    @property
    def has_state(self) -> bool:
        """Whether there is something to leave to the next gang."""
        return not (self.failed or (self.loop is None and self.start is None))

    def leave(self, env: RankEnvironment) -> None:
        """Leave the last completed step to the next gang, and to the checkpoint where asked.

        A rank that has not begun leaves what it started from: who it has that from may be gone.
        """
        keepsake = None
        if self.has_state:
            keepsake = self.start if self.loop is None else self.loop.keepsake()
        if keepsake is not None and env.keep is not None:
            env.keep(keepsake)
        done = self._save(keepsake, env)
        if self.loop is not None:
            self.loop.close()
        if not done:
            self._save(keepsake, env)  # it may have been told to meanwhile

    def _save(self, keepsake: Keepsake | None, env: RankEnvironment) -> bool:
        """Save as this rank is told to; tell whether nothing is left to do for it."""
        if self.checkpointer is None:
            return True
        # Before it is asked whether to save: who waits was told to save before.
        waits = self.over or env.orders.wait.is_set()
        # What it only started from is for the client to save: this rank has no claim yet.
        if keepsake is not None and self.loop is not None and env.orders.save.is_set():
            self.checkpointer.save(keepsake.snapshot)
        if waits:
            self.checkpointer.finish(partial(self._wait, env))
        return waits

    def close(self) -> None:
        """Let go of the threads that write checkpoints and load rows."""
        if self.checkpointer is not None:
            self.checkpointer.close()
        if self.loop is not None:
            self.loop.close()

    @staticmethod
    def _wait(env: RankEnvironment) -> None:
        env.comm.show_life()
        if env.waiting is not None:
            env.waiting()


def _train(spec: TrainingSpec, env: RankEnvironment, standing: _Standing) -> RankOutcome:
    comm = env.comm
    first = comm.rank == 0
    device = torch.device(spec.device)
    randomness = SeededRandomness(spec.seed)
    # An optimizer may begin with random numbers.
    state = standing.state = randomness.run_once(lambda: TrainingState(spec, device), "state")
    start = env.start() if env.start is not None else None
    carried = []
    if start is not None:
        start.load(state)
        if env.carried is not None:
            carried = env.carried.partials(start)
        standing.start = Keepsake(snapshot=start, carried=carried)
    layout = LeafLayout(state.model)
    objective = Objective(spec.loss, weighted=spec.weighted).with_ignored(spec.ignored_labels)
    dtypes = batch_dtypes(spec.fields, layout.floating)
    comm.open(shards=spec.shards, leaf_size=layout.size, dtype=layout.dtype, device=device)
    digest = fingerprint(
        copy.deepcopy(spec.model).to(device).train(),
        objective,
        spec,
        dtypes=dtypes,
        device=device,
        randomness=randomness,
    )
    saved = expected_bits(state.canary, spec)
    expected = env.canary or saved
    same = compare_canaries(
        digest,
        comm,
        place=env.address,
        refuse=spec.bitwise,
        expected=expected,
        origin="in the run's first gang" if env.canary else "when the run was saved",
    )
    # Once it does not hold, it does not hold for the rest of the run, on whatever workers.
    state.bitwise = state.bitwise and same
    if not saved:
        state.canary = canary_of(spec, expected or digest)
    validation = None
    if env.validation_reader is not None:
        validation = Validation(
            spec, objective=objective, reader=env.validation_reader, dtypes=dtypes, comm=comm
        )
    if first and env.checkpoint is not None:
        standing.checkpointer = Checkpointer(
            env.checkpoint,
            configuration=env.configuration,
            on_event=env.on_event,
            save_soon=env.orders.save_soon,
            last=env.last_save,
        )
    loop = TrainingLoop(
        spec,
        state,
        comm,
        layout=layout,
        objective=objective,
        randomness=randomness,
        reader=env.reader,
        dtypes=dtypes,
        validation=validation,
        orders=env.orders,
        device=device,
        on_progress=env.on_progress if first else None,
        on_epoch=env.on_epoch if first else None,
        start=start,
        carried=carried,
        checkpointer=standing.checkpointer,
        room_bytes=env.room_bytes,
    )
    standing.loop, standing.start = loop, None
    if first and env.on_start is not None:
        env.on_start(
            {
                "canary": expected or digest,
                "steps": state.steps,
                "epoch": state.epoch,
                "bitwise": state.bitwise,
            }
        )
    try:
        status: Status = "finished" if loop.run() else "stopped"
    except NonFiniteLoss:
        status = "non_finite"
    standing.unfinished = False
    standing.over = status != "stopped"
    return RankOutcome(
        rank=comm.rank,
        address=env.address,
        status=status,
        steps=state.steps,
        epoch=state.epoch,
        history=loop.history,
        state=loop.good_weights() if first else {},
        optimizer_state=state.optimizer_weights() if first else {},
        loss=loop.last_loss,
        bitwise=state.bitwise,
        collective=comm.name,
    )


def _failed(
    env: RankEnvironment, standing: _Standing, status: Status, error: BaseException
) -> RankOutcome:
    state = standing.state
    if isinstance(error, IncompatibleWorkers) and not env.canary:
        state = None  # this run did not begin, wherever it was saved
    standing.failed = status == "failed"
    text = "".join(traceback.format_exception(error))
    # What failed may refer to itself, and would keep the gang's memory until somebody collects it;
    # an error that goes into the outcome does so through this very rank's frame.
    traceback.clear_frames(error.__traceback__)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return RankOutcome(
        rank=env.comm.rank,
        address=env.address,
        status=status,
        has_state=standing.has_state,
        steps=state.steps if state is not None else 0,
        epoch=state.epoch if state is not None else 0,
        error=f"{type(error).__name__}: {error}",
        traceback=text,
        exception=error if isinstance(error, DaskNNError) else None,
        collective=env.comm.name,
    )
