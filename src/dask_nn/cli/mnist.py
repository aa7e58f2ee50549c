"""``dask-nn mnist``: train on MNIST with Dask and compare with sequential training."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dask_nn.cli.cluster_options import (
    ClusterChoice,
    choose_cluster,
    cluster_options,
    default_device,
)
from dask_nn.cli.interrupts import ending_at_once

if TYPE_CHECKING:
    from typing import Any, Literal

    import torch
    from distributed import Client
    from rich.console import Console

    from dask_nn.examples.mnist.compare import Comparison, Job, Sequential
    from dask_nn.examples.mnist.data import Dataset
    from dask_nn.examples.mnist.sequential import Digits
    from dask_nn.training.result import TrainingResult

__all__ = ["mnist"]

# What ranks need; an optimizer imports torch._dynamo when the first one is made.
_PRELOAD = (
    "torch._dynamo",
    "dask_nn.training.rank_main",
    "dask_nn.controller.worker_side",
    "dask_nn.data.peek",
    "dask_nn.metrics.states",
)
_POSITIVE = click.IntRange(min=1)
# Wider, and the weights alone take gigabytes.
_WIDTH = click.IntRange(min=1, max=1_000_000)
# What torch takes for a seed.
_SEED = click.IntRange(min=0, max=2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where to take the data from, where to train, and where to write."""

    data_dir: Path | None
    cluster: ClusterChoice
    report: Path
    json: Path | None
    checkpoint: str | None
    resume: bool

    @property
    def weights(self) -> Path:
        return self.report / "weights.safetensors"


@click.command
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the four IDX files of MNIST, plain or .gz. Default: $DASK_NN_DATA, else the "
    "cache, else a download, else the digits of scikit-learn.",
)
@click.option(
    "--epochs", type=_POSITIVE, default=5, show_default=True, help="Passes over the data."
)
@click.option(
    "--batch-size", type=_POSITIVE, default=128, show_default=True, help="Images of a step."
)
@click.option("--lr", type=float, default=0.01, show_default=True, help="Learning rate of SGD.")
@click.option(
    "--hidden", type=_WIDTH, default=128, show_default=True, help="Width of the hidden layer."
)
@click.option("--shards", type=_POSITIVE, help="Logical replicas. Default: one per worker.")
@click.option(
    "--engine",
    type=click.Choice(["spmd", "graph"]),
    default="spmd",
    show_default=True,
    help="A gang of ranks, or a graph of Dask tasks.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where dask-nn computes. Default: cuda with --gpus, else cpu.",
)
@click.option(
    "--seed",
    type=_SEED,
    default=0,
    show_default=True,
    help="Sets the first weights and the order of the images.",
)
@click.option("--no-sequential", is_flag=True, help="Train with dask-nn alone.")
@click.option(
    "--checkpoint",
    metavar="DIR",
    help="Folder or URL in which the run is saved after every epoch.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint there.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("report"),
    show_default=True,
    help="Folder for the weights and the pictures.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for all numbers of the comparison.",
)
@cluster_options
@click.option("--threads-per-worker", type=_POSITIVE, help="The same as --cores.")
def mnist(
    *,
    data_dir: Path | None,
    epochs: int,
    batch_size: int,
    lr: float,
    hidden: int,
    shards: int | None,
    engine: Literal["spmd", "graph"],
    device: Literal["cpu", "cuda"] | None,
    seed: int,
    no_sequential: bool,
    checkpoint: str | None,
    resume: bool,
    report: Path,
    json_path: Path | None,
    **cluster: Any,
) -> None:
    """Train on MNIST with Dask, and compare with sequential training."""
    if resume and checkpoint is None:
        raise click.UsageError("--resume needs --checkpoint, the folder to go on from")
    places = _Places(
        checkpoint=checkpoint,
        resume=resume,
        data_dir=data_dir,
        cluster=choose_cluster(**cluster) or ClusterChoice(),
        report=report,
        json=json_path,
    )
    with ending_at_once():
        from rich.console import Console

        from dask_nn.examples.mnist.compare import Job

    job = Job(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        hidden_size=hidden,
        shards=shards,
        engine=engine,
        device=device or default_device(cluster["gpus"]),
        seed=seed,
    )
    console = Console(highlight=False, soft_wrap=True)
    comparison = _run(job, places, console, with_sequential=not no_sequential)
    _show(comparison, places, console)


def _make_folders(places: _Places) -> None:
    from dask_nn.errors import ConfigurationError

    try:
        places.report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--report {places.report}: expected a folder to write to: {error.strerror or error}"
        ) from error
    folders = {"--report": places.report}
    if places.json is not None:
        folders["--json"] = places.json.absolute().parent
    for option, folder in folders.items():
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ConfigurationError(f"{option}: {folder} is no folder that can be written to")


