"""What runs on workers: their description, the meeting point of a gang, and its rank tasks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import platform
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.system import cpu_count
from distributed import Worker, get_worker, secede
from distributed.utils import sync

from dask_nn import faults
from dask_nn.controller import keeping
from dask_nn.controller.block_fetch import FetchWait, make_reader, room_bytes, used_bytes
from dask_nn.controller.mail import WorkerMailbox, open_post_office
from dask_nn.controller.meeting import WorkerRendezvous, open_meeting_point
from dask_nn.controller.placement import WorkerFacts
from dask_nn.controller.quiet import quiet_worker
from dask_nn.controller.rank_handles import RankHandle, register, say_farewell, unregister
from dask_nn.controller.watchdog import Watchdog
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    from collections.abc import Collection

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.collectives.base import Communicator
    from dask_nn.config import Settings
    from dask_nn.controller.block_fetch import BlockSource
    from dask_nn.data.reader import BlockReader
    from dask_nn.events import Progress
    from dask_nn.training.checkpointing import LastSave
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.snapshot import Keepsake, Snapshot
    from dask_nn.training.spec import TrainingSpec

__all__ = [
    "RankPayload",
    "Seat",
    "describe",
    "forget_older",
    "forget_run",
    "forget_runs_but",
    "is_there",
    "run_rank",
]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One rank of one gang.

    Parameters
    ----------
    run_id : str
        The run.
    generation : int
        The n-th gang of the run.
    rank, world_size : int
        Which rank of how many.
    address : str
        The worker that must run it.
    leader : str
        The worker of rank 0, where the gang meets.
    collective : str
        Name of the communicator.
    hosts : tuple of int
        Ranks on each host, in the order of ranks.
    source : StateSource, optional
        Where the run's state is, once a gang has left one.
    canary : bytes
        What the run's first gang computed from its sample; empty for the first gang itself.
    """

    run_id: str
    generation: int
    rank: int
    world_size: int
    address: str
    leader: str
    collective: str
    hosts: tuple[int, ...] = ()
    source: keeping.StateSource | None = None
    canary: bytes = b""

    @property
    def gang(self) -> str:
        """A name that this gang alone has."""
        return f"{self.run_id}-{self.generation}"


@dataclass(frozen=True, kw_only=True)
class RankPayload:
    """What all ranks of a gang are sent, once.

    Parameters
    ----------
    spec : TrainingSpec
        What is trained.
    data, validation : tuple of tuple, or Stream, or None
        For each block the Dask key of each field, or how blocks are computed.
    settings : Settings
        In force.
    start : Snapshot, optional
        What a checkpoint held; a run without one starts from the spec.
    checkpoint : Checkpoint, optional
        Where rank 0 saves the run.
    configuration : dict
        What every checkpoint says of the run.
    last_save : LastSave, optional
        What earlier gangs of the run have saved.
    """

    spec: TrainingSpec
    data: BlockSource
    validation: BlockSource | None
    settings: Settings
    start: Snapshot | None = None
    checkpoint: Checkpoint | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    last_save: LastSave | None = None


