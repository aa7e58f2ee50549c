"""Clusters, data and the leak check that all tests share."""

from __future__ import annotations

import os

# Before torch or NumPy are imported: on a small machine, threads of threads only take turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_nn.examples.mnist.digits import make_digits
from dask_nn.examples.mnist.idx import write_idx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - it is looked at, nothing is made in it
LEFTOVER_PATIENCE_S = 5.0
# "spawn" is how Dask's nannies start workers elsewhere; then each one imports torch for itself.
START_METHOD = os.environ.get("DASK_NN_TEST_WORKERS", "forkserver")
IMPORTED = (
    "torch._dynamo",
    "torchmetrics",  # two seconds, with what it draws plots with
    "dask_nn.training.rank_main",
    "dask_nn.collectives.make",
    "dask_nn.controller.worker_side",
    "dask_nn.data.peek",
    "dask_nn.data.streaming",
    "dask_nn.metrics.states",
)

# pytest gives its handlers to each logger that does not propagate, and there a cluster silences
# them; where clusters overlap, or end late, they would stay deaf: `caplog` would be empty.
for silenced in ("distributed", "bokeh"):
    logging.getLogger(silenced).propagate = True


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes (``-n 2``) a shared memory of its own to look for leaks.

    Its workers inherit it. Tests of one process at a time look at the host's.
    """
    if not hasattr(config, "workerinput"):
        return
    try:
        os.unshare(os.CLONE_NEWNS)
        for options in (["--make-rprivate", "/"], ["-t", "tmpfs", "tmpfs", str(SHARED_MEMORY)]):
            subprocess.run(["mount", *options], check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError) as error:
        raise pytest.UsageError(
            f"tests in several processes each mount a {SHARED_MEMORY} of their own, which needs "
            f"root and mount: {error}"
        ) from error


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what lives as long as the tests.

    Tests that collect often spent half their time on it.
    """
    gc.collect()
    gc.freeze()


class Blobs(NamedTuple):
    """Rows around one centre per class.

    ``X`` is float32 of shape ``(600, 20)``, ``y`` int64 of shape ``(600,)`` with values 0 to 3.
    """

    X: np.ndarray
    y: np.ndarray


@pytest.fixture
def blobs() -> Blobs:
    """Return a small classification problem, the same in every test and the test's own copy."""
    rng = np.random.Generator(np.random.PCG64(20))
    centres = rng.normal(scale=3.0, size=(4, 20))
    y = rng.integers(0, 4, size=600)
    X = centres[y] + rng.normal(size=(600, 20))
    return Blobs(X.astype(np.float32), y.astype(np.int64))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 2,000 + 500 digits as the four IDX files."""
    folder = tmp_path_factory.mktemp("data")
    digits = make_digits(train=2_000, test=500)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = getattr(digits, f"{part}_images").reshape(-1, 28, 28)
        labels = getattr(digits, f"{part}_labels").astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="session")
def imported_by_workers() -> list[str]:
    """Name the modules that a process needs from which workers are forked."""
    return list(IMPORTED)


@pytest.fixture(scope="session", autouse=True)
def _ready_workers() -> Iterator[None]:
    """Let nannies fork workers from a process that has imported torch: 0.3 s instead of seven.

    The workers are processes like any others, with a pid, memory and connections of their own.
    """
    with dask.config.set({"distributed.worker.multiprocessing-method": START_METHOD}):
        if START_METHOD == "forkserver":
            multiprocessing.set_forkserver_preload(list(IMPORTED))
            with pytest.MonkeyPatch.context() as patch:
                for name, value in dask.config.get("distributed.nanny.pre-spawn-environ").items():
                    patch.setenv(name, str(value))
                multiprocessing.forkserver.ensure_running()
        yield


@pytest.fixture(scope="session")
def _quiet_dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the workers' files out of the checkout, and graphics cards out of the workers."""
    with dask.config.set(
        {
            "temporary-directory": str(tmp_path_factory.mktemp("dask")),
            "distributed.diagnostics.nvml": False,
        }
    ):
        yield


@pytest.fixture(scope="session")
def cluster2(_quiet_dask: None) -> Iterator[LocalCluster]:
    """Start two worker processes of one thread; a test that harms workers makes its own."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def client(cluster2: LocalCluster) -> Iterator[Client]:
    """Connect to the two worker processes, as the current client."""
    with Client(cluster2) as client:
        yield client


@pytest.fixture(scope="session")
def threads_cluster2(_quiet_dask: None) -> Iterator[LocalCluster]:
    """Start two workers of one thread inside this process."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as cluster:
        yield cluster


@pytest.fixture
def threads_client(threads_cluster2: LocalCluster) -> Iterator[Client]:
    """Connect to the two workers inside this process, as the current client."""
    with Client(threads_cluster2) as client:
        yield client


def shared_memory_files() -> set[str]:
    """Return the names of this package's files in the host's shared memory."""
    return {path.name for path in SHARED_MEMORY.glob("dask-nn*")}


def package_threads() -> set[threading.Thread]:
    """Return the threads that this package started in this process and that still run."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("dask-nn-")}


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Fail a test that leaves shared memory or threads of this package behind."""
    files, threads = shared_memory_files(), package_threads()
    yield
    deadline = time.monotonic() + LEFTOVER_PATIENCE_S
    while True:
        left_files, left_threads = shared_memory_files() - files, package_threads() - threads
        if not (left_files or left_threads):
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    names = sorted(thread.name for thread in left_threads)
    pytest.fail(f"left behind: shared memory {sorted(left_files)}, threads {names}")


def services_are_required() -> bool:
    """Tell whether a service that cannot be had is a failure: where all of them were installed."""
    return os.environ.get("DASK_NN_REQUIRE_SERVICES", "") not in {"", "0"}


@pytest.fixture(scope="session")
def unavailable() -> Callable[[str], NoReturn]:
    """Skip a test whose service cannot be had, with the reason; fail where it is required."""

    def leave(reason: str) -> NoReturn:
        if services_are_required():
            pytest.fail(f"DASK_NN_REQUIRE_SERVICES is set, and {reason}")
        pytest.skip(reason)

    return leave


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk is made with mount, which needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount"), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run([shutil.which("umount"), str(folder)], check=True)
