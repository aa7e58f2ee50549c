"""Where the digits come from: files, the cache, a download, or scikit-learn."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dask_nn.errors import DataError
from dask_nn.examples.mnist.digits import cached_digits
from dask_nn.examples.mnist.idx import read_images, read_labels
from dask_nn.examples.mnist.sequential import Digits

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

__all__ = ["Dataset", "cache_folder", "load", "load_folder"]

ENVIRONMENT = "DASK_NN_DATA"

# Compressed files as they are published, by MD5, and where they are kept.
_ARCHIVES = {
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
}
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of the pixels of the 60,000 and the 10,000 images, without header.
_PIXELS = {
    "train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
_FIRST_ANSWER_S = 4.0
_ANSWER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Digits and where they are from.

    Parameters
    ----------
    name : str
        ``"mnist"``, or ``"digits"`` for those of scikit-learn.
    note : str
        One line for the user; empty where there is nothing to say.
    digits : Digits
        Images and labels.
    """

    name: str
    note: str
    digits: Digits


def cache_folder() -> Path:
    """Return the folder in which downloaded and made digits are kept."""
    import pooch  # type: ignore[import-untyped]

    return Path(pooch.os_cache("dask-nn"))


def load(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Find the digits.

    Looks in `data_dir`, then in the folder that the environment variable ``DASK_NN_DATA`` names;
    either must hold the four IDX files of MNIST, plain or .gz. Without both: the cache, a download
    into the cache, and at last the digits of scikit-learn, varied to MNIST's numbers.

    Parameters
    ----------
    data_dir : path-like, optional
        A folder with the four files.

    Returns
    -------
    Dataset
        uint8 images (n, 784) and int64 labels (n,).

    Raises
    ------
    DataError
        If a named folder lacks a file, or a file is truncated or corrupt.
    """
    if data_dir is not None:
        return load_folder(Path(data_dir))
    if os.environ.get(ENVIRONMENT):
        return load_folder(Path(os.environ[ENVIRONMENT]), named_by=f"${ENVIRONMENT}")
    cache = cache_folder()
    if _download(cache / "mnist"):
        return load_folder(cache / "mnist", named_by="the cache")
    note = (
        "MNIST is neither here nor to be downloaded: using the handwritten digits of scikit-learn, "
        "drawn as 60,000 + 10,000 images (name a folder with --data-dir to use MNIST)"
    )
    return Dataset(name="digits", note=note, digits=cached_digits(cache))


def load_folder(folder: Path, named_by: str = "--data-dir") -> Dataset:
    """Read the four IDX files of a folder.

    Raises
    ------
    DataError
        If the folder or a file is missing, truncated or corrupt, or images and labels differ in
        number; names the file and what was expected.
    """
    paths = _find(folder, named_by)
    parts: dict[str, np.ndarray] = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = paths[f"{prefix}-images-idx3-ubyte"]
        labels = paths[f"{prefix}-labels-idx1-ubyte"]
        parts[f"{part}_images"] = read_images(images)
        parts[f"{part}_labels"] = read_labels(labels)
        counts = len(parts[f"{part}_images"]), len(parts[f"{part}_labels"])
        if counts[0] != counts[1]:
            message = f"{labels}: expected a label for each of the {counts[0]} images in {images}"
            message += f", got {counts[1]} labels"
            raise DataError(message)
    digits = Digits(**parts)
    note = "" if _is_published(digits) else f"the images in {folder} are not the published MNIST"
    return Dataset(name="mnist", note=note, digits=digits)


def _find(folder: Path, named_by: str) -> dict[str, Path]:
    if not folder.is_dir():
        message = f"{folder} (from {named_by}): no such folder, expected one with the MNIST files"
        raise DataError(message)
    found, missing = {}, []
    for archive in reversed(_ARCHIVES):
        plain = archive.removesuffix(".gz")
        for path in (folder / plain, folder / archive):
            if path.exists():
                found[plain] = path
                break
        else:
            missing.append(plain)
    if missing:
        message = (
            f"{folder} (from {named_by}): missing {', '.join(missing)}; expected these IDX files "
            "of MNIST there, plain or with .gz"
        )
        raise DataError(message)
    return found


def _is_published(digits: Digits) -> bool:
    hashes: Mapping[str, np.ndarray] = {"train": digits.train_images, "test": digits.test_images}
    return all(hashlib.sha256(hashes[part]).hexdigest() == _PIXELS[part] for part in _PIXELS)


def _download(folder: Path) -> bool:
    """Bring the published files into `folder` unless they are there; tell whether they are."""
    smallest, *others = _ARCHIVES
    # A machine without a network may hang in looking up names, which no timeout reaches; so the
    # first file is fetched aside, and given up after a few seconds.
    fetched: list[bool] = []
    thread = threading.Thread(
        target=lambda: fetched.append(_fetch(smallest, folder)), name="mnist-download", daemon=True
    )
    thread.start()
    thread.join(_FIRST_ANSWER_S)
    return any(fetched) and all(_fetch(name, folder) for name in others)


def _fetch(name: str, folder: Path) -> bool:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    downloader = pooch.HTTPDownloader(timeout=_ANSWER_S)
    for mirror in _MIRRORS:
        try:
            pooch.retrieve(
                url=mirror + name,
                known_hash=_ARCHIVES[name],
                fname=name,
                path=folder,
                downloader=downloader,
            )
        except (OSError, ValueError):
            # requests' errors are OSErrors; a wrong checksum is a ValueError. Try the next mirror.
            continue
        return True
    return False
