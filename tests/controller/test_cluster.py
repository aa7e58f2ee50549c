from __future__ import annotations

import dataclasses

import dask
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.controller.cluster import check_versions, client_versions, inspect_workers
from dask_nn.controller.placement import WorkerFacts
from dask_nn.errors import ClusterError, IncompatibleWorkers

WANTED = {"python": "3.13.2", "torch": "2.9.0", "dask-nn": "1.0"}
WORKER = WorkerFacts(
    address="tcp://a:1",
    host="a",
    process=1,
    machine="x86_64",
    cores=1,
    threads=1,
    memory_bytes=0,
    num_gpus=0,
    versions=WANTED,
)

# A worker that runs this first cannot import torch.
HIDE_TORCH = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is hidden from this worker")

sys.meta_path.insert(0, Hidden())
"""


def worker(address: str = "tcp://b:2", **versions: str) -> WorkerFacts:
    return dataclasses.replace(WORKER, address=address, versions=WANTED | versions)


def test_equal_versions_pass():
    check_versions([WORKER, worker()], WANTED)


def test_of_python_only_the_minor_version_counts():
    check_versions([worker(python="3.13.9")], WANTED)
    with pytest.raises(IncompatibleWorkers, match=r"python 3\.13\.2, but tcp://b:2 has 3\.14\.0"):
        check_versions([worker(python="3.14.0")], WANTED)


@pytest.mark.parametrize("name", ["torch", "dask-nn"])
def test_another_version_is_named_with_the_worker_and_what_to_do(name):
    text = rf"client has {name} .*, but tcp://b:2 has 0\.1; install the same version of {name}"
    with pytest.raises(IncompatibleWorkers, match=text):
        check_versions([WORKER, worker(**{name: "0.1"})], WANTED)


def test_a_missing_package_is_told_apart_and_with_its_reason():
    broken = worker(torch="", problem="libtorch.so is missing")
    with pytest.raises(IncompatibleWorkers, match=r"tcp://b:2 has none \(libtorch.so is missing\)"):
        check_versions([WORKER, broken], WANTED)


def test_of_many_workers_a_few_are_named():
    workers = [worker(f"tcp://b:{number}", torch="0.1") for number in range(9)]
    with pytest.raises(IncompatibleWorkers, match=r"tcp://b:4 has 0\.1 and 4 more"):
        check_versions(workers, WANTED)


def test_workers_describe_themselves(threads_client):
    workers = inspect_workers(threads_client)
    known = threads_client.scheduler_info(n_workers=-1)["workers"]
    assert {facts.address for facts in workers} == set(known)
    assert len({(facts.host, facts.process) for facts in workers}) == 1
    assert all(facts.cores >= 1 and facts.threads == 1 for facts in workers)
    for facts in workers:
        assert client_versions().items() <= facts.versions.items()


def train(client: Client) -> None:
    dask_nn.train(
        nn.Linear(3, 2),
        np.zeros((8, 3)),
        np.zeros(8, int),
        loss=nn.CrossEntropyLoss(),
        optimizer=SGD,
        batch_size=4,
        client=client,
    )


@pytest.mark.usefixtures("_quiet_dask")
def test_a_cluster_without_workers_says_so():
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        pytest.raises(ClusterError, match="has no workers; scale it up"),
    ):
        train(client)


@pytest.mark.usefixtures("_quiet_dask")
def test_a_worker_process_without_torch_is_named(tmp_path):
    preload = tmp_path / "hide_torch.py"
    preload.write_text(HIDE_TORCH)
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, preload=[str(preload)], dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        (address,) = client.scheduler_info(n_workers=-1)["workers"]
        with pytest.raises(
            IncompatibleWorkers,
            match=rf"client has torch {torch.__version__.split('+')[0]}, but {address} has none "
            r"\(torch is hidden from this worker\)",
        ):
            train(client)
