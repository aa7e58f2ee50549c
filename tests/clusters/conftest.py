"""A real Slurm, a real sshd, and a small job whose bits every cluster must give."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import dask_nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from dask_nn.training.result import TrainingResult

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SERVICES = Path(__file__).parents[1] / "services"
# A lost worker is replaced so long after it was seen last, and a restart of its nanny takes less.
SOON_REPLACED = {"distributed.deploy.lost-worker-timeout": "5s"}


def free_ports(count: int) -> list[int]:
    """Give ports of loopback that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def find(command: str) -> str | None:
    """Look for a command where root's commands are, too."""
    return shutil.which(command, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def slurm(unavailable: Callable[[str], Any]) -> Iterator[None]:
    """Run a Slurm of two nodes, which ``sbatch`` and the like find through SLURM_CONF."""
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if find(name) is None]
    if missing:
        unavailable(f"Slurm is not installed: no {', '.join(missing)} (tests/services/install.sh)")
    if os.geteuid() != 0:
        unavailable("a Slurm of one's own needs root")
    # Not below pytest's folders: the path of a socket is short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    ports = map(str, free_ports(3))
    started = subprocess.run(
        [SERVICES / "slurm-start.sh", folder, *ports],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        if started.returncode:
            pytest.fail(f"Slurm did not start: {started.stdout}{started.stderr}")
        yield
    finally:
        subprocess.run([SERVICES / "slurm-stop.sh", folder], timeout=60, check=False)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Queue:
    """What Slurm has to do."""

    def jobs(self) -> list[str]:
        """Give the numbers of jobs that wait, run or end."""
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%i"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.split()

    def becomes_empty(self, timeout_s: float = 20) -> bool:
        """Wait until no job is left."""
        deadline = time.monotonic() + timeout_s
        while self.jobs():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def next_job(self, known: set[str], timeout_s: float = 60) -> str:
        """Wait for a job beside those that are known."""
        deadline = time.monotonic() + timeout_s
        while not (others := set(self.jobs()) - known):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (other,) = others
        return other

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let jobs wait for the length of a block; those that run go on."""
        partition = ["scontrol", "update", "PartitionName=debug"]
        subprocess.run([*partition, "State=DOWN"], timeout=30, check=True)
        try:
            yield
        finally:
            subprocess.run([*partition, "State=UP"], timeout=30, check=True)

    def cancel(self, number: str) -> None:
        """End a job."""
        subprocess.run(["scancel", number], timeout=30, check=True)  # noqa: S607


@pytest.fixture
def queue(slurm: None) -> Queue:
    """Look into Slurm's queue, which must be empty before a test."""
    found = Queue()
    assert found.becomes_empty()
    return found


@dataclass(frozen=True)
class Sshd:
    """How to log in to the sshd of the tests."""

    port: int
    folder: Path

    @property
    def connect_options(self) -> dict[str, Any]:
        return {
            "port": self.port,
            "client_keys": [str(self.folder / "client_key")],
            "known_hosts": str(self.folder / "known_hosts"),
        }


@pytest.fixture(scope="session")
def sshd(
    unavailable: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sshd]:
    """Run a private sshd on loopback."""
    missing = [name for name in ("sshd", "ssh-keygen") if find(name) is None]
    if missing:
        unavailable(f"sshd is not installed: no {', '.join(missing)} (tests/services/install.sh)")
    folder = tmp_path_factory.mktemp("sshd")
    (port,) = free_ports(1)
    started = subprocess.run(
        [SERVICES / "sshd-start.sh", folder, str(port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if started.returncode:
        pytest.fail(f"sshd did not start: {started.stdout}{started.stderr}")
    yield Sshd(port, folder)
    os.kill(int((folder / "sshd.pid").read_text()), signal.SIGTERM)


class SmallJob:
    """A training whose bits do not depend on the cluster."""

    def __init__(self) -> None:
        rng = np.random.Generator(np.random.PCG64(5))
        self.X = rng.normal(size=(960, 12)).astype(np.float32)
        self.y = (self.X @ rng.normal(size=(12, 3)).astype(np.float32)).argmax(axis=1)

    def train(self, client: Client | None, **options: Any) -> TrainingResult:
        torch.manual_seed(0)
        return dask_nn.train(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)),
            self.X,
            self.y,
            loss=nn.CrossEntropyLoss(),
            optimizer=partial(SGD, lr=0.1),
            batch_size=32,
            strategy=dask_nn.Synchronous(shards=4, threads_per_rank=1),
            client=client,
            **{"epochs": 3, **options},
        )


@pytest.fixture(scope="session")
def small_job() -> SmallJob:
    """Return the job."""
    return SmallJob()


@pytest.fixture(scope="session")
def small_sha256(small_job: SmallJob) -> str:
    """Return the hash of its weights, trained in this process alone."""
    return small_job.train(None).weights_sha256


@pytest.fixture
def soon_replaced() -> Iterator[None]:
    """Let lost workers be replaced sooner than by default."""
    with dask.config.set(SOON_REPLACED):
        yield


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, where jobs leave their files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
