"""``dask-nn predict``: read images with saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dask_nn.cli.interrupts import ending_at_once

if TYPE_CHECKING:
    import numpy as np

__all__ = ["predict"]


@click.command
@click.option(
    "--weights", type=click.Path(path_type=Path), required=True, help="File that mnist saved."
)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="NumPy file of uint8 images, (n, 784), (n, 28, 28) or (n, 1, 28, 28).",
)
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="NumPy file to write: int64 labels (n,), or float32 probabilities (n, 10).",
)
@click.option("--proba", is_flag=True, help="Write probabilities instead of labels.")
def predict(*, weights: Path, source: Path, target: Path, proba: bool) -> None:
    """Read the digits of images with saved weights."""
    with ending_at_once():
        from dask_nn.api import predict as predict_rows
        from dask_nn.checkpoints.serialization import load_weights
        from dask_nn.errors import DataError
        from dask_nn.examples.mnist.model import model_from_weights, scale

    if not target.absolute().parent.is_dir():
        raise DataError(f"{target}: its folder does not exist, expected one to write to")
    model = model_from_weights(load_weights(weights)[0])
    images = _read(source)
    read = predict_rows(model, images, output="proba" if proba else "label", transform=scale)
    _write(target, read)
    click.echo(f"read {len(images):,} images, wrote {target}")


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
    if images.dtype != np.uint8 or images.shape[1:] not in {(784,), (28, 28), (1, 28, 28)}:
        raise DataError(
            f"{path}: expected uint8 images of shape (n, 784), (n, 28, 28) or (n, 1, 28, 28), "
            f"got {images.dtype} of shape {images.shape}"
        )
    if not len(images):
        raise DataError(f"{path}: expected at least one image, got shape {images.shape}")
    return np.ascontiguousarray(images).reshape(len(images), 784)


def _write(path: Path, values: np.ndarray) -> None:
    import numpy as np

    from dask_nn.checkpoints.whole_file import whole_file
    from dask_nn.errors import DataError

    try:
        with whole_file(path) as file:
            np.save(file, values, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
