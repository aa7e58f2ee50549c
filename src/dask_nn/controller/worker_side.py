"""What runs on workers: their description, the meeting point of a gang, and its rank tasks."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import pickle
import platform
import socket
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.system import cpu_count
from distributed import Worker, get_worker, secede
from distributed.utils import sync
from distributed.utils_comm import gather_from_workers

from dask_nn.collectives.rendezvous import Rendezvous, not_found
from dask_nn.controller.placement import WorkerFacts
from dask_nn.controller.quiet import quiet_worker

if TYPE_CHECKING:
    from dask_nn.collectives.base import Communicator
    from dask_nn.config import Settings
    from dask_nn.events import Progress
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.spec import TrainingSpec

__all__ = ["RankPayload", "Seat", "describe", "run_rank", "signal_ranks"]

OPERATION = "dask_nn_rendezvous"
# Fetched blocks are kept up to this share of a worker's memory limit.
CACHE_SHARE = 0.15
CACHE_WITHOUT_LIMIT_BYTES = 1 << 30
FETCH_TRIES = 5
FETCH_PAUSE_S = 0.2


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
    shared_process : bool
        Whether other ranks run in the same process.
    """

    run_id: str
    generation: int
    rank: int
    world_size: int
    address: str
    leader: str
    collective: str
    shared_process: bool

    @property
    def gang(self) -> str:
        """A name that this gang alone has."""
        return f"{self.run_id}-{self.generation}"


@dataclass(frozen=True, kw_only=True)
class RankPayload:
    """What all ranks of a gang are sent, once."""

    spec: TrainingSpec
    keys: tuple[tuple[Any, ...], ...]
    validation_keys: tuple[tuple[Any, ...], ...]
    settings: Settings


@dataclass
class RankHandle:
    """The switches of one running rank."""

    abort: threading.Event
    stop: threading.Event


_handles: dict[str, list[RankHandle]] = defaultdict(list)
_handles_lock = threading.Lock()


def describe(dask_worker: Worker) -> dict[str, Any]:
    """Describe a worker, as the fields of WorkerFacts, and make it a possible meeting point.

    torch is imported here, so that the first step does not wait for it.
    """
    dask_worker.handlers.setdefault(OPERATION, _MeetingPoint().handle)
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
            num_gpus=num_gpus,
            versions=versions,
        )
    )


def signal_ranks(run_id: str, order: str) -> int:
    """Ask this process's ranks of a run to ``"stop"`` or to ``"abort"``; return their number."""
    with _handles_lock:
        handles = list(_handles.get(run_id, ()))
    for handle in handles:
        (handle.abort if order == "abort" else handle.stop).set()
    return len(handles)


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
    """
    # torch is needed only now: a worker that runs no rank may lack it.
    from dask_nn.training.rank_main import RankEnvironment, rank_main

    worker = get_worker()
    if worker.address != seat.address:
        message = f"rank {seat.rank} belongs on {seat.address}, but was started on {worker.address}"
        raise RuntimeError(message)
    # Fetching and preprocessing tasks go on on this worker, and adaptive scaling leaves it alone.
    secede()
    content: RankPayload = pickle.loads(payload)  # noqa: S301  (made by this run's own client)
    handle = RankHandle(threading.Event(), threading.Event())
    with _handles_lock:
        _handles[seat.run_id].append(handle)
    topic = f"dask-nn-{seat.run_id}"

    def tell(kind: str, details: dict[str, Any]) -> None:
        worker.log_event(topic, {"kind": kind, "time_s": time.time(), "details": details})

    def tell_progress(progress: Progress) -> None:
        tell("progress", asdict(progress))

    try:
        with quiet_worker(worker):
            return rank_main(
                content.spec,
                RankEnvironment(
                    comm=_communicator(worker, seat, content.settings, handle.abort),
                    reader=_reader(
                        worker,
                        content.keys,
                        size_bytes=content.spec.size_bytes,
                        uses=content.spec.epochs / seat.world_size,
                    ),
                    validation_reader=(
                        # A rank validates on the same blocks after every epoch.
                        _reader(worker, content.validation_keys, size_bytes=0, uses=0)
                        if content.validation_keys
                        else None
                    ),
                    address=worker.address,
                    shared_process=seat.shared_process,
                    stop_event=handle.stop,
                    on_start=lambda: tell("start", {}),
                    on_progress=tell_progress,
                    on_epoch=lambda record: tell("epoch", {"record": record}),
                ),
            )
    finally:
        with _handles_lock:
            _handles[seat.run_id].remove(handle)
            if not _handles[seat.run_id]:
                del _handles[seat.run_id]


class WorkerRendezvous(Rendezvous):
    """Meets on the leader's worker, over Dask's own connections (encrypted where those are).

    Parameters
    ----------
    worker : Worker
        This rank's.
    seat : Seat
        Names the gang and the leader.
    abort : threading.Event
        Ends a wait.
    """

    def __init__(self, worker: Worker, seat: Seat, abort: threading.Event) -> None:
        self._worker = worker
        self._seat = seat
        self._abort = abort

    def set(self, key: str, value: bytes) -> None:
        """Store a value at the leader."""
        self._call(action="set", key=key, value=value)

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a key at the leader."""
        deadline = time.monotonic() + timeout_s
        while not self._abort.is_set():
            found: bytes | None = self._call(action="get", key=key, value=b"")
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                break
        raise not_found(key, timeout_s)

    def _call(self, **message: Any) -> Any:
        async def call() -> Any:
            leader = self._worker.rpc(self._seat.leader)
            return await getattr(leader, OPERATION)(gang=self._seat.gang, **message)

        return sync(self._worker.loop, call)


