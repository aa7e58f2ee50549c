"""Blocks that are cut, and joined from others, give what uncut ones give."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from dask.delayed import delayed

from dask_nn.data import casts
from dask_nn.data.batches import batch_dtypes, load_window, new_rows
from dask_nn.data.blocks import align
from dask_nn.data.cuts import cut_rows, one_chunk_per_row_block
from dask_nn.data.plan import Piece, Window
from dask_nn.data.reader import MemoryReader
from dask_nn.errors import DataError

ROWS = 8


def given(dtype: str, *blocks: np.ndarray[Any, Any]) -> da.Array:
    """Make an array of blocks that have their own types, whatever is told of them."""
    return da.concatenate(
        [da.from_delayed(delayed(b, pure=False), b.shape, np.dtype(dtype)) for b in blocks]
    )


def batch(inputs: dict[str, Any], floating: torch.dtype, memory: Any) -> dict[str, torch.Tensor]:
    """Give all rows as a model gets them."""
    blocks = align(inputs, client=None, block_size_bytes=100, memory=memory)
    stream = blocks.stream
    arrays = blocks.arrays or [
        stream.compute(number, start, stream.values)
        for number, start in enumerate(stream.starts[:-1])
    ]
    pieces = tuple(Piece(number, 0, rows) for number, rows in enumerate(blocks.lengths))
    rows = new_rows(ROWS, blocks.fields, batch_dtypes(blocks.fields, floating))
    names = [field.name for field in blocks.fields]
    window = Window(0, ROWS, pieces)
    load_window(window, np.arange(ROWS), MemoryReader(arrays), rows, names)
    return dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("floating", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "dtype", "first", "others"),
    [
        ("y", "u1", [1, 2], np.array([300, -1, 2**53 + 1, 3, 4, 5])),
        ("y", "f4", [1, 2], np.array([0.1, 0.2, 0.3, 1e300, 0.5, 0.6])),
        ("y", "f2", [1, 2], np.array([0.1, 7, None, 1e6, 3, 4], object)),
        ("sample_weight", "i1", [1, 2], np.array([0.5, 0.1, 300, 1.5, 0, 3])),
        ("sample_weight", "u1", [1, 2], np.array([2**40 + 1, 1, 300, 1, 0, 3])),
        ("X.b", "f4", [1, 2], np.array([0.1, 0.2, 0.3, 0.4, 1 / 3, 0.6])),
        ("X.b", "u1", [1, 2], np.array([5.0, 6, 7, 8, 9, 255])),
    ],
)
def test_types_wider_than_was_told_give_the_bits_of_uncut_blocks(
    name, dtype, first, others, floating, memory
):
    narrow = np.array(first, dtype)
    x = {"X": da.zeros((ROWS, 1), chunks=(4, 1), dtype="f4")}
    values = np.concatenate([np.array(first, others.dtype), others])
    with np.errstate(all="ignore"):
        uncut, *cut = (
            batch(x | {name: array}, floating, memory)[name].nan_to_num(-1)
            for array in (
                given(dtype, values[:4], values[4:]),
                given(dtype, narrow, others),
                given(dtype, values[:4], narrow[:0], values[4:]),
            )
        )
    assert torch.equal(uncut, cut[0])
    assert torch.equal(uncut, cut[1])


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize(
    ("name", "dtype", "other", "expected"),
    [
        ("y", "u1", [0.5] * 6, "float64, expected int64 .* value 0.5"),
        ("y", "i8", np.array([2**63] * 6, "u8"), "uint64, expected int64"),
        ("y", "f4", ["1"] * 6, "<U1, expected float32"),
        ("sample_weight", "i1", ["1"] * 6, "<U1, expected float(32|64)"),
        ("X.b", "u1", [300] * 6, "int64, expected uint8 .* value 300"),
    ],
)
def test_a_cut_block_is_refused_as_an_uncut_one(name, dtype, other, expected, memory):
    x = {"X": da.zeros((ROWS, 1), chunks=(4, 1), dtype="f4")}
    other = np.asarray(other)
    for first, second in ((4, 4), (2, 6)):
        array = given(dtype, np.zeros(first, dtype), other[:second])
        with pytest.raises(DataError, match=f"block 1 of {name}.* has type {expected}"):
            batch(x | {name: array}, torch.float32, memory)


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 4, 1)])
def test_a_cut_block_of_another_shape_is_refused_by_name(memory, shape):
    x = {"X": da.zeros((ROWS, 1), chunks=(ROWS, 1), dtype="f4")}
    parts = [np.zeros((4, 4), "f4"), np.zeros(shape, "f4")]
    wrong = da.concatenate(
        [da.from_delayed(delayed(part, pure=False), (4, 4), "f4") for part in parts]
    )
    with pytest.raises(DataError, match=rf"block 1 of y as it was given has shape \({shape[0]},"):
        batch(x | {"y": wrong}, torch.float32, memory)


def test_pieces_side_by_side_have_the_widths_that_were_told():
    parts = [np.zeros((4, 2), "f4"), np.zeros((4, 4), "f4")]
    wrong = [da.from_delayed(delayed(part, pure=False), (4, 3), "f4") for part in parts]
    found = one_chunk_per_row_block("X", da.concatenate(wrong, axis=1))
    with pytest.raises(DataError, match=r"block 0 of X as it was given has shape \(4, 2\)"):
        found.compute(scheduler="sync")


def test_a_block_that_is_cut_is_looked_at_once(monkeypatch):
    looked_at = 0

    def check(found: np.ndarray[Any, Any], *_: Any, **__: Any) -> None:
        nonlocal looked_at
        looked_at += found.size

    monkeypatch.setattr(casts, "check_cast", check)
    array = given("f4", np.ones(1000, object))
    cut_rows("y", array, (1,) * 1000).compute(scheduler="sync")
    assert looked_at == 1000


@pytest.mark.parametrize("old", [(8,), (3, 0, 5), (1, 2, 5), (0, 8), (8, 0), (4, 4)])
@pytest.mark.parametrize("new", [(8,), (2, 6), (0, 8), (8, 0), (3, 0, 5), (1,) * 8, (5, 3)])
@pytest.mark.parametrize("width", [2, 0])
def test_rows_are_cut_as_dask_cuts_them(old, new, width):
    values = np.arange(ROWS * width).reshape(ROWS, width)
    array = da.from_array(values, chunks=((*old,), (width,)))
    found = cut_rows("X", array, new)
    assert found.chunks == ((*new,), (width,))
    np.testing.assert_array_equal(found.compute(scheduler="sync"), values)
    blocks = [block.compute(scheduler="sync") for block in found.blocks.ravel()]
    assert [len(block) for block in blocks] == list(new)


def test_pieces_side_by_side_of_two_types_keep_their_values():
    parts = [np.ones((4, 1), "f4"), np.full((4, 1), 0.1)]
    array = da.concatenate([given("f4", part) for part in parts], axis=1)
    found = one_chunk_per_row_block("X", array)
    np.testing.assert_array_equal(found.compute(scheduler="sync"), np.hstack(parts))


def test_persisted_pieces_side_by_side_cost_one_task_for_each_row_block():
    array = da.zeros((6, 6), chunks=(2, 1)).persist(scheduler="sync")
    found = one_chunk_per_row_block("X", array)
    assert len(dict(found.dask)) == len(dict(array.dask)) + 3
