from __future__ import annotations

import pickle
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from torch import nn

from dask_nn.data.blocks import as_array
from dask_nn.data.cuts import one_chunk_per_row_block
from dask_nn.data.row_blocks import aligned, per_block, shipped
from dask_nn.errors import DataError

MODEL = pickle.dumps(nn.Dropout())


def total(block: Any, other: Any, objects: list[Any]) -> Any:
    assert other is None
    return block.sum(axis=(1, 2))[:, None] + np.array(objects[1])


def test_tasks_share_a_model_that_no_thread_has_to_switch_to_evaluation() -> None:
    model, three = shipped(MODEL, pickle.dumps(3)).compute(scheduler="sync")
    assert isinstance(model, nn.Dropout)
    assert not model.training
    assert three == 3


def test_equal_objects_are_one_node() -> None:
    assert shipped(MODEL).key == shipped(MODEL).key
    assert shipped(MODEL).key != shipped(MODEL, b"more").key


def test_a_function_sees_whole_rows_and_the_objects() -> None:
    X = np.arange(24.0).reshape(4, 3, 2)
    lazy = one_chunk_per_row_block("X", da.from_array(X, chunks=(3, 2, 1)))
    found = per_block(
        total,
        lazy,
        None,
        objects=shipped(MODEL, pickle.dumps([1.0, 2.0])),
        row_shape=(2,),
        meta=np.empty((0, 2)),
        name="total",
    )
    assert found.chunks == ((3, 1), (2,))
    expected = X.sum(axis=(1, 2))[:, None] + [1.0, 2.0]
    np.testing.assert_array_equal(found.compute(scheduler="sync"), expected)


def test_unknown_lengths_of_other_axes_are_refused() -> None:
    X = da.ones((4, 6), chunks=2)
    with pytest.raises(DataError, match="axis 1 of X is unknown"):
        one_chunk_per_row_block("X", X[:, X[0] > 0])


@pytest.mark.parametrize("names", [("X", "y"), ("y", "X")], ids=["first", "last"])
def test_unknown_lengths_of_other_axes_are_refused_before_anything_is_computed(names) -> None:
    seen: list[int] = []
    X = da.ones((4, 6), chunks=(2, 6))
    y = da.zeros(3, chunks=1).map_blocks(lambda b: seen.append(1) or b, meta=np.empty(0))
    arrays = {"X": X[X[:, 0] > 0][:, X[0] > 0], "y": y[da.zeros(3, chunks=1) < 1]}
    with dask.config.set(scheduler="sync"), pytest.raises(DataError, match="axis 1 of X is unkn"):
        aligned({name: arrays[name] for name in names})
    assert not seen
    arrays["y"].compute(scheduler="sync")
    assert len(seen) == 3


def test_ragged_lists_are_refused() -> None:
    with pytest.raises(DataError, match="y cannot be read"):
        as_array("y", [[1], [1, 2]])


def test_unknown_widths_are_found_where_the_rows_are_known() -> None:
    X = da.ones((4, 6), chunks=(2, 3))
    X = X[:, da.arange(6, chunks=3) > 1]
    y = da.arange(4, chunks=4)
    found, labels = aligned({"X": X, "y": y})
    assert found.chunks == ((2, 2), (4,))
    assert labels.chunks == ((2, 2),)


@pytest.mark.parametrize("dtype", ["longdouble", "complex128"])
def test_numbers_that_no_batch_holds_are_refused(dtype) -> None:
    with pytest.raises(DataError, match="at most 64 bits"):
        as_array("weight", np.ones(4, dtype))