def _run(job: Job, places: _Places, console: Console, *, with_sequential: bool) -> Comparison:
    import dask_nn.metrics.states  # noqa: F401 - torchmetrics takes its time, which is not train's
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.controller.resume import open_checkpoints
    from dask_nn.errors import ConfigurationError, NonFiniteLoss
    from dask_nn.examples.mnist.compare import Comparison, check, evaluate_parallel
    from dask_nn.examples.mnist.data import load

    with ExitStack() as stack:
        client: Client | None = None
        places.cluster.check()
        if places.cluster.kind == "address":
            client = stack.enter_context(places.cluster.open(_PRELOAD))
        dataset = load(places.data_dir)
        if dataset.note:
            console.print(f"Note: {dataset.note}")
        check(job, len(dataset.digits.train_labels))
        _make_folders(places)
        # Found out before minutes of sequential training.
        checkpoint = Checkpoint.of(places.checkpoint)
        open_checkpoints(checkpoint, resume=places.resume, epochs=job.epochs)
        sequential: Sequential | None = None
        try:
            if with_sequential:
                sequential = _train_sequential(job, dataset, console)
            if client is None:
                client = stack.enter_context(places.cluster.open(_PRELOAD))
            console.print(f"\ndask-nn on {client.scheduler_info()['address']}")
            console.print(f"Dashboard: {client.dashboard_link}")
            result = _train_parallel(job, dataset.digits, client, console, places)
        except KeyboardInterrupt as interrupt:
            message = _save_unfinished(interrupt, sequential, places, job)
            raise KeyboardInterrupt(message) from interrupt
        except NonFiniteLoss as error:
            message = (
                f"the loss became {error.value} at step {error.step}, and training stopped before "
                f"that update; --lr is {job.lr:g}, a lower one often helps"
            )
            if error.result is not None:
                _save(error.result.model, places, job)
                message += f". The last good weights are in {places.weights}"
            raise ConfigurationError(message) from error
        _save(result.model, places, job)
        try:
            parallel = evaluate_parallel(result, dataset.digits, client)
        except KeyboardInterrupt as interrupt:
            message = f"Interrupted; the trained weights are in {places.weights}."
            raise KeyboardInterrupt(message) from interrupt
    return Comparison(dataset=dataset, sequential=sequential, parallel=parallel)


def _train_sequential(job: Job, dataset: Dataset, console: Console) -> Sequential:
    from dask_nn.examples.mnist.compare import run_sequential

    titles = {
        "guide": "Sequential PyTorch, as a beginner's guide writes it",
        "best": "Sequential PyTorch, the best plain loop",
    }
    samples = len(dataset.digits.train_labels)

    def on_epoch_end(name: str, epoch: int, loss: float, seconds: float) -> None:
        if epoch == 0:
            console.print(f"\n{titles[name]}")
        rate = samples / seconds
        console.print(f"epoch {epoch + 1}/{job.epochs}  loss {loss:.4f}  {rate:,.0f} samples/s")

    return run_sequential(job, dataset.digits, on_epoch_end)


def _train_parallel(
    job: Job, digits: Digits, client: Client, console: Console, places: _Places
) -> TrainingResult:
    from dask_nn.callbacks.progress import RichProgress
    from dask_nn.examples.mnist.compare import train_parallel

    with RichProgress(console) as progress:
        return train_parallel(
            job,
            digits,
            client,
            [progress],
            checkpoint=places.checkpoint,
            resume=places.resume,
        )


def _save_unfinished(
    interrupt: KeyboardInterrupt, sequential: Sequential | None, places: _Places, job: Job
) -> str:
    """Save what an interrupted run has trained, and say where it is."""
    result = getattr(interrupt, "result", None)
    if result is not None:
        _save(result.model, places, job)
        return f"Interrupted; what is trained so far is in {places.weights}."
    if sequential is not None:
        _save(sequential.model, places, job)
        return (
            "Interrupted before the first step of dask-nn; what the best plain loop trained is in "
            f"{places.weights}."
        )
    return "Interrupted; nothing was trained yet."


def _save(model: torch.nn.Module, places: _Places, job: Job) -> None:
    from dask_nn.checkpoints.serialization import save_weights

    metadata = {"model": "SimpleNN", "hidden_size": str(job.hidden_size), "seed": str(job.seed)}
    save_weights(places.weights, model.state_dict(), metadata)


def _show(comparison: Comparison, places: _Places, console: Console) -> None:
    from dask_nn.checkpoints.whole_file import whole_file
    from dask_nn.examples.mnist.report import (
        describe_speedup,
        draw_curves,
        draw_misread,
        make_table,
    )

    result = comparison.parallel.result
    console.print()
    console.print(make_table(comparison))
    if comparison.sequential is not None:
        console.print(describe_speedup(comparison))
    console.print(f"The first step began {result.start_s:.2f} s after the call of train.")
    draw_curves(comparison, places.report / "curves.png")
    draw_misread(comparison.dataset.digits, comparison.parallel, places.report / "misread.png")
    written = [places.weights, places.report / "curves.png", places.report / "misread.png"]
    if places.json is not None:
        with whole_file(places.json) as file:
            file.write(json.dumps(comparison.as_dict(), indent=2).encode() + b"\n")
        written.append(places.json)
    console.print(f"Wrote {', '.join(map(str, written))}")
