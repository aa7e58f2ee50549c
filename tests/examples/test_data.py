from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dask_nn.errors import DataError
from dask_nn.examples.mnist import data as module
from dask_nn.examples.mnist import digits as digits_module
from dask_nn.examples.mnist.data import load
from dask_nn.examples.mnist.digits import make_digits
from dask_nn.examples.mnist.idx import write_idx

if TYPE_CHECKING:
    from dask_nn.examples.mnist.sequential import Digits

MNIST = os.environ.get("DASK_NN_DATA")
DIGITS = make_digits(train=40, test=10)


def write(folder: Path, digits: Digits = DIGITS, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = getattr(digits, f"{part}_images").reshape(-1, 28, 28)
        labels = getattr(digits, f"{part}_labels").astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests away from the network and from the user's cache and data."""
    monkeypatch.delenv("DASK_NN_DATA", raising=False)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(module, "_fetch", lambda name, folder: (folder / name).exists())
    monkeypatch.setattr(digits_module, "make_digits", lambda **_: DIGITS)
    return tmp_path / "cache"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_named_folder_is_read(tmp_path: Path, suffix: str) -> None:
    dataset = load(write(tmp_path / "data", suffix=suffix))
    assert dataset.name == "mnist"
    assert "not the published MNIST" in dataset.note
    for name in vars(DIGITS):
        np.testing.assert_array_equal(getattr(dataset.digits, name), getattr(DIGITS, name))


def test_the_environment_names_a_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_NN_DATA", str(write(tmp_path / "data")))
    assert load().name == "mnist"


def test_the_argument_beats_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_NN_DATA", str(tmp_path / "absent"))
    assert load(write(tmp_path / "data")).name == "mnist"


def test_a_named_folder_without_the_files_is_an_error_and_no_reason_to_use_others(
    tmp_path: Path, cache: Path
) -> None:
    write(cache / "mnist", suffix=".gz")
    with pytest.raises(DataError, match=r"--data-dir\): missing train-images-idx3-ubyte"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"absent.*no such folder"):
        load(tmp_path / "absent")


def test_an_error_tells_that_the_environment_named_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_NN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"from \$DASK_NN_DATA"):
        load()


def test_all_missing_files_are_named_and_no_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", suffix=".gz")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "train-labels-idx1-ubyte, t10k-images-idx3-ubyte;" in str(caught.value)


def test_images_and_labels_that_differ_in_number_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(9, np.uint8))
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "t10k-labels-idx1-ubyte: expected a label for each of the 10 images" in str(caught.value)
    assert "got 9 labels" in str(caught.value)


def test_the_cache_is_used_where_no_folder_is_named(cache: Path) -> None:
    write(cache / "mnist", suffix=".gz")
    assert load().name == "mnist"


def test_without_all_others_the_digits_of_scikit_learn_are_used_and_said_to_be() -> None:
    dataset = load()
    assert dataset.name == "digits"
    assert "scikit-learn" in dataset.note
    assert "\n" not in dataset.note


def test_a_network_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(module, "_fetch", lambda *_: ended.wait(20))
    monkeypatch.setattr(module, "_FIRST_ANSWER_S", 0.05)
    start = time.monotonic()
    try:
        assert load().name == "digits"
        assert time.monotonic() - start < 10
    finally:
        ended.set()


def test_a_download_that_fails_halfway_is_no_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fetch", lambda name, _: name.startswith("t10k"))
    assert load().name == "digits"


@pytest.mark.skipif(not MNIST, reason="$DASK_NN_DATA names no MNIST")
def test_mnist_is_known_as_published() -> None:
    dataset = load(MNIST)
    assert dataset.note == ""
    assert dataset.digits.train_images.shape == (60_000, 784)
    assert dataset.digits.test_labels.shape == (10_000,)
