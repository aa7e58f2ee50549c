"""A cluster whose workers each have a fault of their own, planted in real processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from distributed import Client

from dask_nn.diagnosis.doctor import doctor
from dask_nn.diagnosis.probe import VARIABLES
from dask_nn.testing.processes import address_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dask_nn.diagnosis.report import Report

# Nothing listens there: the port of the "discard" service, which no test machine runs.
NOBODY = "tcp://127.0.0.1:9"
TINY_SHARED_MEMORY = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


@dataclass
class Cluster:
    """A scheduler and workers, each a process of its own.

    Parameters
    ----------
    address : str
        The scheduler's.
    scheduler : Popen
        Its process.
    workers : dict of str to Popen
        By name.
    """

    address: str
    scheduler: Any
    workers: dict[str, Any]

    def addresses(self, client: Client) -> dict[str, str]:
        """Give the workers' addresses by name."""
        found = client.scheduler_info(n_workers=-1)["workers"]
        return {worker["name"]: address for address, worker in found.items()}


class Launcher:
    """Starts Dask's processes, and ends those that it started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def cluster(self) -> Cluster:
        file = self._folder / "scheduler.json"
        scheduler = self._start(
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
            "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file),
        )  # fmt: skip
        address = address_in(file, timeout_s=120)
        return Cluster(address=address, scheduler=scheduler, workers={})

    def worker(
        self,
        cluster: Cluster,
        name: str,
        *options: str,
        before: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        cluster.workers[name] = self._start(
            *before, sys.executable, "-m", "distributed.cli.dask_worker", cluster.address,
            "--name", name, "--no-nanny", "--no-dashboard",
            "--death-timeout", "120", "--local-directory", str(self._folder / name),
            *(() if "--nthreads" in options else ("--nthreads", "1")),
            *(() if "--listen-address" in options else ("--host", "127.0.0.1")), *options,
            environment=environment,
        )  # fmt: skip

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    def _start(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        # Nannies that started earlier have left these in the environment.
        plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=plain | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        self._started.append(process)
        return process


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    found = Launcher(tmp_path_factory.mktemp("dask"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def faulty(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Start the workers; what is wrong with one is named as it is."""
    cluster = launcher.cluster()
    folder = tmp_path_factory.mktemp("packages")
    shadow, blocker = folder / "shadow", folder / "blocker"
    (shadow / "torch").mkdir(parents=True)
    (shadow / "torch" / "__init__.py").write_text("__version__ = '2.0.0'\n")
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text("import sys\nsys.modules['dask_nn'] = None\n")

    launcher.worker(cluster, "healthy")
    launcher.worker(cluster, "other-torch", PYTHONPATH=str(shadow))
    launcher.worker(cluster, "without-dask-nn", PYTHONPATH=str(blocker))
    launcher.worker(cluster, "little-memory", "--memory-limit", "300MB")
    launcher.worker(
        cluster,
        "odd",  # three faults that do not hide each other
        "--nthreads",
        "3",
        OMP_NUM_THREADS="2",
        ATEN_CPU_CAPABILITY="default",
        SLURM_JOB_END_TIME=str(int(time.time()) - 3600),
    )
    addresses = ("--listen-address", "tcp://127.0.0.1:0", "--contact-address", NOBODY)
    launcher.worker(cluster, "unreachable", *addresses)
    if namespaces():
        launcher.worker(
            cluster,
            "tiny-shared-memory",
            before=("unshare", "--mount", "sh", "-c", TINY_SHARED_MEMORY, "sh"),
        )
    return cluster


@pytest.fixture(scope="module")
def faulty_client(faulty: Cluster) -> Iterator[Client]:
    with Client(faulty.address, set_as_default=False, timeout=60) as client:
        client.wait_for_workers(len(faulty.workers), timeout=120)
        yield client


@pytest.fixture(scope="module")
def named(faulty: Cluster, faulty_client: Client) -> dict[str, str]:
    """Give the workers' addresses by name."""
    return faulty.addresses(faulty_client)


@pytest.fixture(scope="module")
def report(faulty_client: Client, named: dict[str, str]) -> Report:
    """Ask the doctor about the faulty cluster, once."""
    return doctor(client=faulty_client, timeout_s=200)


def namespaces() -> bool:
    """Tell whether a mount namespace with a file system of its own can be made here."""
    command = shutil.which("unshare")
    if command is None or os.geteuid() != 0:
        return False
    trial = [command, "--mount", "sh", "-c", TINY_SHARED_MEMORY, "sh", "true"]
    return subprocess.run(trial, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def _needs_namespaces(unavailable: Callable[[str], NoReturn]) -> None:
    if namespaces():
        return
    unavailable("a small /dev/shm is mounted in a namespace of its own, with root and unshare")


@pytest.fixture
def two_with_tiny_shared_memory(
    _needs_namespaces: None, tmp_path: Path
) -> Iterator[Callable[[str], Client]]:
    """Start two workers that have one /dev/shm of 1 MiB together, after a command of the shell."""
    launcher = Launcher(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(launcher.close)

        def start(prepare: str) -> Client:
            cluster = launcher.cluster()
            client = stack.enter_context(Client(cluster.address, set_as_default=False, timeout=60))
            mounted = f"{prepare} && {TINY_SHARED_MEMORY}"
            launcher.worker(cluster, "a", before=("unshare", "--mount", "sh", "-c", mounted, "sh"))
            client.wait_for_workers(1, timeout=120)
            namespace = f"--mount=/proc/{cluster.workers['a'].pid}/ns/mnt"
            launcher.worker(cluster, "b", before=("nsenter", namespace))
            client.wait_for_workers(2, timeout=120)
            return client

        yield start


@pytest.fixture
def lonely_scheduler(tmp_path: Path) -> Iterator[Cluster]:
    """Start a scheduler without workers, for a test to kill."""
    launcher = Launcher(tmp_path)
    yield launcher.cluster()
    launcher.close()
