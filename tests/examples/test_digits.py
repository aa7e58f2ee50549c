from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dask_nn.examples.mnist import digits as module
from dask_nn.examples.mnist.digits import cached_digits, make_digits, split_originals


def test_they_look_like_mnist() -> None:
    made = make_digits(train=500, test=200)
    assert made.train_images.shape == (500, 784)
    assert made.test_images.shape == (200, 784)
    assert made.train_images.dtype == made.test_images.dtype == np.uint8
    assert made.train_labels.dtype == made.test_labels.dtype == np.int64
    assert set(made.train_labels) == set(made.test_labels) == set(range(10))
    images = made.train_images.reshape(-1, 28, 28)
    assert images.max() > 200
    # The digit is in the middle, on black.
    assert images[:, 8:20, 8:20].mean() > 4 * images[:, :4].mean()


def test_equal_seeds_give_equal_images_and_others_do_not() -> None:
    first, second = make_digits(train=50, test=20), make_digits(train=50, test=20)
    other = make_digits(train=50, test=20, seed=1)
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert not np.array_equal(first.train_images, other.train_images)


@pytest.mark.parametrize("count", [1797, 12, 6])
def test_train_and_test_have_no_original_in_common(count: int) -> None:
    train, test = split_originals(count)
    assert sorted([*train, *test]) == list(range(count))
    assert len(test) == round(count / 6)


def test_every_original_is_drawn_about_equally_often() -> None:
    train, test = split_originals(1797)
    assert max(len(train), len(test)) < 1_500
    made = make_digits(train=3_000, test=600)
    # 1,498 originals of ten digits, each drawn two or three times.
    counts = np.bincount(made.train_labels)
    assert counts.min() > 250
    assert counts.max() < 350


def test_they_are_made_once_and_read_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cached_digits(tmp_path / "cache", train=30, test=10)
    monkeypatch.setattr(module, "make_digits", None)
    read = cached_digits(tmp_path / "cache", train=30, test=10)
    for name in vars(made):
        np.testing.assert_array_equal(getattr(made, name), getattr(read, name))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_a_damaged_file_in_the_cache_is_made_again(tmp_path: Path, content: bytes) -> None:
    cached_digits(tmp_path, train=30, test=10)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    cached_digits(tmp_path, train=30, test=10)
    assert path.read_bytes()[:100] == whole[:100]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert len(cached_digits(tmp_path / "file", train=30, test=10).train_labels) == 30
