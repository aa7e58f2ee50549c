"""``dask-nn evaluate``: test saved weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_nn.cli.cluster_options import choose_cluster, cluster_options
from dask_nn.cli.interrupts import ending_at_once
from dask_nn.cli.job_file import read_job
from dask_nn.cli.trained import cluster_of_job

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distributed import Client

    from dask_nn.cli.cluster_options import ClusterChoice
    from dask_nn.cli.job_file import JobFile

__all__ = ["evaluate"]

PRELOAD = ("dask_nn.evaluation", "dask_nn.metrics.states")


@click.command
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    required=True,
    help="File that mnist or train saved.",
)
@click.option(
    "--data",
    default="mnist",
    show_default=True,
    metavar="mnist|URL",
    help="Test data: zarr:, parquet:, hdf5: or npy: and a path, or MNIST's own.",
)
@click.option(
    "--job",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The job file that says what the model is, and which arrays or columns are x and y.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the four IDX files of MNIST, plain or .gz.",
)
@click.option(
    "--y", "target", metavar="NAME|URL", help="Targets of the data; the job's by default."
)
@cluster_options
def evaluate(
    *,
    weights: Path,
    data: str,
    job: Path | None,
    data_dir: Path | None,
    target: str | None,
    **cluster: Any,
) -> None:
    """Test saved weights and print loss and metrics."""
    if (data == "mnist") == (job is not None):
        raise click.UsageError("--data URL and --job belong together; MNIST needs neither")
    read = None if job is None else read_job(job)
    chosen = choose_cluster(**cluster) or cluster_of_job(read)
    with ending_at_once():
        import dask_nn.api  # noqa: F401 - torch takes its time

    if chosen is not None:
        chosen.check()
    if read is None:
        _evaluate_mnist(weights, data_dir, chosen)
    else:
        _evaluate_job(weights, data, target, read, chosen)


def _client(chosen: ClusterChoice | None) -> AbstractContextManager[Client | None]:
    return nullcontext() if chosen is None else chosen.open(PRELOAD)


def _evaluate_mnist(weights: Path, data_dir: Path | None, chosen: ClusterChoice | None) -> None:
    from dask_nn.checkpoints.serialization import load_weights
    from dask_nn.examples.mnist.compare import score
    from dask_nn.examples.mnist.data import load
    from dask_nn.examples.mnist.model import model_from_weights

    model = model_from_weights(load_weights(weights)[0])
    dataset = load(data_dir)
    if dataset.note:
        click.echo(f"Note: {dataset.note}", err=True)
    with _client(chosen) as client:
        scores = score(model, dataset.digits, client)
    click.echo(f"dataset   {dataset.name}, {len(dataset.digits.test_labels):,} test images")
    _print(scores)


def _evaluate_job(
    weights: Path, url: str, target: str | None, job: JobFile, chosen: ClusterChoice | None
) -> None:
    from dask_nn.api import evaluate as evaluate_rows
    from dask_nn.cli.job_data import open_test
    from dask_nn.cli.trained import load_model

    model = load_model(job, weights)
    X, y, weight = open_test(job, url, target)
    options = {
        "loss": job.make_loss(),
        "metrics": job.training.get("metrics", ()),
        "transform": job.transform(),
    }
    with _client(chosen) as client:
        scores = evaluate_rows(model, X, y, sample_weight=weight, client=client, **options)
    _print(scores)


def _print(scores: dict[str, float]) -> None:
    width = max(9, *map(len, scores))
    for name, value in scores.items():
        click.echo(f"{name:<{width}} {value:.4f}")
