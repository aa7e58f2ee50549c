"""Hosts that are cut off: workers in network namespaces of their own, joined by a bridge."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from distributed import Client

import dask_nn
from dask_nn.testing.faults import Fault, install, pretend_cores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAME = f"dnn{os.getpid() % 100_000}"
NOBODY = "02:00:00:00:00:99"


def ip(*arguments: str) -> None:
    command = shutil.which("ip") or "ip"
    subprocess.run([command, *arguments], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A worker's namespace.

    Parameters
    ----------
    name : str
        Of the namespace, and of the bridge's end of its cable.
    address, mac : str
        Of its own end.
    """

    name: str
    address: str
    mac: str


class Network:
    """A bridge in this namespace with two hosts behind it."""

    def __init__(self) -> None:
        third = 1 + os.getpid() % 250
        self.address = f"10.231.{third}.1"
        ip("link", "add", NAME, "type", "bridge")
        ip("address", "add", f"{self.address}/24", "dev", NAME)
        ip("link", "set", NAME, "up")
        self.hosts = [self._plug_in(n, f"10.231.{third}.{n + 2}") for n in range(2)]

    def _plug_in(self, number: int, address: str) -> Host:
        name = f"{NAME}h{number}"
        mac = f"02:00:00:00:01:{number:02}"
        ip("netns", "add", name)
        inside = ("-n", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", NAME, "up")
        ip(*inside, "link", "set", "eth0", "address", mac)
        ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip(*inside, "link", "set", device, "up")
        return Host(name, address, mac)

    def cut(self, host: Host, how: str) -> None:
        """Lose what a host sends to this namespace, what it is sent from there, or everything."""
        match how:
            case "both ways":
                ip("link", "set", host.name, "down")
            case "to the host":
                self._misdirect((), host.address, NAME, NOBODY)
            case "from the host":
                self._misdirect(("-n", host.name), self.address, "eth0", NOBODY)

    def mend(self, host: Host) -> None:
        """Let everything through again."""
        ip("link", "set", host.name, "up")
        self._misdirect((), host.address, NAME, host.mac)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("-n", host.name, "neighbour", "delete", self.address, "dev", "eth0")

    def close(self) -> None:
        for host in getattr(self, "hosts", ()):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "delete", NAME)

    @staticmethod
    def _misdirect(inside: tuple[str, ...], address: str, device: str, mac: str) -> None:
        ip(*inside, "neighbour", "replace", address, "lladdr", mac, "dev", device,
           "nud", "permanent")  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    try:
        found = Network()
    except subprocess.CalledProcessError as error:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "delete", NAME)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield found
    found.close()


@pytest.fixture
def spread_cluster(network: Network, tmp_path: Path) -> Iterator[tuple[Client, list[Any]]]:
    """Start a scheduler here and a worker on each host."""
    started = []

    def launch(*command: str) -> Any:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        return process

    try:
        file = tmp_path / "scheduler.json"
        launch(
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", network.address,
            "--port", "0", "--no-dashboard", "--scheduler-file", str(file),
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        address = json.loads(file.read_text(encoding="utf-8"))["address"]
        workers = [
            launch(
                "ip",
                "netns",
                "exec",
                host.name,
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--host",
                host.address,
                "--no-nanny",
                "--nthreads",
                "1",
                "--no-dashboard",
                "--death-timeout",
                "5",
                "--local-directory",
                str(tmp_path / host.name),
            )
            for host in network.hosts
        ]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=30)
            pretend_cores(client, 8)
            yield client, workers
    finally:
        for host in network.hosts:
            network.mend(host)
        for process in started:
            process.kill()
            process.wait()


def test_hosts_train_together(job, undisturbed, spread_cluster, same_bits):
    client, _ = spread_cluster
    result = job.train(client)
    assert result.run.collective == "gloo"
    assert result.run.world_size == 2
    same_bits(result, undisturbed)


@pytest.mark.parametrize("how", ["both ways", "to the host", "from the host"])
def test_a_host_that_is_cut_off(
    job, undisturbed, network, spread_cluster, ledger, same_bits, heard, tmp_path, how
):
    client, workers = spread_cluster
    written = ledger(client)
    pause = Fault(point="applied", action="sleep", seconds=0.05, every_time=True)
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
    # What was given up closes, or has no rank any more.
    workers[1].wait(timeout=30)
