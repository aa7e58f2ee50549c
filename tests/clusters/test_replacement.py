from __future__ import annotations

import asyncio
import time
from typing import Any

import dask
import pytest
from distributed import Scheduler, SpecCluster, Worker
from distributed.deploy.spec import ProcessInterface

from dask_nn.clusters import replacement
from dask_nn.clusters.replacement import Replacement
from dask_nn.clusters.serve import KeptWorkers


class Job(ProcessInterface):
    """A job that brings a worker from the third one on: the second cannot be submitted."""

    made: list[Job]
    worker: Worker | None = None

    async def start(self) -> None:
        self.made.append(self)
        if len(self.made) == 2:
            raise OSError("the queue takes no jobs just now")
        if len(self.made) > 2:
            self.worker = await Worker(self.scheduler, name=self.name, nthreads=1)
        await super().start()

    def __init__(self, scheduler: str, name: Any) -> None:
        super().__init__(scheduler, name)
        self.scheduler, self.name = scheduler, name

    async def close(self) -> None:
        if self.worker is not None:
            await self.worker.close()
        await super().close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(replacement, "ASK_EVERY_S", 0.1)


@pytest.mark.usefixtures("soon")
@pytest.mark.filterwarnings("ignore:.*dashboard.*")
def test_a_job_that_ends_before_its_worker_comes_is_replaced_until_one_comes() -> None:
    Job.made = []

    async def lost(_: Any) -> set[Any]:
        return {job.name for job in Job.made[:1]}

    async def run() -> None:
        options = {"protocol": "inproc://", "dashboard": False, "dashboard_address": ":0"}
        async with SpecCluster(
            workers={0: {"cls": Job}},
            worker={"cls": Job},
            scheduler={"cls": Scheduler, "options": options},
            asynchronous=True,
        ) as cluster:
            cluster.adapt(Adaptive=KeptWorkers, interval="50ms")
            replacing = asyncio.create_task(Replacement(cluster=cluster, lost=lost).run())
            deadline = time.monotonic() + 20
            while not cluster.scheduler_info["workers"]:
                assert time.monotonic() < deadline, Job.made
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            assert not replacing.done()
            replacing.cancel()

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}):
        asyncio.run(run())
    assert len(Job.made) == 3
