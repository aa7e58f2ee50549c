from __future__ import annotations

import asyncio
import multiprocessing

import pytest
from distributed import Nanny, Scheduler, Worker

from dask_nn.clusters.worker_processes import WorkerProcesses


@pytest.mark.filterwarnings("ignore:.*dashboard.*")
def test_a_process_that_a_thread_is_just_starting_is_killed() -> None:
    processes = WorkerProcesses()
    before = set(multiprocessing.active_children())

    async def run() -> None:
        options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": ":0"}
        async with Scheduler(**options) as scheduler:
            nanny = processes.noted_by(Nanny)(scheduler.address, nthreads=1)
            starting = asyncio.ensure_future(nanny.start())
            while nanny.process is None or nanny.process.process is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            starts = nanny.process.process.pid is None
            processes.kill()
            assert starts
            assert set(multiprocessing.active_children()) <= before
            with pytest.raises(RuntimeError, match="failed to start"):
                await starting
            await nanny.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", [Worker, Nanny])
def test_a_kind_of_worker_may_be_given_by_name(kind: type) -> None:
    noted = WorkerProcesses().noted_by(f"distributed.{kind.__name__}")
    assert issubclass(noted, kind)
    assert noted.__name__ == kind.__name__


def test_what_is_no_nanny_is_left_as_it_is() -> None:
    assert WorkerProcesses().noted_by(Worker) is Worker
