"""Chunks that a store has left out read as the fill value; chunks that vanish do not."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, LoggingStore

from dask_nn.data.zarr_rows import watched

ROWS = np.arange(1, 97, dtype="f4").reshape(24, 4)
ROWS[4:8] = 0  # the second chunk, which is left out
ROWS[12:16, 2:] = 0


def store(folder, **layout):
    """Write ROWS in chunks of four rows, or in shards of them; inside a group, beside another."""
    group = zarr.open_group(folder, mode="a")
    group.create_array("X2", data=np.ones((24, 4)), **layout)
    array = group.create_array("X", shape=ROWS.shape, dtype="f4", **layout)
    array[:] = ROWS
    return zarr.open_group(folder, mode="r")["X"]


@pytest.fixture(
    params=[
        {"chunks": (4, 4)},
        {"chunks": (2, 2), "shards": (4, 4)},
        {"chunks": (4, 4), "chunk_key_encoding": {"name": "v2", "separator": "."}},
    ],
    ids=["chunks", "shards", "keys"],
)
def rows(request, tmp_path):
    return watched(store(tmp_path, **request.param))


def vanish(rows, *number: int) -> None:
    """Remove a chunk, or shard."""
    folder = rows.array.store_path.store.root / rows.array.store_path.path
    name = rows.array.metadata.encode_chunk_key(number)
    (folder / name).unlink()


INDICES = {
    "slices": (slice(0, 12), slice(0, 4)),
    "backwards": (slice(11, None, -1), slice(None)),
    "rows": slice(2, 10),
    "a row": (9, slice(1, 3)),
    "a list": ([1, 9, 4],),
    "an array": (np.array([0, 10]), slice(None)),
    "nothing": (slice(5, 5),),
    "all": (Ellipsis, slice(0, 2)),
}


@pytest.mark.parametrize("index", [key for key in INDICES if key != "backwards"])
def test_what_was_left_out_reads_as_the_fill_value(rows, index):
    again = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(again[INDICES[index]], ROWS[INDICES[index]])


@pytest.mark.parametrize("index", ["slices", "rows", "a row", "a list", "an array", "all"])
def test_a_chunk_that_vanishes_is_missed_though_another_was_left_out(rows, index):
    vanish(rows, 2, 0)
    again = pickle.loads(pickle.dumps(rows))
    with pytest.raises(FileNotFoundError, match=r"lacks a chunk that it had.*(?s:.*)2"):
        again[INDICES[index]]
    np.testing.assert_array_equal(again[0:8], ROWS[0:8])
    np.testing.assert_array_equal(again[12:24], ROWS[12:24])


def test_a_chunk_that_comes_later_is_read(rows):
    writable = zarr.open_array(rows.array.store_path.store.root, path="X", mode="r+")
    writable[4:8] = 7
    np.testing.assert_array_equal(rows[4:8], np.full((4, 4), 7))


def test_chunks_along_several_axes_are_told_apart(tmp_path):
    rows = watched(store(tmp_path, chunks=(4, 2)))
    vanish(rows, 3, 0)
    np.testing.assert_array_equal(rows[12:16, 2:], ROWS[12:16, 2:])
    for index in ((slice(12, 16), slice(0, 4)), (slice(12, 16), slice(0, 2))):
        with pytest.raises(FileNotFoundError, match="lacks a chunk that it had"):
            rows[index]


def test_a_complete_array_is_watched_too(tmp_path):
    array = zarr.create_array(tmp_path / "all.zarr", data=ROWS[8:12], chunks=(2, 4))
    rows = watched(array)
    assert rows.left_out == b""
    vanish(rows, 1, 0)
    np.testing.assert_array_equal(rows[:2], ROWS[8:10])
    with pytest.raises(FileNotFoundError, match="lacks a chunk that it had"):
        rows[:]


def test_ten_thousand_chunks_are_listed_once_and_remembered_in_little(tmp_path):
    counted = LoggingStore(LocalStore(tmp_path / "empty.zarr"), log_level="ERROR")
    array = zarr.create_array(counted, shape=(10_000, 2), chunks=(1, 2), dtype="f4")
    counted.counter.clear()
    rows = watched(array)
    assert (counted.counter["list_prefix"], counted.counter["exists"]) == (1, 0)
    assert len(rows.left_out) == 1250
    np.testing.assert_array_equal(rows[3:5], np.zeros((2, 2)))
