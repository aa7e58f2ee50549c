"""Measure dask-nn against sequential PyTorch and torchrun, in one run and in turns."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from benchmarks.exchange import Latency, measure_latencies
from benchmarks.load import OtherLoad
from benchmarks.picture import draw
from benchmarks.report import Comparison, Report, describe_machine, layout, make_tables, seconds
from benchmarks.systems import System, best, dask_nn, guide, measure_rounds, torchrun
from benchmarks.tasks import Measurement, Task, save_digits
from dask_nn.clusters.local import available_cores
from dask_nn.errors import DataError
from dask_nn.examples.mnist.data import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.networks import Network
    from dask_nn.examples.mnist.data import Dataset

RANKS = 2
# The system itself always does a little; what is above this spoils a measurement.
QUIET_CORES = 0.15
# Of the tables where the output is no terminal.
WIDTH = 110
# Images of an epoch, to train and to test on, and epochs of a round, of which the first warms up.
SIZES = {
    "full": {"guide": (60_000, 10_000, 6), "cnn": (12_800, 1_000, 4)},
    "quick": {"guide": (12_800, 1_000, 4), "cnn": (2_560, 500, 3)},
}


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="One round on fewer images: does everything work?")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of all systems. Default: 3.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-report"),
    show_default=True,
    help="Folder for bench.json and bench.png.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the MNIST files.")
def main(*, quick: bool, rounds: int | None, out: Path, data_dir: Path | None) -> None:
    """Measure, print and write."""
    if available_cores() < RANKS:
        raise click.ClickException(
            f"{RANKS} ranks need as many cores, this process may use {available_cores()}"
        )
    out.mkdir(parents=True, exist_ok=True)
    started, others = time.monotonic(), OtherLoad()
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(highlight=False, soft_wrap=True, width=width)
    machine = describe_machine()
    try:
        dataset = load(data_dir)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    if dataset.note:
        console.print(f"Note: {dataset.note}")
    with tempfile.TemporaryDirectory(prefix="dask-nn-bench-") as folder:
        run = partial(
            _compare,
            dataset=dataset,
            folder=Path(folder),
            size="quick" if quick else "full",
            rounds=rounds or (1 if quick else 3),
            console=console,
        )
        mnist = run("guide", _guide_systems(), name=f"{dataset.name}, the guide's network")
        cnn = run("cnn", _cnn_systems(), name=f"{dataset.name}, a small CNN")
    latencies = measure_latencies(quick=quick, on_latency=partial(_show_latency, console))
    report = Report(
        dataset=dataset.name,
        machine={**machine, "others_cores": others.cores()},
        mnist=mnist,
        cnn=cnn,
        latencies=latencies,
        duration_s=time.monotonic() - started,
    )
    console.print()
    console.print(make_tables(report))
    if (cores := report.machine["others_cores"]) > QUIET_CORES:
        console.print(f"Not quiet: others used {cores:.1f} cores on average, so do not trust this.")
    (out / "bench.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    draw(report, out / "bench.png")
    console.print(f"Wrote {out / 'bench.json'}, {out / 'bench.png'} in {report.duration_s:.0f} s")


def _guide_systems() -> list[System]:
    return [
        System(key="guide", label="sequential, the guide's loop", run=guide),
        System(key="best", label="sequential, best loop", run=best),
        System(key="ddp", label="torchrun DDP, gloo", run=partial(torchrun, ranks=RANKS)),
        System(key="dask_nn", label="dask-nn spmd", run=partial(dask_nn, ranks=RANKS)),
    ]


def _cnn_systems() -> list[System]:
    both = partial(dask_nn, shards=RANKS)
    every = (available_cores(),)
    return [
        System(key="best_1", label="sequential, best loop", run=partial(best, threads=(1,))),
        System(key="best_all", label="sequential, best loop", run=partial(best, threads=every)),
        System(
            key="dask_nn_1_1",
            label="dask-nn spmd, 1 shard",
            run=partial(dask_nn, ranks=1, shards=1),
        ),
        System(key="dask_nn_1", label="dask-nn spmd, 2 shards", run=partial(both, ranks=1)),
        System(key="dask_nn", label="dask-nn spmd, 2 shards", run=partial(both, ranks=RANKS)),
    ]


def _compare(
    network: Network,
    systems: Sequence[System],
    *,
    name: str,
    dataset: Dataset,
    folder: Path,
    size: str,
    rounds: int,
    console: Console,
) -> Comparison:
    num_train, num_test, epochs = SIZES[size][network]
    save_digits(folder / network, dataset.digits, num_train, num_test)
    task = Task(network=network, folder=folder / network, epochs=epochs)
    title = f"{name}: {num_train:,} images, batches of {task.batch_size}"
    console.print(f"{title}; {rounds} round(s) of {epochs} epochs, of which the first warms up")

    def on_round(number: int, system: System, found: Measurement, others: float) -> None:
        spoiled = f"  (others used {others:.1f} cores)" if others > QUIET_CORES else ""
        took = f"{system.label}, {layout(found)}: {found.median_s:.3f} s/epoch"
        console.print(f"round {number + 1}/{rounds}  {took}{spoiled}")

    return Comparison(
        title=title,
        task=task,
        num_images=num_train,
        systems=systems,
        measured=measure_rounds(systems, task, rounds, on_round),
        own="dask_nn",
    )


def _show_latency(console: Console, found: Latency) -> None:
    size = f"{found.size_bytes / 1e6:g} MB"
    console.print(f"all-reduce of {size}, {found.communicator}: {seconds(found.median_s)}")


if __name__ == "__main__":
    main()
