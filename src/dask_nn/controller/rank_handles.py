"""The switches of the ranks that run in this process, and what becomes of them when it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

from distributed import Worker, WorkerPlugin

from dask_nn.checkpoints.background import wait_for_all
from dask_nn.errors import Aborted
from dask_nn.training.orders import Orders

__all__ = ["RankHandle", "register", "say_farewell", "signal_ranks", "unregister"]

# A worker that closes waits so long for its ranks to reach a step boundary.
LEAVE_S = 3.0
# Checkpoints under way get so much longer. A nanny that closes, too, gives its worker less.
WRITE_S = 20.0


@dataclass
class RankHandle:
    """The switches of one running rank."""

    rank: int
    address: str = ""
    abort: threading.Event = field(default_factory=threading.Event)
    orders: Orders = field(default_factory=Orders)

    def obey(self, order: str) -> None:
        """Do as a signal or the rank's own watchman says; see `signal_ranks`."""
        match order:
            case "abort":
                self.abort.set()
            case "stop":
                self.orders.stop.set()
            case "leave":
                self.orders.leave()
            case "finish":
                self.orders.finish()
            case "save":
                self.orders.save_soon.set()


_handles: dict[tuple[str, int], list[RankHandle]] = defaultdict(list)
_handles_lock = threading.Lock()


def register(place: tuple[str, int], handle: RankHandle) -> None:
    """Let a rank of a gang (run and generation) be given orders.

    Raises
    ------
    Aborted
        If that rank runs here already.
    """
    with _handles_lock:
        if any(other.rank == handle.rank for other in _handles.get(place, ())):
            message = f"rank {handle.rank} of this gang is running already on {handle.address}"
            raise Aborted(message)
        _handles[place].append(handle)


def unregister(place: tuple[str, int], handle: RankHandle) -> None:
    """Forget a rank that has ended."""
    with _handles_lock:
        _handles[place].remove(handle)
        if not _handles[place]:
            del _handles[place]


def signal_ranks(run_id: str, generation: int, order: str) -> int:
    """Give an order to this process's ranks of a gang; return their number.

    Parameters
    ----------
    run_id, generation
        The gang.
    order : str
        ``"stop"`` at the next step boundary; ``"leave"``, which saves what is reached besides;
        ``"finish"``, which waits until it is written, too; ``"save"`` and go on; ``"abort"`` at
        once.
    """
    with _handles_lock:
        handles = list(_handles.get((run_id, generation), ()))
    for handle in handles:
        handle.obey(order)
    return len(handles)


class _Farewell(WorkerPlugin):
    """Lets the ranks of a worker that closes reach a step boundary, and save.

    Dask closes workers on SIGTERM, which is how SLURM and Kubernetes announce a job's end.
    """

    name = "dask-nn-farewell"

    async def teardown(self, worker: Worker) -> None:
        deadline = time.monotonic() + LEAVE_S
        await self._see_off_ranks(worker, deadline)
        await asyncio.to_thread(wait_for_all, deadline + WRITE_S - time.monotonic())

    async def _see_off_ranks(self, worker: Worker, deadline: float) -> None:
        while handles := self._handles(worker.address):
            for handle in handles:
                handle.obey("leave" if time.monotonic() < deadline else "abort")
            if time.monotonic() > deadline + 1:
                return
            await asyncio.sleep(0.02)

    @staticmethod
    def _handles(address: str) -> list[RankHandle]:
        with _handles_lock:
            found = [handle for handles in _handles.values() for handle in handles]
        return [handle for handle in found if handle.address == address]


async def say_farewell(worker: Worker) -> None:
    """Install the plugin on this one worker, once."""
    if _Farewell.name not in worker.plugins:
        await worker.plugin_add(_Farewell(), _Farewell.name)
