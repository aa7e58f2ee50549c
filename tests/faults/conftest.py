"""A small job, its undisturbed run, and clusters that a test may harm."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import cloudpickle
import dask
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.clusters.local import local_cluster
from dask_nn.data.plan import Plan
from dask_nn.testing.faults import Fault, Ledger, pretend_cores, record_steps, slow_steps
from dask_nn.testing.network import Network
from dask_nn.testing.processes import DaskProcess, address_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dask_nn.events import Event
    from dask_nn.training.result import TrainingResult

cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, BLOCK_ROWS, SHARDS, BATCH, EPOCHS, WINDOW = 1920, 120, 4, 64, 3, 2
STEPS = EPOCHS * ROWS // BATCH


building = threading.Lock()


class Tiny(nn.Module):
    """A network with everything that is hard to repeat: dropout, batch-norm, momentum outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leave out the first feature, the row's number."""
        return self.layers(x[:, 1:])


class Heard(Callback):
    """Keeps the events of a run, and does something when the first of a name comes."""

    def __init__(self, **reactions: Callable[[], None]) -> None:
        self.events: list[Event] = []
        self._reactions = {name.replace("_", "-"): then for name, then in reactions.items()}

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        then = self._reactions.pop(event.name, None)
        if then is not None:
            threading.Thread(target=then).start()

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


@dataclass(frozen=True)
class Job:
    """What every case trains."""

    X: np.ndarray
    y: np.ndarray

    def train(self, client: Any, **options: Any) -> TrainingResult:
        with building:  # some tests train in two threads
            torch.manual_seed(3)
            model = Tiny()
        options = {
            "loss": nn.CrossEntropyLoss(),
            "optimizer": partial(SGD, lr=0.05, momentum=0.9),
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "metrics": ["accuracy"],
            "window": WINDOW,
            "strategy": dask_nn.Synchronous(shards=SHARDS, threads_per_rank=1),
        } | options
        return dask_nn.train(model, self.X, self.y, client=client, **options)

    def order(self, epochs: int = EPOCHS) -> dict[tuple[int, int], list[int]]:
        """Give the rows of every (step, shard), from the plan."""
        lengths = (BLOCK_ROWS,) * (ROWS // BLOCK_ROWS)
        found = {}
        for epoch in range(epochs):
            plan = Plan(
                block_lengths=lengths,
                shards=SHARDS,
                batch_size=BATCH,
                window=WINDOW,
                seed=0,
                epoch=epoch,
                shuffle="blocks",
            )
            for t in range(plan.num_steps):
                for shard in range(SHARDS):
                    rows = plan.sample_ids(t, shard).tolist()
                    found[epoch * plan.num_steps + t, shard] = rows
        return found


@pytest.fixture(scope="session")
def job() -> Job:
    return make_job()


def make_job() -> Job:
    """Make the job; processes that a test starts make their own."""
    rng = np.random.Generator(np.random.PCG64(7))
    X = rng.normal(size=(ROWS, 8)).astype(np.float32)
    X[:, 0] = np.arange(ROWS)
    y = (X[:, 1:4].argmax(axis=1)).astype(np.int64)
    return Job(X, y)


@pytest.fixture(scope="session")
def undisturbed(job: Job) -> TrainingResult:
    """Train the job in this process, where nothing can be lost."""
    with dask.config.set({"dask-nn.block-size": f"{BLOCK_ROWS * 32} B"}):
        return job.train(None)


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    with dask.config.set({"dask-nn.block-size": f"{BLOCK_ROWS * 32} B"}):
        yield


@pytest.fixture
def make_cluster(_quiet_dask: None) -> Iterator[Callable[..., Any]]:
    """Give a function that starts a cluster of this test's own."""
    with contextlib.ExitStack() as stack:

        def make(workers: int = 2, **options: Any) -> Any:
            client = stack.enter_context(
                local_cluster(workers, dashboard_address="127.0.0.1:0", **options)
            )
            pretend_cores(client, 8)
            return client

        yield make


@pytest.fixture
def make_scalable(_quiet_dask: None) -> Iterator[Callable[[int], Any]]:
    """Give a function that starts a cluster that its client can scale."""
    with contextlib.ExitStack() as stack:

        def make(workers: int) -> Any:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster, set_as_default=False))
            pretend_cores(client, 8)
            return client

        yield make


@pytest.fixture(scope="session")
def network(unavailable: Callable[[str], NoReturn]) -> Iterator[Network]:
    """Make two hosts with addresses of their own."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(Network())
        except OSError as error:
            unavailable(str(error))
        yield found


@pytest.fixture
def quick_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gangs grow more often than is good for speed."""
    monkeypatch.setattr("dask_nn.controller.spmd.RESIZE_EVERY_S", 1.0)


@pytest.fixture
def unhurried(quick_resizes: None) -> Fault:
    """Give a pause after every step, so that a replacement is there long before the run ends."""
    forked = dask.config.get("distributed.worker.multiprocessing-method") == "forkserver"
    return slow_steps(0.06 if forked else 0.15)


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[Any], Ledger]:
    folder = tmp_path / "ledger"
    folder.mkdir()
    return lambda client: record_steps(client, folder)


@pytest.fixture
def heard(request: pytest.FixtureRequest) -> Iterator[Heard]:
    """Give a listener; its recovery times go to the file that DASK_NN_RECOVERY_LOG names."""
    found = Heard()
    yield found
    times = [event.details["seconds"] for event in found.named("recovered")]
    log = os.environ.get("DASK_NN_RECOVERY_LOG")
    if log and times:
        with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps([request.node.name, times]) + "\n")


@pytest.fixture
def heard_with() -> type[Heard]:
    return Heard


@pytest.fixture
def same_bits() -> Callable[[TrainingResult, TrainingResult], None]:
    """Give a comparison of weights, optimizer and losses, bit by bit."""
    return _same_bits


def _same_bits(result: TrainingResult, reference: TrainingResult) -> None:
    assert result.weights_sha256 == reference.weights_sha256
    mine, other = result.optimizer_state["state"], reference.optimizer_state["state"]
    assert mine.keys() == other.keys()
    for key, state in mine.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key][name])
            else:
                assert value == other[key][name]
    assert [r["loss"] for r in result.history] == [r["loss"] for r in reference.history]
    assert result.steps == reference.steps


@pytest.fixture
def dask_config() -> Any:
    return dask.config.set


@pytest.fixture
def dask_processes(
    tmp_path: Path,
) -> Iterator[Callable[[int], tuple[DaskProcess, list[DaskProcess], str]]]:
    """Give a function that starts a scheduler and workers as processes of their own."""
    started: list[DaskProcess] = []

    def launch(*arguments: str) -> DaskProcess:
        process = DaskProcess(*arguments)
        started.append(process)
        return process

    def start_worker(address: str, threads: int = 1) -> DaskProcess:
        return launch(
            "worker", address, "--no-nanny", "--nthreads", str(threads), "--no-dashboard",
            "--death-timeout", "5", "--local-directory", str(tmp_path / "worker"),
        )  # fmt: skip

    def make(workers: int, port: int = 0) -> tuple[DaskProcess, list[DaskProcess], str]:
        file = tmp_path / f"scheduler-{len(started)}.json"
        scheduler = launch(
            "scheduler", "--host", "127.0.0.1", "--port", str(port),
            "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file),
        )  # fmt: skip
        address = address_in(file)
        found = [start_worker(address) for _ in range(workers)]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=60)
            pretend_cores(client, 8)
        return scheduler, found, address

    make.start_worker = start_worker  # type: ignore[attr-defined]
    yield make
    for process in started:
        process.kill()
        process.wait()
