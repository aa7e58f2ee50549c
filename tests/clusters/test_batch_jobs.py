"""Jobs of a Slurm whose commands are scripts of the tests; test_slurm.py has a real one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dask_nn.clusters import slurm_queue
from dask_nn.clusters.batch_jobs import BatchJobs


class FakeSlurm:
    """Commands of Slurm on the PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def squeue(self, script: str) -> None:
        path = self.folder / "squeue"
        path.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/asked\n{script}\n')
        path.chmod(0o755)

    def asked(self) -> str:
        return (self.folder / "asked").read_text()


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return FakeSlurm(tmp_path)


@pytest.fixture
def jobs(tmp_path: Path) -> BatchJobs:
    found = BatchJobs(kind="slurm", log_folder=tmp_path / "logs")
    found.jobs |= {number: SimpleNamespace(name=f"job-{number}") for number in ("7", "8")}
    return found


def cluster(*arrived: str) -> Any:
    workers = {name: {"name": name} for name in arrived}
    return SimpleNamespace(scheduler_info={"workers": workers})


def test_a_queue_that_does_not_answer_says_nothing_of_the_jobs(fake_slurm, jobs) -> None:
    fake_slurm.squeue("echo 'Socket timed out' >&2; exit 1")
    for _ in range(3):
        assert asyncio.run(jobs.hopeless(cluster())) == ""
        assert asyncio.run(jobs.lost(cluster())) == set()
    assert "squeue failed: Socket timed out" in asyncio.run(jobs.explain(cluster()))


def test_a_job_is_gone_that_two_answers_in_a_row_do_not_name(fake_slurm, jobs) -> None:
    fake_slurm.squeue("echo '7|RUNNING|None'")
    assert asyncio.run(jobs.hopeless(cluster())) == ""
    fake_slurm.squeue("exit 1")
    assert asyncio.run(jobs.hopeless(cluster())) == ""
    fake_slurm.squeue("echo '7|RUNNING|None'")
    assert "job 8: gone" in asyncio.run(jobs.hopeless(cluster()))
    assert asyncio.run(jobs.lost(cluster())) == {"job-8"}
    assert asyncio.run(jobs.hopeless(cluster("job-8"))) == ""


def test_a_job_that_ended_is_lost_and_one_that_waits_is_not(fake_slurm, jobs) -> None:
    fake_slurm.squeue("echo '7|NODE_FAIL|None'; echo '8|PENDING|PartitionConfig'")
    assert asyncio.run(jobs.lost(cluster())) == {"job-7"}
    assert "8: PENDING (PartitionConfig)" in asyncio.run(jobs.hopeless(cluster()))


def test_the_queue_is_asked_for_the_jobs_of_one_user(fake_slurm, jobs) -> None:
    fake_slurm.squeue("")
    asyncio.run(jobs.lost(cluster()))
    assert f"--user={os.getuid()}" in fake_slurm.asked().split()


def test_the_log_of_a_job_is_not_that_of_another_whose_number_contains_its_own(
    fake_slurm, jobs
) -> None:
    jobs.log_folder.mkdir()
    for name in ("dask-worker-17.err", "dask-worker-70.err", "dask-worker.o177", "other.err"):
        (jobs.log_folder / name).write_text(f"of {name}")
    fake_slurm.squeue("echo '7|FAILED|None'; echo '8|RUNNING|None'")
    assert asyncio.run(jobs.hopeless(cluster())).splitlines()[1:] == ["job 7: FAILED"]
    (jobs.log_folder / "dask-worker-7.err").write_text("no module")
    told = asyncio.run(jobs.hopeless(cluster()))
    assert told.endswith("job 7: FAILED\ndask-worker-7.err ends with:\nno module")
    # As HTCondor and PBS name theirs.
    for name, number in (("worker-12.0.out", "12.0"), ("dask-worker.o34", "34")):
        (jobs.log_folder / name).write_text("no module")
        assert jobs._tails([number]) == [f"{name} ends with:\nno module"]


def test_a_queue_that_hangs_is_killed(
    fake_slurm, jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_queue, "COMMAND_TIMEOUT_S", 0.3)
    fake_slurm.squeue(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    assert "did not answer within 0.3 s" in asyncio.run(jobs.explain(cluster()))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_jobs_that_remain_in_the_queue_are_named(
    fake_slurm, jobs, caplog: pytest.LogCaptureFixture
) -> None:
    class Job:
        async def start(self) -> None:
            self.job_id = "9"

        async def close(self) -> None:
            pass

    job = jobs.recorded(Job)()
    asyncio.run(job.start())
    jobs.jobs = {"9": job}
    fake_slurm.squeue("echo '9|RUNNING|None'")
    asyncio.run(jobs.end_all())
    assert "9 RUNNING; end them with: scancel 9" in caplog.text
    caplog.clear()
    fake_slurm.squeue("echo '9|COMPLETING|None'")
    asyncio.run(jobs.end_all())
    assert caplog.text == ""