def describe(dask_worker: Worker) -> dict[str, Any]:
    """Describe a worker, as the fields of WorkerFacts, and make it a possible meeting point.

    torch is imported here, so that the first step does not wait for it.
    """
    open_meeting_point(dask_worker)
    keeping.serve_states(dask_worker)
    open_post_office(dask_worker)
    versions = {"python": platform.python_version()}
    for name in ("dask", "distributed", "numpy", "dask-nn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    num_gpus = 0
    try:
        import torch

        import dask_nn.training.rank_main  # noqa: F401
    except ImportError as error:
        versions["torch"] = ""
        versions["problem"] = str(error)
    else:
        versions["torch"] = torch.__version__.split("+")[0]
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    limit = dask_worker.memory_manager.memory_limit
    return asdict(
        WorkerFacts(
            address=dask_worker.address,
            host=_host_identity(),
            process=os.getpid(),
            machine=platform.machine(),
            cores=cpu_count(),
            threads=dask_worker.state.nthreads,
            memory_bytes=int(limit or 0),
            used_bytes=used_bytes(dask_worker),
            num_gpus=num_gpus,
            versions=versions,
        )
    )


def is_there() -> None:
    """Answer."""


def forget_run(run_id: str) -> None:
    """Drop what ended ranks of a run left in this process and on this host."""
    from dask_nn.collectives.shared_file import remove_abandoned

    keeping.forget(run_id)
    remove_abandoned(run_id)


def forget_older(run_id: str, generation: int, dask_worker: Worker) -> None:
    """Drop what ranks of earlier gangs of a run left on a worker."""
    keeping.forget_older(dask_worker.address, run_id, generation)


def forget_runs_but(runs: Collection[str], dask_worker: Worker) -> None:
    """Drop what ranks left on a worker whose runs are not among these."""
    keeping.forget_all_but(dask_worker.address, runs)


def run_rank(payload: bytes, seat: Seat) -> RankOutcome:
    """Run one rank as a Dask task.

    Parameters
    ----------
    payload : bytes
        A pickled RankPayload.
    seat : Seat
        Which rank this is.

    Returns
    -------
    RankOutcome
        How it ended.

    Raises
    ------
    RuntimeError
        If the task landed on another worker than the seat names.
    Aborted
        If this very rank runs here already.
    """
    worker = get_worker()
    if worker.address != seat.address:
        message = f"rank {seat.rank} belongs on {seat.address}, but was started on {worker.address}"
        raise RuntimeError(message)
    key = str(worker.get_current_task())
    # Fetching and preprocessing tasks go on on this worker, and adaptive scaling leaves it alone.
    secede()
    handle = RankHandle(seat.rank, address=seat.address)
    place = (seat.run_id, seat.generation)
    register(place, handle)
    try:
        # Made by this run's own client.
        return _run_rank(worker, key, pickle.loads(payload), seat, handle)  # noqa: S301
    finally:
        unregister(place, handle)


def _run_rank(
    worker: Worker, key: str, content: RankPayload, seat: Seat, handle: RankHandle
) -> RankOutcome:
    # torch is needed only now: a worker that runs no rank may lack it.
    from dask_nn.training.rank_main import RankEnvironment, rank_main

    topic = f"dask-nn-{seat.run_id}"
    fetch = FetchWait()

    def tell(kind: str, details: dict[str, Any]) -> None:
        # The scheduler's answer is not waited for; without a scheduler nobody listens anyway.
        with contextlib.suppress(Exception):
            worker.log_event(
                topic,
                {
                    "kind": kind,
                    "generation": seat.generation,
                    "rank": seat.rank,
                    "time_s": time.time(),
                    "details": details,
                },
            )

    def tell_of_saving() -> None:
        tell("saving", {})
        if handle.abort.is_set():
            message = "the run was ended before it was written"
            raise Aborted(message)

    def tell_progress(progress: Progress) -> None:
        tell("progress", asdict(progress))

    def keep(keepsake: Keepsake) -> None:
        if watchdog.is_wanted():  # otherwise no gang will come and ask for it
            keeping.keep(worker.address, seat.run_id, seat.generation, keepsake)

    def read(
        data: BlockSource, lengths: tuple[int, ...], size_bytes: int, uses: float
    ) -> BlockReader:
        return make_reader(
            worker,
            data,
            lengths=lengths,
            names=tuple(field.name for field in content.spec.fields),
            size_bytes=size_bytes,
            uses=uses,
            abort=handle.abort,
            wait=fetch,
        )

    comm = _communicator(worker, seat, content.settings, handle.abort)
    sync(worker.loop, say_farewell, worker)
    checkpoint = content.checkpoint
    ends_at = checkpoint.save_at() if checkpoint is not None else None
    watchdog = Watchdog(
        worker, key, comm, tell=tell, obey=handle.obey, fetch=fetch, ends_at=ends_at
    )
    spec = content.spec
    with quiet_worker(worker), watchdog:
        return _without_state(
            rank_main(
                spec,
                RankEnvironment(
                    comm=comm,
                    reader=read(
                        content.data, spec.block_lengths, spec.size_bytes, _uses(spec, seat)
                    ),
                    # A rank validates on the same blocks after every epoch.
                    validation_reader=(
                        None
                        if content.validation is None
                        else read(content.validation, spec.validation_lengths, 0, 0)
                    ),
                    room_bytes=room_bytes(worker),
                    address=worker.address,
                    orders=handle.orders,
                    waiting=tell_of_saving,
                    last_save=content.last_save,
                    start=lambda: _start(worker, seat, content, comm),
                    carried=keeping.kept(worker.address, seat.run_id),
                    canary=seat.canary,
                    keep=keep,
                    checkpoint=checkpoint,
                    configuration=content.configuration
                    | {"run_id": seat.run_id, "generation": seat.generation},
                    on_start=lambda facts: tell("start", facts),
                    on_progress=tell_progress,
                    on_epoch=lambda record: tell("epoch", {"record": record}),
                    on_event=lambda name, details: tell("event", {"name": name, **details}),
                ),
            )
        )


def _without_state(outcome: RankOutcome) -> RankOutcome:
    """Leave out the weights where the client can fetch them from any rank, if it wants them."""
    weights = [value for value in outcome.state.values() if value.is_floating_point()]
    finite = all(bool(value.isfinite().all()) for value in weights)
    if outcome.status == "non_finite" or not finite:
        return outcome  # the last good state, which this rank alone gives
    return replace(outcome, state={}, optimizer_state={})


def _uses(spec: TrainingSpec, seat: Seat) -> float:
    """Tell how often a rank reads each block; less than once where blocks stay with shards."""
    return spec.epochs / seat.world_size if spec.shuffle == "blocks" else 0


def _start(worker: Worker, seat: Seat, content: RankPayload, comm: Communicator) -> Snapshot | None:
    """Give the state from which this rank starts: its own, a peer's, a checkpoint's, or none."""
    if seat.source is None:
        return content.start
    own = keeping.kept(worker.address, seat.run_id)
    if own is not None and own.snapshot.position == seat.source.position:
        return own.snapshot
    if faults.hook is not None:
        faults.hook("copying state", {"rank": seat.rank, "generation": seat.generation})
    return keeping.fetch_state(worker, seat.source, seat.run_id, comm.check_abort)


def _communicator(
    worker: Worker, seat: Seat, settings: Settings, abort: threading.Event
) -> Communicator:
    from dask_nn.collectives.make import make_communicator

    return make_communicator(
        seat.collective,
        rank=seat.rank,
        world_size=seat.world_size,
        gang=seat.gang,
        rendezvous=WorkerRendezvous(worker, seat.gang, seat.leader, abort),
        folder=worker.local_directory,
        host=worker.address.split("://")[-1].rsplit(":", 1)[0].strip("[]"),
        timeout_s=settings.exchange_timeout_s,
        abort_event=abort,
        slice_above_bytes=settings.slice_above_bytes,
        hosts=seat.hosts,
        mailbox=WorkerMailbox(worker, seat.gang),
    )


def _host_identity() -> str:
    """Name what ranks must have in common to share memory: kernel, mounts and network."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        shared = Path("/dev/shm").stat()  # noqa: S108
        parts.append(f"{shared.st_dev}-{shared.st_ino}")
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/net").readlink()))
    return "|".join(parts)
