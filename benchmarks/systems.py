"""The systems that are compared; each run has processes of its own, which are gone when it ends.

So nothing of another system, least of all its idle threads or cluster, runs beside the one that
is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.load import OtherLoad
from benchmarks.networks import make_network
from benchmarks.tasks import Measurement, Task, load_digits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["System", "best", "dask_nn", "guide", "measure_rounds", "torchrun"]

ROOT = Path(__file__).parent.parent
# A step of the convolutional network is long: fewer of them find the quickest way as surely.
CALIBRATION_STEPS = {"guide": 200, "cnn": 20}


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to train, by the key of its numbers and the words for the table."""

    key: str
    label: str
    run: Callable[[Task], Measurement]


def measure_rounds(
    systems: Sequence[System],
    task: Task,
    rounds: int,
    on_round: Callable[[int, System, Measurement, float], None],
) -> dict[str, Measurement]:
    """Measure all systems in turns, round after round; return what they took, by key.

    ``on_round`` is called with the round, the system, what it took, and the cores that others used
    meanwhile.
    """
    measured: dict[str, Measurement] = {}
    for number in range(rounds):
        for system in systems:
            others = OtherLoad()
            found = system.run(task)
            on_round(number, system, found, others.cores())
            before = measured.get(system.key)
            measured[system.key] = found if before is None else before.joined(found)
    return measured


def guide(task: Task) -> Measurement:
    """Run the loop of a beginner's guide, with PyTorch's own choice of threads."""
    return _in_new_process(_guide, task)


def best(task: Task, threads: tuple[int, ...] | None = None) -> Measurement:
    """Run the best sequential loop: the fastest of one thread and all, or of those named."""
    return _in_new_process(_best, task, threads)


def dask_nn(task: Task, ranks: int, shards: int | None = None) -> Measurement:
    """Run the spmd engine on a cluster of one-thread workers, as many as ranks."""
    return _in_new_process(_dask_nn, task, ranks, shards)


def torchrun(task: Task, ranks: int) -> Measurement:
    """Run DistributedDataParallel over gloo on the loopback interface."""
    with tempfile.TemporaryDirectory(prefix="dask-nn-bench-") as folder:
        out = Path(folder, "measured.json")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        options = {
            "network": task.network,
            "folder": task.folder,
            "epochs": task.epochs,
            "batch-size": task.batch_size,
            "lr": task.lr,
            "seed": task.seed,
            "out": out,
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        finished = subprocess.run(
            [sys.executable, "-m", *launcher, "-m", "benchmarks.ddp", *given],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            check=False,
            capture_output=True,
            text=True,
        )
        # gloo may abort processes that end; what they measured is written by then.
        if not out.exists():
            message = f"torchrun ended with {finished.returncode}:\n{finished.stderr}"
            raise RuntimeError(message)
        measured = json.loads(out.read_text())
    return Measurement.of(measured["ends_s"], measured["loss"], ranks=ranks, threads=1)


def _in_new_process(function: Callable[..., Measurement], *arguments: Any) -> Measurement:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _guide(task: Task) -> Measurement:
    from dask_nn.examples.mnist.sequential import guide_loop

    return _sequential(task, guide_loop)


def _best(task: Task, threads: tuple[int, ...] | None) -> Measurement:
    from dask_nn.examples.mnist.sequential import best_loop

    steps = CALIBRATION_STEPS[task.network]
    return _sequential(task, partial(best_loop, threads=threads, calibration_steps=steps))


def _sequential(task: Task, loop: Callable[..., Any]) -> Measurement:
    ends_s: list[float] = []
    result = loop(
        make_network(task.network, task.seed),
        load_digits(task.folder),
        epochs=task.epochs,
        batch_size=task.batch_size,
        lr=task.lr,
        seed=task.seed,
        on_epoch_end=lambda *_: ends_s.append(time.perf_counter()),
    )
    return Measurement.of(ends_s, result.loss[-1], ranks=1, threads=result.threads)


def _dask_nn(task: Task, ranks: int, shards: int | None) -> Measurement:
    import torch

    from dask_nn.api import train
    from dask_nn.clusters.local import local_cluster
    from dask_nn.examples.mnist.layout import to_cluster
    from dask_nn.examples.mnist.model import scale
    from dask_nn.training.strategies import Synchronous

    digits = load_digits(task.folder)
    with local_cluster(ranks, 1, dashboard_address="127.0.0.1:0") as client:
        result = train(
            make_network(task.network, task.seed),
            to_cluster(client, digits.train_images),
            to_cluster(client, digits.train_labels),
            loss=torch.nn.CrossEntropyLoss(),
            optimizer=partial(torch.optim.SGD, lr=task.lr),
            epochs=task.epochs,
            batch_size=task.batch_size,
            strategy=Synchronous(shards=shards),
            transform=scale,
            seed=task.seed,
            client=client,
        )
    ends_s = [event.time_s for event in result.events if event.name == "epoch"]
    return Measurement.of(
        ends_s,
        result.history[-1]["loss"],
        ranks=result.run.world_size,
        threads=result.run.threads_per_rank,
        shards=result.run.shards,
        collective=result.run.collective,
        start_s=result.start_s,
        # As the history has them: without what happens between two epochs.
        inside_epoch_s=[record["seconds"] for record in result.history[1:]],
        weights_sha256=result.weights_sha256,
    )
