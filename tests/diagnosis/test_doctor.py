"""The doctor on clusters that are in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dask_nn
from dask_nn.errors import ConfigurationError

CHECKS = [
    "scheduler", "workers", "python", "torch", "dask", "distributed", "numpy", "dask-nn",
    "packages", "threads", "OMP", "memory", "shared memory", "allocator", "processor", "bits",
    "GPU", "connections", "speed", "interfaces", "encryption", "clocks", "walltime", "dashboard",
    "blocks", "placement",
]  # fmt: skip


def failures(report):
    return [line for line in report.lines if line.status == "fail"]


def test_a_healthy_cluster_of_processes(client):
    report = dask_nn.doctor(timeout_s=100)
    assert failures(report) == []
    assert [line.check for line in report.lines] == CHECKS
    assert len(set(report["bits"].details["workers"].values())) == 1
    assert report["bits"].details["workers"].keys() == client.scheduler_info()["workers"].keys()
    assert all(pair["value"] > 0 for pair in report["speed"].details["bytes_per_s"])
    assert report["speed"].details["longest_latency_s"] > 0
    assert report["dashboard"].status == "ok"


def test_a_healthy_cluster_of_threads(threads_client):
    assert failures(dask_nn.doctor(client=threads_client, timeout_s=100)) == []


def test_arrays_of_this_process(client):
    X, y = np.zeros((5_000_000, 2), np.float32), np.zeros(5_000_000, np.int64)
    report = dask_nn.doctor(X, y, client=client)
    assert report["blocks"].details["fields"] == {"X": "float32[2]", "y": "int64"}
    assert sum(report["blocks"].details["lengths"]) == 5_000_000
    assert report["placement"].found == "nothing is held by workers yet"


def test_inputs_that_train_would_refuse(client):
    line = dask_nn.doctor({}, client=client)["blocks"]
    assert line.status == "fail"
    assert line.found == "X is an empty dict"


def inventory(dask_worker):
    import threading

    folder = Path(dask_worker.local_directory)
    for thread in threading.enumerate():
        if thread.name == "doctor":  # gives its answer before it ends
            thread.join(5)
    return {
        "handlers": sorted(dask_worker.handlers),
        "tasks": sorted(map(str, dask_worker.state.tasks)),
        "files": sorted(str(path) for path in folder.rglob("*")),
        "threads": sorted(t.name for t in threading.enumerate() if t.name == "doctor"),
        "plugins": sorted(dask_worker.plugins),
    }


def test_nothing_stays_on_the_cluster(client):
    dask_nn.doctor(client=client)
    before = client.run(inventory)
    tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    dask_nn.doctor(client=client)
    assert client.run(inventory) == before
    assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == tasks


@pytest.mark.parametrize("options", [{"parameters": 0}, {"timeout_s": -1}])
def test_numbers_must_be_positive(client, options):
    with pytest.raises(ConfigurationError, match="must be positive"):
        dask_nn.doctor(client=client, **options)


@pytest.mark.parametrize("gpus", [2, -1, True])
def test_a_worker_has_one_gpu_or_none(client, gpus):
    with pytest.raises(ConfigurationError, match="gpus must be 0 or 1"):
        dask_nn.doctor(client=client, gpus=gpus)


def test_without_a_client_it_says_what_to_do():
    with pytest.raises(ConfigurationError, match="make one first"):
        dask_nn.doctor()


def test_a_client_that_is_closed_is_one_line(cluster2):
    from distributed import Client

    with Client(cluster2, set_as_default=False) as client:
        pass
    report = dask_nn.doctor(client=client)
    assert [(line.check, line.status) for line in report.lines] == [("scheduler", "fail")]
    assert "the client is closed" in report["scheduler"].found


def test_the_fingerprint_repeats_and_leaves_the_generator_alone():
    import torch

    from dask_nn.diagnosis.canary import standard_fingerprint_here

    before = torch.random.get_rng_state()
    assert standard_fingerprint_here() == standard_fingerprint_here()
    assert torch.equal(torch.random.get_rng_state(), before)
