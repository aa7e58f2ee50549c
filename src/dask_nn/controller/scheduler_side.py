"""What runs on the scheduler to look after workers.

The scheduler imports this file, and with it all that it imports: never torch, which its image may
lack, and which would stop it for seconds at the very moment at which a worker has to be let go.
"""

from __future__ import annotations

import inspect
from typing import Any

from distributed import SchedulerPlugin

__all__ = ["RANK_PREFIX", "RanksMayMove", "list_workers", "remove_worker"]

# Of the keys of the tasks that are ranks.
RANK_PREFIX = "dask-nn-rank-"


def list_workers(dask_scheduler: Any) -> dict[str, str]:
    """Give the workers: from address to what tells one process there from the next."""
    return {address: str(worker.server_id) for address, worker in dask_scheduler.workers.items()}


async def remove_worker(address: str, dask_scheduler: Any) -> None:
    """Let go of a worker, whose tasks are not to blame, and make it close when it wakes up."""
    # The argument that says so was renamed in distributed 2025.
    names = inspect.signature(dask_scheduler.remove_worker).parameters
    blameless = {name: True for name in ("expected", "safe") if name in names}
    await dask_scheduler.remove_worker(
        address, stimulus_id="dask-nn-evict", close=True, **blameless
    )


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