class _MeetingPoint:
    """The leader's side of :class:`WorkerRendezvous`, on the worker's event loop."""

    WAIT_S = 1.0
    KEPT_GANGS = 4

    def __init__(self) -> None:
        self._gangs: dict[str, dict[str, bytes]] = {}
        self._changed = asyncio.Condition()

    async def handle(self, gang: str, action: str, key: str, value: bytes) -> bytes | None:
        async with self._changed:
            values = self._gangs.setdefault(gang, {})
            while len(self._gangs) > self.KEPT_GANGS:
                del self._gangs[next(iter(self._gangs))]
            if action == "set":
                values[key] = value
                self._changed.notify_all()
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.WAIT_S):
                    await self._changed.wait_for(lambda: key in values)
            return values.get(key)


def _communicator(
    worker: Worker, seat: Seat, settings: Settings, abort: threading.Event
) -> Communicator:
    from dask_nn.collectives.make import make_communicator

    return make_communicator(
        seat.collective,
        rank=seat.rank,
        world_size=seat.world_size,
        gang=seat.gang,
        rendezvous=WorkerRendezvous(worker, seat, abort),
        folder=worker.local_directory,
        host=worker.address.split("://")[-1].rsplit(":", 1)[0].strip("[]"),
        timeout_s=settings.exchange_timeout_s,
        abort_event=abort,
        slice_above_bytes=settings.slice_above_bytes,
    )


def _reader(
    worker: Worker, keys: tuple[tuple[Any, ...], ...], *, size_bytes: int, uses: float
) -> Any:
    """Make the reader of some blocks of this size in all, each read ``uses`` times by this rank."""
    from dask_nn.data.reader import ClusterReader

    limit = worker.memory_manager.memory_limit

    async def gather(wanted: list[Any]) -> list[Any]:
        missing: Any = []
        for attempt in range(FETCH_TRIES):
            who_has = await worker.scheduler.who_has(keys=wanted)
            found, missing, failed, _ = await gather_from_workers(who_has, rpc=worker.rpc)
            missing = [*missing, *failed]
            if not missing:
                return [found[key] for key in wanted]
            await asyncio.sleep(FETCH_PAUSE_S * (attempt + 1))
        message = f"blocks {missing} are on no worker any more; was their future cancelled?"
        raise RuntimeError(message)

    cache_bytes = int(limit * CACHE_SHARE) if limit else CACHE_WITHOUT_LIMIT_BYTES
    return ClusterReader(
        keys,
        own=worker.data,
        fetch=lambda wanted: sync(worker.loop, gather, wanted),
        cache_bytes=cache_bytes,
        fetch_whole=uses >= 1 and size_bytes <= cache_bytes,
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
