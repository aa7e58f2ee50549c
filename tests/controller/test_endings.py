"""However a run ends, nothing of it stays on the cluster."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.controller import rank_handles, worker_side
from dask_nn.errors import NonFiniteLoss, RankFailed, TrainingInterrupted, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")

PATIENCE_S = 5.0
MARK = 1e6


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    X = rng.normal(size=(2000, 6)).astype(np.float32)
    X[-7] = MARK
    return X, rng.integers(0, 3, size=2000)


def train(client: Client, **given: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.01),
        "batch_size": 32,
        "epochs": 2,
        "transform": calm,
        "metrics": ["accuracy"],
        "strategy": dask_nn.Synchronous(shards=4, threads_per_rank=1),
    } | given
    return dask_nn.train(nn.Linear(6, 3), *data(), client=client, **options)


def calm(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-3, 3)


def stumble(x: torch.Tensor) -> torch.Tensor:
    if (x == MARK).any():
        message = "a marked row"
        raise LookupError(message)
    return x


def spoil(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == MARK, torch.nan, x)


def everything(x: torch.Tensor) -> torch.Tensor:
    if threading.current_thread() is not threading.main_thread():
        message = "at once, on every rank"
        raise LookupError(message)
    return x


class Breaking(Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_epoch_end(self, record):
        raise self.error


def state_of_worker() -> dict[str, Any]:
    """Say what a run may have left in a worker's process."""
    names = [thread.name for thread in threading.enumerate()]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    return {
        "threads": [name for name in names if name.startswith("dask-nn")],
        "handles": sorted(rank_handles._handles),
        "memory": [line for line in mapped.splitlines() if "dask-nn" in line],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def leftovers(client: Client, descriptors: dict[str, int]) -> dict[str, Any]:
    found = {}
    for address, state in client.run(state_of_worker).items():
        # Connections between workers are kept by Dask itself.
        many = state.pop("descriptors") > descriptors.get(address, 0) + 8
        if any(state.values()) or many:
            found[address] = state | {"many descriptors": many}
    tasks = client.run_on_scheduler(lambda dask_scheduler: list(map(str, dask_scheduler.tasks)))
    if tasks:
        found["tasks"] = tasks
    if client.futures:
        found["futures"] = list(map(str, client.futures))
    shared = [path.name for path in Path("/dev/shm").glob("dask-nn*")]  # noqa: S108
    return found | ({"shared memory": shared} if shared else {})


@pytest.fixture
def clean(client: Client) -> Iterator[Callable[[], None]]:
    """Give a check that nothing stays on the cluster, and wait for what goes away by itself."""
    threads = set(threading.enumerate())
    before = {
        address: state["descriptors"] for address, state in client.run(state_of_worker).items()
    }

    def check() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while found := leftovers(client, before):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        mine = {t.name for t in set(threading.enumerate()) - threads if "dask-nn" in t.name}
        assert not mine

    return check


@pytest.mark.parametrize("engine", ["spmd", "graph"])
def test_nothing_stays_after_success(client, clean, engine):
    for _ in range(2):
        train(client, engine=engine, epochs=1)
    clean()


ENDINGS = {
    "an exception of one rank": ({"transform": stumble}, RankFailed),
    "an exception of all ranks": ({"transform": everything}, RankFailed),
    "a loss that is no number": ({"transform": spoil}, NonFiniteLoss),
    "an exception of a callback": (
        {"callbacks": [Breaking(OSError)], "epochs": 10_000},
        OSError,
    ),
    "Ctrl-C": (
        {"callbacks": [Breaking(KeyboardInterrupt)], "epochs": 10_000},
        TrainingInterrupted,
    ),
}


@pytest.mark.parametrize("engine", ["spmd", "graph"])
@pytest.mark.parametrize("name", ENDINGS)
def test_nothing_stays_after_failure(client, clean, name, engine):
    options, error = ENDINGS[name]
    try:
        train(client, engine=engine, **options)
    except error:
        pass
    else:
        pytest.fail(f"{error.__name__} was not raised")
    clean()


def test_a_rank_that_cannot_even_begin_leaves_nothing(client, clean):
    """Its payload cannot be read."""
    (address, *_) = client.scheduler_info(n_workers=-1)["workers"]
    seat = worker_side.Seat(
        run_id="run",
        generation=0,
        rank=0,
        world_size=1,
        address=address,
        leader=address,
        collective="serial",
    )
    future = client.submit(worker_side.run_rank, b"no pickle", seat, workers=[address], pure=False)
    with pytest.raises(pickle.UnpicklingError):
        future.result(timeout=30)
    future.release()
    clean()


@pytest.fixture(scope="module")
def crowd(_quiet_dask: None) -> Iterator[Client]:
    """Three worker processes that each think they have a core of their own; one will be killed."""

    def pretend() -> None:
        worker_side.cpu_count = lambda: 3

    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(pretend)
        yield client


def test_three_ranks_in_processes_give_the_bits_of_one(crowd):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    X, y = data()
    given = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.1),
        "batch_size": 64,
        "transform": calm,
        "strategy": dask_nn.Synchronous(shards=8, threads_per_rank=1),
    }
    one = dask_nn.train(model, da.from_array(X, chunks=(100, 6)), y, **given)
    three = dask_nn.train(model, da.from_array(X, chunks=(100, 6)), y, client=crowd, **given)
    assert three.run.world_size == 3
    assert three.weights_sha256 == one.weights_sha256


def test_a_killed_worker_ends_the_run_and_the_other_ranks(crowd):
    pids = crowd.run(os.getpid)
    (victim, pid), *_ = sorted(pids.items())[1:]
    killed_s: list[float] = []

    class Kill(Callback):
        def on_train_start(self, run):
            assert run.world_size == 3
            assert run.collective == "shared_memory"
            os.kill(pid, signal.SIGKILL)
            killed_s.append(time.monotonic())

    recovery = dask_nn.Recovery(max_failures=0)
    with pytest.raises(WorkerLost) as caught:
        train(crowd, epochs=100_000, callbacks=[Kill()], recovery=recovery)
    assert time.monotonic() - killed_s[0] < PATIENCE_S
    assert caught.value.address == victim
    assert f"worker {victim}, which ran rank 1, was lost" in str(caught.value)
    assert "max_failures=0" in str(caught.value)

    survivors = [address for address in pids if address != victim]
    deadline = time.monotonic() + PATIENCE_S
    while any(
        state["threads"] or state["handles"]
        for state in crowd.run(state_of_worker, workers=survivors).values()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running = crowd.processing(survivors)
    assert not any(running.values())
    assert not [path.name for path in Path("/dev/shm").glob("dask-nn*")]  # noqa: S108
