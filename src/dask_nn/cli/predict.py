"""``dask-nn predict``: run saved weights on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_nn.cli.cluster_options import choose_cluster, cluster_options
from dask_nn.cli.interrupts import ending_at_once
from dask_nn.cli.job_file import read_job
from dask_nn.cli.trained import cluster_of_job

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from dask_nn.cli.job_file import JobFile

__all__ = ["predict"]

PRELOAD = ("dask_nn.inference",)


@click.command
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    required=True,
    help="File that mnist or train saved.",
)
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|URL",
    help="Data to read: zarr:, parquet:, hdf5: or npy: and a path, or a NumPy file. Without --job "
    "uint8 images, (n, 784), (n, 28, 28) or (n, 1, 28, 28).",
)
@click.option(
    "--output",
    "target",
    required=True,
    metavar="FILE|URL",
    help="Where to write: zarr: or parquet: and a path, block by block, or a NumPy file. Labels "
    "are int64 (n,), probabilities float32 (n, classes).",
)
@click.option("--proba", is_flag=True, help="Write probabilities instead of labels.")
@click.option("--raw", is_flag=True, help="Write the model's outputs as they are.")
@click.option(
    "--job",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The job file that says what the model is, and which arrays or columns are x.",
)
@cluster_options
def predict(
    *,
    weights: Path,
    source: str,
    target: str,
    proba: bool,
    raw: bool,
    job: Path | None,
    **cluster: Any,
) -> None:
    """Run saved weights on data; without --job, read the digits of images."""
    from contextlib import nullcontext

    if proba and raw:
        raise click.UsageError("--proba and --raw write different things: give either")
    with ending_at_once():
        from dask_nn.api import predict as predict_rows
        from dask_nn.cli.data import check_target, discard, rows_of_known_length, write

    read_of = None if job is None else read_job(job)
    chosen = choose_cluster(**cluster) or cluster_of_job(read_of)
    kind, place = check_target(target)
    output: Any = "proba" if proba else "raw" if raw else "label"
    if chosen is not None:
        chosen.check()
    model, data, transform = (
        _of_job(read_of, weights, source) if read_of else _of_mnist(weights, source)
    )
    try:
        with chosen.open(PRELOAD) if chosen else nullcontext():
            if kind == "zarr":
                data = rows_of_known_length(data)
            found = predict_rows(model, data, output=output, transform=transform)
            write(found, kind, place)
    except KeyboardInterrupt:
        if kind != "npy":
            discard(place)  # workers that were still at it are gone now
        raise
    rows = "" if _unknown(data) else f"{len(data):,} "
    what = "rows" if job else "images"
    click.echo(f"read {rows}{what}, wrote {place}")


def _of_job(job: JobFile, weights: Path, source: str) -> tuple[nn.Module, Any, Any]:
    from dask_nn.cli.job_data import open_features
    from dask_nn.cli.trained import load_model

    model = load_model(job, weights)
    return model, open_features(job, _as_url(source)), job.transform()


def _of_mnist(weights: Path, source: str) -> tuple[nn.Module, Any, Any]:
    from dask_nn.checkpoints.serialization import load_weights
    from dask_nn.examples.mnist.model import model_from_weights, scale

    model = model_from_weights(load_weights(weights)[0])
    return model, _images(source), scale


def _as_url(source: str) -> str:
    from dask_nn.data.urls import FORMATS

    return source if source.split(":", 1)[0] in FORMATS else f"npy:{source}"


def _images(source: str) -> Any:
    import numpy as np

    from dask_nn.data.urls import FORMATS, open_data
    from dask_nn.errors import DataError

    is_url = source.split(":", 1)[0] in FORMATS
    images = open_data(source) if is_url else _read(Path(source))
    if not hasattr(images, "dtype") or hasattr(images, "columns"):
        raise DataError(f"{source}: expected one array of images; name it with #NAME")
    if images.dtype != np.uint8 or images.shape[1:] not in {(784,), (28, 28), (1, 28, 28)}:
        raise DataError(
            f"{source}: expected uint8 images of shape (n, 784), (n, 28, 28) or (n, 1, 28, 28), "
            f"got {images.dtype} of shape {images.shape}"
        )
    if not len(images):
        raise DataError(f"{source}: expected at least one image, got shape {images.shape}")
    rows = images.reshape(len(images), 784)
    return rows if is_url else np.ascontiguousarray(rows)


def _read(path: Path) -> np.ndarray:
    import numpy as np

    from dask_nn.errors import DataError

    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a NumPy file of images")
    try:
        with path.open("rb") as file:
            # np.load would also take archives and pickles, and advise to trust the latter.
            images = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a whole NumPy file (.npy) of images: {error}") from error
    return images


def _unknown(data: Any) -> bool:
    shape = getattr(data, "shape", None)
    return not (isinstance(shape, tuple) and shape and isinstance(shape[0], int))
