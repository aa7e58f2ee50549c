from __future__ import annotations

import dask.bag as db
import numpy as np
import pytest

from dask_nn.data.inputs.read import read_inputs
from dask_nn.errors import DataError

X = np.arange(60, dtype="f4").reshape(12, 5)
Y = np.arange(12) % 3


def bag(items, npartitions=3) -> db.Bag:
    return db.from_sequence(list(items), npartitions=npartitions)


def read(*inputs) -> dict[str, np.ndarray]:
    found = read_inputs(*inputs, needs_target=False)
    return {name: np.asarray(array) for name, array in found.items()}


def test_samples_may_have_several_targets():
    found = read(bag(zip(X, X[:, :3], strict=True)))
    np.testing.assert_array_equal(found["X"], X)
    np.testing.assert_array_equal(found["y"], X[:, :3])


def test_samples_may_be_images_and_have_weights():
    images = X.reshape(12, 5, 1)
    found = read(bag(zip(images, Y.tolist(), np.ones(12), strict=True)))
    assert [array.shape for array in found.values()] == [(12, 5, 1), (12,), (12,)]


def test_vectors_alone_are_samples_and_so_are_what_stands_beside_them():
    found = read(bag(X), bag(X[:, :2]))
    np.testing.assert_array_equal(found["X"], X)
    np.testing.assert_array_equal(found["y"], X[:, :2])
    np.testing.assert_array_equal(read(bag(X), bag(Y.tolist()))["y"], Y)


def test_blocks_are_laid_end_to_end():
    found = read(bag([X[:3], X[3:4], X[4:]]), bag([Y[:3], Y[3:4], Y[4:]]))
    np.testing.assert_array_equal(found["X"], X)
    np.testing.assert_array_equal(found["y"], Y)
    assert read(bag([(X[:3], X[:3, :2]), (X[3:], X[3:, :2])], 1))["y"].shape == (12, 2)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (4, 8), (8, 12)])
def test_empty_partitions_give_no_rows(first, last):
    rows = list(enumerate(zip(X, Y.tolist(), strict=True)))
    kept = bag(rows).filter(lambda row: first <= row[0] < last).map(lambda row: row[1])
    found = read(kept)
    np.testing.assert_array_equal(found["X"], X[first:last])
    np.testing.assert_array_equal(found["y"], Y[first:last])
    blocks = read_inputs(kept)["X"].blocks
    assert [np.asarray(block).shape[1:] for block in blocks] == [(5,)] * 3


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(X[row], X[row]) for row in range(12)], r"vectors of one length \(5\): they can be"),
        ([{"a": 1}] * 3, "must be arrays, or tuples of them, got dict"),
        (["text"] * 3, "got str"),
    ],
)
def test_what_cannot_be_told_is_refused(items, message):
    with pytest.raises(DataError, match=message):
        read(bag(items))


def test_a_bag_without_elements_is_refused():
    with pytest.raises(DataError, match="the Bag for X is empty"):
        read(bag(X).filter(lambda _: False))
