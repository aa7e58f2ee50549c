"""What runs on the scheduler to look after workers.

The scheduler imports this file, and with it all that it imports: never torch, which its image may
lack, and which would stop it for seconds at the very moment at which a worker has to be let go.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import SchedulerPlugin
from distributed.comm import CommClosedError
from distributed.core import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "RANK_PREFIX",
    "Listed",
    "RanksMayMove",
    "list_workers",
    "remove_worker",
    "retired_among",
]

# Of the keys of the tasks that are ranks.
RANK_PREFIX = "dask-nn-rank-"
# What Dask's event for a worker that leaves is called, on the topic of its address.
REMOVAL = "remove-worker"
EVICTION = "dask-nn-evict"


class Listed(NamedTuple):
    """What the scheduler knows of a worker.

    Parameters
    ----------
    process : str
        Tells it from the next one at its address.
    is_closing : bool
        Whether it is about to leave.
    is_paused : bool
        Whether it starts no tasks for want of memory.
    """

    process: str
    is_closing: bool
    is_paused: bool


def list_workers(dask_scheduler: Any) -> dict[str, Listed]:
    """Give the workers by address."""
    return {
        address: Listed(
            process=str(worker.server_id),
            is_closing=worker.status in {Status.closing_gracefully, Status.closing},
            is_paused=worker.status is Status.paused,
        )
        for address, worker in dask_scheduler.workers.items()
    }


def retired_among(addresses: Iterable[str], dask_scheduler: Any) -> list[str]:
    """Give those of some addresses whose last worker to leave was asked to."""
    found = []
    for address in addresses:
        events = [event for _, event in dask_scheduler.get_events(address)]
        removals = [e for e in events if isinstance(e, dict) and e.get("action") == REMOVAL]
        if removals and removals[-1].get("expected"):
            found.append(address)
    return found


async def remove_worker(address: str, dask_scheduler: Any) -> None:
    """Let go of a worker, whose tasks are not to blame, and make it close when it wakes up."""
    # Told by `remove_worker`, it would close its nanny too.
    if (stream := dask_scheduler.stream_comms.get(address)) is not None:
        with contextlib.suppress(CommClosedError):
            stream.send({"op": "close", "reason": EVICTION, "nanny": False, "executor_wait": False})
    # The argument that says so was renamed in distributed 2025.
    names = inspect.signature(dask_scheduler.remove_worker).parameters
    blameless = {name: True for name in ("expected", "safe") if name in names}
    await dask_scheduler.remove_worker(address, stimulus_id=EVICTION, close=False, **blameless)


class RanksMayMove(SchedulerPlugin):
    """Lets adaptive clusters close workers that have ranks.

    The scheduler never offers a worker with a long-running task for that, which would begin anew
    somewhere else. A rank leaves at a step boundary and loses nothing. Such a worker still counts
    as busy: it is closed only where the cluster has to become smaller, after all idle ones.
    """

    name = "dask-nn-ranks-may-move"

    @classmethod
    def add_to(cls, scheduler: Any) -> None:
        """Register it with a scheduler, once."""
        if cls.name not in scheduler.plugins:
            scheduler.add_plugin(cls(), name=cls.name)

    def valid_workers_downscaling(self, scheduler: Any, workers: list[Any]) -> list[Any]:
        """Add the workers whose long-running tasks are ranks, and nothing else."""
        known = set(workers)
        movable = [
            worker
            for worker in scheduler.workers.values()
            if worker not in known
            and worker.long_running
            and all(str(task.key).startswith(RANK_PREFIX) for task in worker.long_running)
        ]
        return [*workers, *movable]
