"""Streams are made of what their arrays say, or refused before the first window."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from dask.delayed import delayed

from dask_nn.data.batches import batch_dtypes, stored_dtype
from dask_nn.data.blocks import Field, align
from dask_nn.data.casts import joined_dtype
from dask_nn.data.streaming import stream_blocks
from dask_nn.errors import DataError


def noticed(seen: list[int], rows: int, chunks: int, *, known: bool) -> da.Array:
    """Make an array of one axis whose blocks tell when they are computed."""
    lazy = da.zeros(rows, chunks=chunks, dtype="i8")
    lazy = lazy.map_blocks(lambda block: seen.append(1) or block, meta=np.empty(0, "i8"))
    return lazy if known else lazy[da.ones(rows, chunks=chunks) > 0]


def of_unknown_width(*, known: bool) -> da.Array:
    X = da.ones((8, 3), chunks=(4, 3), dtype="f4")
    X = X[:, X[0] > 0]
    return X if known else X[da.ones(8, chunks=4) > 0]


@pytest.mark.parametrize("chunks", [4, 2], ids=["same blocks", "other blocks"])
@pytest.mark.parametrize("rows_of_y", [True, False], ids=["known y", "unknown y"])
@pytest.mark.parametrize("rows_of_x", [True, False], ids=["known X", "unknown X"])
def test_an_unknown_width_is_refused_before_anything_is_computed(rows_of_x, rows_of_y, chunks):
    seen: list[int] = []
    X = of_unknown_width(known=rows_of_x)
    y = noticed(seen, 8, chunks, known=rows_of_y)
    for inputs in ({"X": X, "y": y}, {"y": y, "X": X}):
        with (
            dask.config.set(scheduler="sync"),
            pytest.raises(DataError, match="the length of axis 1 of X is unknown"),
        ):
            align(inputs, client=None, block_size_bytes=100, memory="stream")
    assert not seen
    y.compute(scheduler="sync")
    assert len(seen) == 8 // chunks


def column(dtype: str, *blocks: Any, known: bool = True) -> da.Array:
    """Make an array of such blocks of four rows, whatever type they have."""
    rows = 4 if known else np.nan
    parts = [delayed(np.asarray(block), pure=False) for block in blocks]
    return da.concatenate([da.from_delayed(part, (rows,), dtype) for part in parts])


known_or_not = pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
LARGE = 2**53 + 1  # no float64


@pytest.fixture(params=["here", "cluster"])
def client(request) -> Any:
    return None if request.param == "here" else request.getfixturevalue("threads_client")


def kept(client: Any, *, known: bool, **fields: da.Array) -> list[np.ndarray[Any, Any]]:
    """Make a stream, and give what every rank gets whole of it."""
    blocks = fields["y"].numblocks[0]
    X = column("f4", *[np.zeros(4, "f4")] * blocks, known=known)
    stream, _ = stream_blocks({"X": X} | fields, client=client, block_limit_bytes=None)
    assert set(stream.kept) == set(range(1, 1 + len(fields)))
    return [stream.kept[place] for place in sorted(stream.kept)]


@known_or_not
@pytest.mark.parametrize(
    ("dtype", "blocks", "number", "said"),
    [
        ("i8", ([0, 1, 0, 1], ["1", "0", "1", "0"]), 1, "<U1, expected int64 .* value '1'"),
        ("f4", ([0.5] * 4, ["a"] * 4, [1.0] * 4), 1, "<U1, expected float32 .* value 'a'"),
        ("f4", ([0.5] * 4, [1.0] * 4, [1, "7", 2, 3]), 2, "<U21, expected float32 .* value '1'"),
        ("i8", ([LARGE] * 4, [0, 1, 0.5, 1]), 1, "float64, expected int64 .* value 0.5"),
        ("f8", ([0.5] * 4, np.array([3] * 4, "m8[s]")), 1, r"timedelta64\[s\], expected float64"),
    ],
)
def test_a_block_of_a_small_target_that_is_of_another_type_is_named(
    client, known, dtype, blocks, number, said
):
    fields = {"y": column(dtype, *blocks, known=known)}
    with pytest.raises(DataError, match=rf"^block {number} of y has type {said}"):
        kept(client, known=known, **fields)
    fine = column("f4", *[np.ones(4, "f4")] * len(blocks), known=known)
    with pytest.raises(DataError, match=rf"^block {number} of y\.b has type {said}"):
        kept(client, known=known, y=fine, **{"y.b": fields["y"]})


@known_or_not
@pytest.mark.parametrize(
    ("dtype", "other"), [("i8", [0.0, 1.0, 0.0, 1.0]), ("u8", np.array([0, 1, 0, 1], "i8"))]
)
def test_large_integers_beside_other_numbers_are_not_rounded(client, known, dtype, other):
    y = column(dtype, np.array([LARGE] * 4, dtype), other, known=known)
    (found,) = kept(client, known=known, y=y)
    assert found.dtype == np.int64
    assert found.tolist() == [LARGE] * 4 + [0, 1, 0, 1]


@known_or_not
def test_small_columns_take_what_a_batch_takes(client, known):
    """As resident blocks do: labels of any integer type, weights that are no integers."""
    y = column("u1", np.array([1, 2, 3, 4], "u1"), [300, 1, 2, 3], known=known)
    weight = column("i8", [1, 2, 3, 4], [0.5, 1.0, 1.5, 2.0], known=known)
    real = column("f4", np.ones(4, "f4"), np.array([0.1] * 4), known=known)
    found = kept(client, known=known, y=y, **{"y.b": real}, sample_weight=weight)
    assert [one[4].item() for one in found] == [300, 0.1, 0.5]


@pytest.mark.parametrize("name", ["X", "X.a", "y", "y.a", "sample_weight"])
@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "i8", "u8", "f2", "f4", "f8"])
def test_blocks_are_joined_in_a_type_that_holds_what_a_batch_holds(name, dtype):
    field = Field(name=name, shape=(), dtype=np.dtype(dtype))
    (expected,) = batch_dtypes([field], torch.float64)
    found = joined_dtype(name, field.dtype)
    if expected.is_floating_point:
        assert found == np.float64
    else:
        assert found == stored_dtype(expected)


@known_or_not
@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_small_columns_of_objects_become_numbers(client, known, name):
    values = column("f4", [1.0, 2.0, 3.0, 4.0], np.array([1, 2.5, True, 0], object), known=known)
    y = column("i8", *[[0, 1, 0, 1]] * 2, known=known)
    *_, found = kept(client, known=known, **({"y": y} | {name: values}))
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0, 1.0, 2.5, 1.0, 0.0]
    whole = column("f4", *[np.array([1, 2.5, True, 0], object)] * 2, known=known)
    *_, found = kept(client, known=known, **({"y": y} | {name: whole}))
    assert found.dtype == np.float64


def test_small_columns_of_other_rows_are_refused_by_block(client):
    parts = [np.zeros(4), np.zeros((4, 2))]
    y = da.concatenate([da.from_delayed(delayed(part), (4,), "f8") for part in parts])
    with pytest.raises(DataError, match=r"block 1 of y has shape \(4, 2\), expected rows of shape"):
        kept(client, known=True, y=y)


@known_or_not
def test_blocks_of_one_type_keep_it_and_their_values(client, known):
    """Resident blocks do, too: a model of float64 sees the same bits."""
    values = np.array([0.1, 0.2, 0.3, 0.4])
    (found,) = kept(client, known=known, y=column("f4", values, values, known=known))
    np.testing.assert_array_equal(found, np.tile(values, 2))
