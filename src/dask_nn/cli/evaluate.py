"""``dask-nn evaluate``: test saved weights."""

from __future__ import annotations

from pathlib import Path

import click

from dask_nn.cli.interrupts import ending_at_once

__all__ = ["evaluate"]


@click.command
@click.option(
    "--weights", type=click.Path(path_type=Path), required=True, help="File that mnist saved."
)
@click.option(
    "--data",
    type=click.Choice(["mnist"]),
    default="mnist",
    show_default=True,
    # There is one choice as yet.
    expose_value=False,
    help="Test images.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the four IDX files of MNIST, plain or .gz.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Evaluate on the cluster of this scheduler.")
def evaluate(*, weights: Path, data_dir: Path | None, scheduler: str | None) -> None:
    """Test saved weights on the test images and print loss and accuracy."""
    from contextlib import closing, nullcontext

    with ending_at_once():
        from dask_nn.checkpoints.serialization import load_weights
        from dask_nn.clusters.connect import connect
        from dask_nn.examples.mnist.compare import score
        from dask_nn.examples.mnist.data import load
        from dask_nn.examples.mnist.model import model_from_weights

    model = model_from_weights(load_weights(weights)[0])
    dataset = load(data_dir)
    if dataset.note:
        click.echo(f"Note: {dataset.note}", err=True)
    client = closing(connect(scheduler, timeout_s=5)) if scheduler else nullcontext()
    with client as connected:
        scores = score(model, dataset.digits, connected)
    click.echo(f"dataset   {dataset.name}, {len(dataset.digits.test_labels):,} test images")
    for name, value in scores.items():
        click.echo(f"{name:<9} {value:.4f}")
