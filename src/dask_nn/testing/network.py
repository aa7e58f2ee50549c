"""Hosts with addresses of their own on one machine: network namespaces, joined by a bridge.

It needs root and the ``ip`` command. What is made here has names that begin with that of one
:class:`Network`, and goes with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from distributed import Client, Security

from dask_nn.testing.processes import START_S, DaskProcess, address_in

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Host", "Network", "SpreadCluster"]

NOBODY = "02:00:00:00:00:99"


def ip(*arguments: str) -> None:
    """Run the ip command; its error carries what it said."""
    command = shutil.which("ip") or "ip"
    subprocess.run([command, *arguments], check=True, capture_output=True, text=True)  # noqa: S603


@dataclass(frozen=True)
class Host:
    """A namespace.

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
    """A bridge in this namespace with hosts behind it; a context manager.

    Parameters
    ----------
    num_hosts : int
        How many.

    Raises
    ------
    OSError
        If namespaces cannot be made here; says why.
    """

    def __init__(self, num_hosts: int = 2) -> None:
        self.name = f"dnn{os.getpid() % 100_000}"
        self._subnet = f"10.231.{1 + os.getpid() % 250}"
        self._num_hosts = num_hosts
        self.address = f"{self._subnet}.1"
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            message = "network namespaces need root and the ip command (Debian: iproute2)"
            raise PermissionError(message)
        try:
            ip("link", "add", self.name, "type", "bridge")
            ip("address", "add", f"{self.address}/24", "dev", self.name)
            ip("link", "set", self.name, "up")
            for number in range(self._num_hosts):
                self._plug_in(number)
        except subprocess.CalledProcessError as error:
            self._remove()
            message = f"network namespaces cannot be made here: {error.stderr.strip()}"
            raise OSError(message) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _plug_in(self, number: int) -> None:
        name = f"{self.name}h{number}"
        host = Host(name, f"{self._subnet}.{number + 2}", f"02:00:00:00:01:{number:02}")
        ip("netns", "add", name)
        self.hosts.append(host)
        inside = ("-n", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", self.name, "up")
        ip(*inside, "link", "set", "eth0", "address", host.mac)
        ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip(*inside, "link", "set", device, "up")

    def _remove(self) -> None:
        while self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", self.hosts.pop().name)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "delete", self.name)

    def cut(self, host: Host, how: str) -> None:
        """Lose what a host sends to this namespace, what it is sent from there, or everything."""
        match how:
            case "both ways":
                ip("link", "set", host.name, "down")
            case "to the host":
                self._misdirect((), host.address, self.name, NOBODY)
            case "from the host":
                self._misdirect(("-n", host.name), self.address, "eth0", NOBODY)

    def mend(self, host: Host) -> None:
        """Let everything through again."""
        ip("link", "set", host.name, "up")
        self._misdirect((), host.address, self.name, host.mac)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("-n", host.name, "neighbour", "delete", self.address, "dev", "eth0")

    @staticmethod
    def _misdirect(inside: tuple[str, ...], address: str, device: str, mac: str) -> None:
        ip(*inside, "neighbour", "replace", address, "lladdr", mac, "dev", device,
           "nud", "permanent")  # fmt: skip


class SpreadCluster:
    """A scheduler in this namespace and worker processes on each host; a context manager.

    Parameters
    ----------
    network : Network
        Of the hosts.
    folder : path
        For the scheduler's file, certificates, and what workers write.
    workers_per_host : int
        Worker processes of one thread on each host.
    security : Security, optional
        With certificates as text, as ``Security.temporary()`` has them; everything then talks over
        TLS alone.

    Attributes
    ----------
    client : Client
        Connected.
    workers : list of DaskProcess
        The worker processes, host after host.
    """

    def __init__(
        self,
        network: Network,
        folder: Path,
        *,
        workers_per_host: int = 1,
        security: Security | None = None,
    ) -> None:
        self._network = network
        self._folder = folder
        self._per_host = workers_per_host
        self._security = security
        self._started: list[DaskProcess] = []
        self.workers: list[DaskProcess] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end_all)
            self._start()
            self.client = stack.enter_context(
                Client(self.address, security=self._security, set_as_default=False)
            )
            self.client.wait_for_workers(len(self.workers), timeout=START_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._network.hosts:
            self._network.mend(host)
        self._stack.close()

    def _start(self) -> None:
        tls = self._write_certificates()
        file = self._folder / "scheduler.json"
        # It has no torch, as many schedulers have none.
        self._launch(
            "scheduler", "--host", self._network.address, "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file), *tls, method="spawn",
        )  # fmt: skip
        self.address = address_in(file)
        self._tls = tls
        self.workers = [
            self._launch_worker(host, number)
            for host in self._network.hosts
            for number in range(self._per_host)
        ]

    def replace_dead(self) -> None:
        """Start a worker in place of each that has ended, and wait until all are there."""
        for index, worker in enumerate(self.workers):
            if not worker.is_alive:
                host, number = divmod(index, self._per_host)
                self.workers[index] = self._launch_worker(self._network.hosts[host], number)
        self.client.wait_for_workers(len(self.workers), timeout=START_S)

    def _launch_worker(self, host: Host, number: int) -> DaskProcess:
        return self._launch(
            "worker", self.address, "--host", host.address, "--no-nanny", "--nthreads", "1",
            "--no-dashboard", "--death-timeout", "5",
            "--local-directory", str(self._folder / f"{host.name}-{number}"), *self._tls,
            namespace=host.name,
        )  # fmt: skip

    def _launch(self, role: str, *arguments: str, **options: str) -> DaskProcess:
        process = DaskProcess(role, *arguments, **options)
        self._started.append(process)
        return process

    def _end_all(self) -> None:
        for process in self._started:
            process.kill()
        for process in self._started:
            process.wait()

    def _write_certificates(self) -> list[str]:
        if self._security is None:
            return []
        arguments = []
        for option, field in (
            ("--tls-ca-file", "tls_ca_file"),
            ("--tls-cert", "tls_scheduler_cert"),
            ("--tls-key", "tls_scheduler_key"),
        ):
            path = self._folder / f"{field}.pem"
            path.touch(mode=0o600)
            path.write_text(getattr(self._security, field), encoding="utf-8")
            arguments += [option, str(path)]
        return arguments
