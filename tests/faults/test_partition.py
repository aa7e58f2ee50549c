"""Hosts that are cut off: workers in network namespaces of their own, joined by a bridge."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

import dask_nn
from dask_nn.testing.faults import install, pretend_cores, slow_steps
from dask_nn.testing.network import NOBODY, SpreadCluster, ip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

    from dask_nn.testing.network import Network

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def spread_cluster(network: Network, tmp_path: Path) -> Iterator[tuple[Client, list[Any]]]:
    """Start a scheduler here and a worker on each host."""
    with SpreadCluster(network, tmp_path) as cluster:
        pretend_cores(cluster.client, 8)
        yield cluster.client, cluster.workers


def test_hosts_train_together(job, undisturbed, spread_cluster, same_bits):
    client, _ = spread_cluster
    result = job.train(client)
    assert result.run.collective == "gloo"
    assert result.run.world_size == 2
    same_bits(result, undisturbed)


def has_torch() -> bool:
    return "torch" in sys.modules


@pytest.mark.parametrize("how", ["both ways", "to the host", "from the host"])
def test_a_host_that_is_cut_off(
    job, undisturbed, network, spread_cluster, ledger, same_bits, heard, tmp_path, how
):
    client, workers = spread_cluster
    written = ledger(client)
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    host = network.hosts[1]

    class Cut(dask_nn.Callback):
        cut = False

        def on_progress(self, progress: Any) -> None:
            if not self.cut and progress.step > 10:
                self.cut = True
                network.cut(host, how)

        def on_event(self, event: Any) -> None:
            # The host comes back while the others train on.
            if event.name == "recovered":
                threading.Timer(0.5, network.mend, (host,)).start()

    began = time.monotonic()
    recovery = dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    result = job.train(client, callbacks=[heard, Cut()], recovery=recovery)
    assert time.monotonic() - began < 40
    same_bits(result, undisturbed)
    written.check(job.order())
    lost = [event for event in heard.events if event.name in {"worker-hung", "worker-lost"}]
    assert any(host.address in event.details["address"] for event in lost)
    assert heard.named("recovered")
    # To let go of a worker the scheduler needs no torch: it would stand still for seconds.
    assert not client.run_on_scheduler(has_torch)
    # What was given up closes, or has no rank any more.
    workers[1].wait(timeout=30)


def test_two_hosts_that_only_the_scheduler_reaches(
    job, undisturbed, network, spread_cluster, ledger, same_bits, heard, tmp_path
):
    """Both live and say so; what they send each other does not arrive."""
    client, _ = spread_cluster
    written = ledger(client)
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    first, second = network.hosts

    class Cut(dask_nn.Callback):
        cut = False

        def on_progress(self, progress: Any) -> None:
            if not self.cut and progress.step > 10:
                self.cut = True
                for host, other in ((first, second), (second, first)):
                    ip("-n", host.name, "neighbour", "replace", other.address, "lladdr", NOBODY,
                       "dev", "eth0", "nud", "permanent")  # fmt: skip

    began = time.monotonic()
    recovery = dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    try:
        result = job.train(client, callbacks=[heard, Cut()], recovery=recovery)
    finally:
        for host, other in ((first, second), (second, first)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("-n", host.name, "neighbour", "delete", other.address, "dev", "eth0")
    assert time.monotonic() - began < 60
    same_bits(result, undisturbed)
    written.check(job.order())
    (lost,) = heard.named("worker-lost")
    assert "is cut off from" in lost.details["reason"]
    assert heard.named("recovered")[0].details["step"] > 10
