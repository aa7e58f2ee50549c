"""Sending to workers that take nothing ends with the reason."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_nn.clusters.local import local_cluster
from dask_nn.data import sending
from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable


def paused(client: Client) -> list[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [address for address, worker in workers.items() if worker["status"] == "paused"]


def wait_until(found: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + 20
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE_S", 1.0)


@pytest.mark.usefixtures("impatient")
def test_workers_without_memory_are_named() -> None:
    with (
        dask.config.set({"distributed.worker.memory.pause": 0.01}),
        local_cluster(1, memory_limit="3 GiB", dashboard_address="127.0.0.1:0") as client,
    ):
        workers = wait_until(lambda: paused(client))
        with pytest.raises(ClusterError, match=r"is paused with .* in use.*memory_limit") as caught:
            sending.send(client, {"x": np.zeros(3)})
    (address,) = workers
    assert address in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_a_cluster_without_workers_is_said_to_have_none() -> None:
    with local_cluster(1, dashboard_address="127.0.0.1:0") as client:
        client.retire_workers(close_workers=True)
        with pytest.raises(ClusterError, match="no workers"):
            sending.send(client, {"x": np.zeros(3)})


def test_waiting_for_workers_that_take_no_work_ends(monkeypatch):
    monkeypatch.setattr(sending, "PATIENCE_S", 1.0)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        task = client.submit(int, 1)
        with pytest.raises(ClusterError, match="no workers that could"):
            sending.gather(client, [task])
