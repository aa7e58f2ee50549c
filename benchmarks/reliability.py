"""Measure what failures and checkpoints cost: ``python -m benchmarks.reliability``."""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.load import OtherLoad
from dask_nn.callbacks.base import Callback
from dask_nn.checkpoints.options import Checkpoint
from dask_nn.clusters.local import local_cluster
from dask_nn.examples.mnist.compare import Job, train_parallel
from dask_nn.examples.mnist.data import load

if TYPE_CHECKING:
    from distributed import Client

    from dask_nn.events import Event, Progress
    from dask_nn.examples.mnist.sequential import Digits

RANKS = 2
WORKERS_BACK_S = 60.0
# A worker is killed in the second epoch of three.
KILL_EPOCHS = 3
# Of a run that compares epochs with and without a checkpoint before them.
EPOCHS = 24


class Killer(Callback):
    """Kills a worker some steps into a run, and ends the run once it has gone on for a while."""

    def __init__(self, pid: int, rank: int) -> None:
        self._pid = pid
        self.rank = rank
        self.killed_at = self.recovered_s = 0.0

    def on_progress(self, progress: Progress) -> None:
        """Kill in the middle of an epoch."""
        if not self.killed_at and progress.epoch == 1:
            self.killed_at = time.time()
            os.kill(self._pid, signal.SIGKILL)

    def on_event(self, event: Event) -> None:
        """Note when the next gang begins its first step."""
        if event.name == "recovered" and not self.recovered_s:
            self.recovered_s = event.time_s - self.killed_at


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the MNIST files.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-report"),
    show_default=True,
    help="Folder for reliability.json.",
)
def main(*, kills: int, rounds: int, data_dir: Path | None, out: Path) -> None:
    """Measure, print and write."""
    console, others = Console(highlight=False, soft_wrap=True), OtherLoad()
    digits = load(data_dir).digits
    with local_cluster(RANKS) as client:
        costs = checkpoint_costs(client, digits, rounds)
        console.print(f"An epoch takes {costs['plain_s']:.3f} s, one after a checkpoint "
                      f"{costs['saved_s']:.3f} s")  # fmt: skip
        recoveries = []
        for number in range(kills):
            recoveries.append(kill_once(client, digits, number % RANKS))
            console.print(f"kill {number + 1}/{kills}: next step after {recoveries[-1]:.2f} s")
    found = {
        "recovery_s": recoveries,
        "checkpoints": costs,
        "others_cores": others.cores(),
    }
    console.print(make_table(found))
    out.mkdir(parents=True, exist_ok=True)
    (out / "reliability.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"Wrote {out / 'reliability.json'}")


def kill_once(client: Client, digits: Digits, rank: int) -> float:
    """Train the guide's job, kill a worker, and give the seconds until the next step."""
    deadline = time.monotonic() + WORKERS_BACK_S
    pids: dict[str, int] = {}
    # A connection to the worker that was killed last may still be taken for alive.
    while len(pids) < RANKS:
        if time.monotonic() > deadline:
            raise click.ClickException(f"{len(pids)} of {RANKS} workers came back")
        time.sleep(1)
        answers = client.run(os.getpid, on_error="return")
        pids = {address: pid for address, pid in answers.items() if isinstance(pid, int)}
    killer = Killer(pids[sorted(pids)[rank]], rank)
    train_parallel(Job(epochs=KILL_EPOCHS), digits, client, [killer])
    return killer.recovered_s


def checkpoint_costs(client: Client, digits: Digits, rounds: int) -> dict[str, Any]:
    """Compare epochs that follow a checkpoint with those that do not, in turns in one run."""
    job = Job(epochs=EPOCHS)
    steps = -(-len(digits.train_labels) // job.batch_size)
    epochs: dict[str, list[float]] = {"plain": [], "saved": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="dask-nn-bench-") as folder:
            saved = Checkpoint(folder, every=2 * steps)
            result = train_parallel(job, digits, client, checkpoint=saved)
        # A checkpoint is taken after the second epoch, the fourth, ...; the first two warm up.
        seconds = [record["seconds"] for record in result.history]
        epochs["plain"] += seconds[3::2]
        epochs["saved"] += seconds[4::2]
    plain_s, saved_s = (statistics.median(found) for found in epochs.values())
    return {"plain_s": plain_s, "saved_s": saved_s, "ratio": saved_s / plain_s, "epochs": epochs}


def make_table(found: dict[str, Any]) -> Table:
    """Show the medians."""
    recovery = sorted(found["recovery_s"])
    table = Table("figure", "value")
    table.add_row("next step after kill -9, median", f"{statistics.median(recovery):.2f} s")
    table.add_row("next step after kill -9, slowest", f"{recovery[-1]:.2f} s")
    table.add_row("epoch after a checkpoint / without", f"{found['checkpoints']['ratio']:.3f}")
    return table


if __name__ == "__main__":
    main()
