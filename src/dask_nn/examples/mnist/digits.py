"""Digits for machines without MNIST: those inside scikit-learn, varied to MNIST's numbers.

scikit-learn ships 1,797 handwritten digits of 8x8 pixels. Each is drawn on 28x28 pixels many
times, a little shifted, turned and scaled. Train and test come from different originals.
"""

from __future__ import annotations

import contextlib
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from dask_nn.checkpoints.whole_file import whole_file
from dask_nn.examples.mnist.sequential import Digits

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cached_digits", "make_digits", "split_originals"]

_SIDE = 28
# Digits of MNIST fill 20 of the 28 pixels.
_INNER = 20
_TEST_SHARE = 1 / 6
_BATCH = 2_000
_VERSION = 1


def cached_digits(folder: Path, *, train: int = 60_000, test: int = 10_000) -> Digits:
    """Return `make_digits` with seed 0, from a file in `folder` where that is possible.

    A file that cannot be read is made again; a folder that cannot be written is no error.
    """
    path = folder / f"digits-{_VERSION}-{train}-{test}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = Digits(**{name: arrays[name] for name in Digits.__dataclass_fields__})
        if len(found.train_images) == train and len(found.test_images) == test:
            return found
    made = make_digits(train=train, test=test)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as target:
            np.savez(target, **vars(made))
    return made


def make_digits(*, train: int = 60_000, test: int = 10_000, seed: int = 0) -> Digits:
    """Draw digits on 28x28 pixels from the originals in scikit-learn.

    Parameters
    ----------
    train, test : int
        How many images to draw for either.
    seed : int, default 0
        Sets which original is drawn how; equal seeds give equal images.

    Returns
    -------
    Digits
        Every original is drawn about equally often.
    """
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    large = _enlarge(originals.reshape(-1, 8, 8))
    made = []
    for part, (rows, count) in enumerate(
        zip(split_originals(len(labels), seed), (train, test), strict=True)
    ):
        random = np.random.default_rng(np.random.SeedSequence([seed, 1 + part]))
        picked = np.resize(rows, count)[np.argsort(random.random(count), kind="stable")]
        made += [_vary(large, picked, random), labels[picked].astype(np.int64)]
    return Digits(
        train_images=made[0], train_labels=made[1], test_images=made[2], test_labels=made[3]
    )


def split_originals(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divide the rows 0 to `count` - 1 at random into five sixths and one sixth.

    Returns
    -------
    tuple of numpy.ndarray
        Rows to train on and rows to test on, int64, without a common row.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    order = np.argsort(random.random(count), kind="stable")
    num_test = round(count * _TEST_SHARE)
    return order[num_test:], order[:num_test]


def _enlarge(originals: np.ndarray) -> np.ndarray:
    """Bring (n, 8, 8) of 0 to 16 to (n, 28, 28) of 0 to 255, the digit in the middle."""
    from scipy import ndimage

    factor = _INNER / originals.shape[1]
    inner = ndimage.zoom(
        originals, (1, factor, factor), order=3, grid_mode=True, mode="grid-constant"
    )
    margin = (_SIDE - _INNER) // 2
    padded = np.pad(inner, ((0, 0), (margin, margin), (margin, margin)))
    return np.clip(padded * (255 / 16), 0, 255).astype(np.float32)


def _vary(large: np.ndarray, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw large[rows], each shifted, turned and scaled a little, as uint8 (n, 784)."""
    from scipy import ndimage

    count = len(rows)
    angle = np.deg2rad(10 * (2 * random.random(count) - 1))
    zoom = np.exp(0.1 * (2 * random.random((2, count)) - 1))
    shift = 1.5 * (2 * random.random((2, count)) - 1)
    # Where each pixel of the result comes from, in the middle's coordinates.
    middle = (_SIDE - 1) / 2
    down, right = np.mgrid[:_SIDE, :_SIDE].reshape(2, -1) - middle
    images = np.empty((count, _SIDE * _SIDE), np.uint8)
    for start in range(0, count, _BATCH):
        batch = slice(start, start + _BATCH)
        cos, sin = np.cos(angle[batch])[:, None], np.sin(angle[batch])[:, None]
        source = np.empty((3, len(cos), down.size), np.float32)
        source[0] = rows[batch][:, None]
        source[1] = (cos * down - sin * right) / zoom[0, batch][:, None] + middle
        source[1] -= shift[0, batch][:, None]
        source[2] = (sin * down + cos * right) / zoom[1, batch][:, None] + middle
        source[2] -= shift[1, batch][:, None]
        drawn = ndimage.map_coordinates(large, source, order=1, prefilter=False)
        images[batch] = np.rint(drawn).astype(np.uint8)
    return images
