"""A real Slurm: jobs are submitted, ended, replaced, and none is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import pytest

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.clusters import replacement
from dask_nn.errors import ClusterError, ConfigurationError
from dask_nn.examples.mnist.compare import Job, train_parallel
from dask_nn.examples.mnist.data import load
from dask_nn.testing.faults import Fault, install

if TYPE_CHECKING:
    from distributed import Client

# A quiet machine needs a tenth of this.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HERE = {"queue": "debug", "interface": "lo", "scheduler_options": {"dashboard_address": ":0"}}
SMALL = {**HERE, "memory": "2 GB"}
ON_SLURM = (
    *("--cluster", "slurm", "--workers", "2", "--memory", "2 GB"),
    *("--cluster-option", "queue=debug", "--cluster-option", "interface=lo"),
    *("--cluster-option", "scheduler_options={dashboard_address=':0'}"),
)


def dask_nn_command(folder: Path, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dask_nn.cli.main", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_mnist_on_slurm_has_the_bits_of_a_local_run(
    queue, data_dir: Path, client: Client, tmp_path: Path
) -> None:
    options = ["--shards", 4, "--epochs", 2, "--no-sequential", "--json", "run.json"]
    with dask_nn_command(tmp_path, "mnist", *ON_SLURM, "--data-dir", data_dir, *options) as process:
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    run = json.loads((tmp_path / "run.json").read_text())["parallel"]
    assert run["world_size"] == 2
    local = train_parallel(Job(shards=4, epochs=2), load(data_dir).digits, client)
    assert run["weights_sha256"] == local.weights_sha256
    assert queue.becomes_empty()
    assert not list(tmp_path.glob(".dask-nn*"))


def test_ctrl_c_leaves_an_empty_queue(queue, data_dir: Path, tmp_path: Path) -> None:
    options = ["--shards", 4, "--epochs", 5_000, "--no-sequential"]
    with dask_nn_command(tmp_path, "mnist", *ON_SLURM, "--data-dir", data_dir, *options) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        assert len(queue.jobs()) == 2
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "what is trained so far is in" in err
    assert queue.becomes_empty()
    assert not list(tmp_path.glob(".dask-nn*"))


class WhenUnderWay(Callback):
    """Does something in the middle of the first epoch."""

    def __init__(self, step: int, then: Any) -> None:
        self.step, self.then, self.names = step, then, []
        self.thread: threading.Thread | None = None

    def on_progress(self, progress: Any) -> None:
        if self.thread is None and progress.step >= self.step:
            self.thread = threading.Thread(target=self.then)
            self.thread.start()

    def on_event(self, event: Any) -> None:
        self.names.append(event.name)


@pytest.mark.usefixtures("soon_replaced")
def test_a_job_ended_in_mid_epoch_is_replaced_and_the_bits_are_equal(
    queue, small_job, small_sha256: str, in_folder: Path
) -> None:
    """And the run is saved before the walltime that the script of the job announces."""
    with dask_nn.cluster("slurm", workers=2, walltime="00:10:00", **SMALL) as client:
        before = client.run(lambda: os.environ["SLURM_JOB_ID"])
        pause = Fault(point="applied", action="sleep", seconds=0.1, every_time=True)
        install(client, [pause], in_folder)
        victim = next(iter(before.values()))
        watch = WhenUnderWay(5, lambda: queue.cancel(victim))
        result = small_job.train(
            client,
            callbacks=[watch],
            # The job has 600 s, so it is 597 s before its end at the first steps already.
            checkpoint=dask_nn.Checkpoint("run", every=10_000, before_walltime_s=597),
        )
        assert watch.thread is not None
        watch.thread.join(30)
        assert result.weights_sha256 == small_sha256
        assert "checkpoint" in watch.names
        assert any(path.is_dir() for path in (in_folder / "run").iterdir())
        client.wait_for_workers(2, timeout=60)
        after = set(client.run(lambda: os.environ["SLURM_JOB_ID"]).values())
        assert len(after) == 2
        assert victim not in after
    assert queue.becomes_empty()


def test_it_adapts_and_scales_and_replaces_a_job_that_brought_no_worker(
    queue, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "ASK_EVERY_S", 1.0)
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}),
        dask_nn.cluster("slurm", adapt=(1, 2), preload=(), **SMALL) as client,
    ):
        assert len(queue.jobs()) == 1
        busy = client.map(lambda _: time.sleep(0.5), range(80), pure=False)
        client.wait_for_workers(2, timeout=60)
        client.cancel(busy)
        client.cluster.adapt(minimum=1, maximum=1)
        deadline = time.monotonic() + 60
        while len(client.scheduler_info(n_workers=-1)["workers"]) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with queue.paused():
            (first,) = client.run(lambda: os.environ["SLURM_JOB_ID"]).values()
            queue.cancel(first)
            second = queue.next_job({first})
            queue.cancel(second)
            third = queue.next_job({first, second})
        client.wait_for_workers(1, timeout=60)
        assert set(client.run(lambda: os.environ["SLURM_JOB_ID"]).values()) == {third}
    assert queue.becomes_empty()


def test_it_trains_with_tls(queue, small_job, small_sha256: str, in_folder: Path) -> None:
    with dask_nn.cluster("slurm", workers=1, security=True, **SMALL) as client:
        assert client.scheduler_info()["address"].startswith("tls://")
        assert all(address.startswith("tls://") for address in client.run(os.getpid))
        assert small_job.train(client).weights_sha256 == small_sha256
    assert not list(in_folder.iterdir())


def test_what_sbatch_says_is_shown(queue, in_folder: Path) -> None:
    with (
        pytest.raises(ClusterError, match="invalid partition specified: gold"),
        dask_nn.cluster("slurm", workers=2, **{**SMALL, "queue": "gold"}),
    ):
        pass
    assert queue.jobs() == []
    assert not list(in_folder.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qeue": "debug"}, "SLURMCluster has no option 'qeue'; did you mean 'queue'"),
        ({"walltime": "tomorrow"}, "walltime must be written as slurm does"),
        ({"gpus": 1, "processes": 2}, "leave it out"),
    ],
)
def test_a_wrong_option_is_refused_before_a_job_is_submitted(
    queue, options: dict[str, Any], message: str, in_folder: Path
) -> None:
    with (
        pytest.raises(ConfigurationError, match=message),
        dask_nn.cluster("slurm", workers=2, **options),
    ):
        pass
    assert queue.jobs() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"python": "/nowhere/python"}, "(?s)FAILED.*/nowhere/python: No such file"),
        ({"cores": 64}, r"PENDING \(PartitionConfig\)"),
    ],
)
def test_jobs_that_bring_no_worker_are_not_waited_for(
    queue, options: dict[str, Any], message: str, in_folder: Path
) -> None:
    with (
        pytest.raises(ClusterError, match=message),
        dask_nn.cluster("slurm", workers=1, start_timeout_s=60, **SMALL, **options),
    ):
        pass
    assert queue.becomes_empty()


def test_too_few_nodes_are_reported_with_the_state_of_the_jobs(queue, in_folder: Path) -> None:
    options = {**SMALL, "cores": 3}
    with (
        pytest.raises(ClusterError, match=r"(?s)of 3 workers came.*PENDING \(Resources\)"),
        dask_nn.cluster("slurm", workers=3, preload=(), start_timeout_s=3, **options),
    ):
        pass
    assert queue.becomes_empty()


def test_the_example_of_the_documentation_runs(queue, in_folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/clusters/slurm.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH -t 00:10:00" in done.stdout
    assert queue.becomes_empty()
