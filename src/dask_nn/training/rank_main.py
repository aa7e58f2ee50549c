"""One rank from its first exchange to its outcome."""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dask_nn.data.batches import batch_dtypes
from dask_nn.errors import Aborted, DaskNNError, NonFiniteLoss
from dask_nn.metrics.objective import Objective
from dask_nn.training.canary import compare_canaries, fingerprint
from dask_nn.training.layout import LeafLayout
from dask_nn.training.loop import TrainingLoop
from dask_nn.training.outcome import RankOutcome, Status
from dask_nn.training.randomness import ShardRandomness, restored_generator
from dask_nn.training.runtime import rank_runtime
from dask_nn.training.state import TrainingState
from dask_nn.training.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.collectives.base import Communicator
    from dask_nn.data.reader import BlockReader
    from dask_nn.events import Progress
    from dask_nn.training.spec import TrainingSpec

__all__ = ["RankEnvironment", "rank_main"]


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
    shared_process : bool
        Whether other ranks or tasks of this process may draw random numbers.
    stop_event : threading.Event
        Asks this rank to stop at a step boundary.
    on_start, on_progress, on_epoch : callable, optional
        Told of the first step, of progress and of each epoch's record, on rank 0 alone.
    """

    comm: Communicator
    reader: BlockReader
    validation_reader: BlockReader | None = None
    address: str = "this process"
    shared_process: bool = False
    stop_event: threading.Event = field(default_factory=threading.Event)
    on_start: Callable[[], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None


def rank_main(spec: TrainingSpec, env: RankEnvironment) -> RankOutcome:
    """Train one rank; never raises, the outcome says how it ended."""
    standing = _Standing()
    comm = env.comm
    outcome: RankOutcome
    try:
        with rank_runtime(spec.threads_per_rank, deterministic=spec.bitwise), restored_generator():
            return _train(spec, env, standing)
    except Aborted as error:
        outcome = _failed(env, standing, "aborted", error)
    except BaseException as error:
        outcome = _failed(env, standing, "failed", error)
    finally:
        if standing.unfinished:
            comm.abort()
        comm.close()
    return outcome


@dataclass
class _Standing:
    """How far the rank has come, for the outcome of a failure."""

    state: TrainingState | None = None
    unfinished: bool = True


def _train(spec: TrainingSpec, env: RankEnvironment, standing: _Standing) -> RankOutcome:
    comm = env.comm
    first = comm.rank == 0
    device = torch.device(spec.device)
    state = standing.state = TrainingState(spec, device)
    layout = LeafLayout(state.model)
    objective = Objective(spec.loss, weighted=spec.weighted).with_ignored(spec.ignored_labels)
    dtypes = batch_dtypes(spec.fields, layout.floating)
    comm.open(shards=spec.shards, leaf_size=layout.size, dtype=layout.dtype, device=device)
    digest = fingerprint(
        state.model, objective, spec, dtypes=dtypes, device=device, shared=env.shared_process
    )
    bitwise = compare_canaries(digest, comm, place=env.address, refuse=spec.bitwise)
    validation = None
    if env.validation_reader is not None:
        validation = Validation(
            spec, objective=objective, reader=env.validation_reader, dtypes=dtypes, comm=comm
        )
    loop = TrainingLoop(
        spec,
        state,
        comm,
        layout=layout,
        objective=objective,
        randomness=ShardRandomness(spec.seed, shared=env.shared_process),
        reader=env.reader,
        dtypes=dtypes,
        validation=validation,
        stop_event=env.stop_event,
        device=device,
        on_progress=env.on_progress if first else None,
        on_epoch=env.on_epoch if first else None,
    )
    if first and env.on_start is not None:
        env.on_start()
    try:
        status: Status = "finished" if loop.run() else "stopped"
    except NonFiniteLoss:
        status = "non_finite"
    standing.unfinished = False
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
        bitwise=bitwise,
        collective=comm.name,
    )


def _failed(
    env: RankEnvironment, standing: _Standing, status: Status, error: BaseException
) -> RankOutcome:
    state = standing.state
    text = "".join(traceback.format_exception(error))
    # What failed may refer to itself, and would keep the gang's memory until somebody collects it.
    traceback.clear_frames(error.__traceback__)
    return RankOutcome(
        rank=env.comm.rank,
        address=env.address,
        status=status,
        steps=state.steps if state is not None else 0,
        epoch=state.epoch if state is not None else 0,
        error=f"{type(error).__name__}: {error}",
        traceback=text,
        exception=error if isinstance(error, DaskNNError) else None,
        collective=env.comm.name,
    )
