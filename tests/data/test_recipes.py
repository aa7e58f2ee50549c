from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import zarr
from dask.delayed import delayed
from dask.utils import SerializableLock
from zarr.storage import LocalStore, LoggingStore

import dask_nn
from dask_nn.data.recipes import cook, split_source, write_recipes
from dask_nn.data.streaming import stream_blocks
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = np.arange(200, dtype="f4").reshape(50, 4)


def lazy(chunks: int = 10) -> da.Array:
    """Return an array that is read chunk by chunk, as from a file."""
    return da.map_blocks(
        lambda block: ROWS[block[0, 0] * chunks : (block[0, 0] + 1) * chunks],
        da.arange(-(-50 // chunks), chunks=1)[:, None],
        chunks=(da.core.normalize_chunks(chunks, (50,))[0], (4,)),
        dtype="f4",
        meta=np.empty((0, 4), "f4"),
    )


def test_every_recipe_makes_its_own_block():
    recipes, shared = write_recipes([lazy(), da.from_array(np.arange(50), chunks=10)])
    assert shared == []
    for number, recipe in enumerate(recipes):
        X, y = cook(recipe, {})
        np.testing.assert_array_equal(X, ROWS[number * 10 : number * 10 + 10])
        np.testing.assert_array_equal(y, np.arange(number * 10, number * 10 + 10))


def test_what_all_blocks_need_is_left_to_the_cluster_and_the_rest_is_not():
    X = lazy()
    recipes, shared = write_recipes([(X - X.mean(axis=0)) / X.std(axis=0)])
    assert {part.key for part in shared} == set(recipes[0].shared)
    assert len(shared) == 2
    values = {part.key: part.compute() for part in shared}
    expected = (ROWS - ROWS.mean(axis=0)) / ROWS.std(axis=0)
    np.testing.assert_allclose(cook(recipes[3], values)[0], expected[30:40], rtol=1e-5)
    # Not the other blocks, and not what the mean was made of.
    assert len(recipes[3].graph) < 6


def test_a_chunk_that_two_blocks_are_cut_from_is_not_kept_for_them():
    recipes, shared = write_recipes([lazy().rechunk((7, 4))])
    assert shared == []
    np.testing.assert_array_equal(np.concatenate([cook(recipe, {})[0] for recipe in recipes]), ROWS)


def test_parts_that_come_from_one_delayed_share_its_computation_in_a_recipe():
    calls = []

    @delayed
    def load(number: int):
        calls.append(number)
        return ROWS[:5] + number, np.full(5, number)

    pairs = [load(number) for number in range(3)]
    X = da.concatenate([da.from_delayed(pair[0], (5, 4), dtype="f4") for pair in pairs])
    y = da.concatenate([da.from_delayed(pair[1], (5,), dtype="i8") for pair in pairs])
    recipes, _ = write_recipes([X, y])
    cook(recipes[2], {})
    assert calls == [2]


def test_a_part_of_a_recipe_computes_some_fields():
    recipes, _ = write_recipes([lazy(), da.from_array(np.arange(50), chunks=10)])
    (y,) = cook(recipes[1].only([1]), {})
    np.testing.assert_array_equal(y, np.arange(10, 20))
    assert len(recipes[1].only([1]).graph) < len(recipes[1].graph)


def test_recipes_travel():
    recipes, _ = write_recipes([lazy()])
    again = pickle.loads(cloudpickle.dumps(recipes))
    np.testing.assert_array_equal(cook(again[4], {})[0], ROWS[40:])


def test_ten_thousand_recipes_are_small_together():
    array = da.zeros((10_000 * 8, 4), chunks=(8, 4), dtype="f4")
    recipes, _ = write_recipes([array])
    assert len(cloudpickle.dumps(recipes)) < 10_000_000


class Source:
    """Something that can be read in slices, and notes how much of it was."""

    shape, dtype, ndim = (50, 4), np.dtype("f4"), 2

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, index):
        found = ROWS[index]
        self.read.append(len(found))
        return found


@pytest.mark.parametrize("rows", [3, 7, 25])
def test_a_source_is_read_in_smaller_slices(rows):
    source = Source()
    array = da.from_array(source, chunks=(25, 4), asarray=False, meta=np.empty((0, 0), "f4"))
    smaller = split_source(array, rows)
    assert max(smaller.chunks[0]) <= rows
    np.testing.assert_array_equal(smaller.compute(scheduler="sync"), ROWS)
    assert max(source.read) <= rows


def test_blocks_that_are_computed_cannot_be_split():
    assert split_source(lazy(), 3) is None


@pytest.fixture(params=["dask", "dask_nn"])
def opened(request, tmp_path) -> Callable[[], da.Array]:
    """Open a Zarr store of ROWS, in five blocks, in one of two ways."""
    zarr.create_array(tmp_path / "rows.zarr", data=ROWS, chunks=(10, 4))
    return {
        "dask": lambda: da.from_zarr(tmp_path / "rows.zarr"),
        "dask_nn": lambda: dask_nn.open_data(f"zarr:{tmp_path / 'rows.zarr'}"),
    }[request.param]


def with_some_rows_set(array: da.Array) -> da.Array:
    array[30:] = -1
    return array


@pytest.mark.parametrize(
    "change",
    [
        lambda X: X.blocks[[0, 2, 1, 3, 4]],
        lambda X: X.blocks[[0, 2, 2, 3, 4]],
        lambda X: X.blocks[::-1],
        with_some_rows_set,
        lambda X: da.concatenate([X[:10], X[20:30], X[10:20], X[30:]]),
        lambda X: da.concatenate([X.blocks[number] for number in (0, 2, 1, 3, 4)]),
        lambda X: da.concatenate([X[:20], with_some_rows_set(X + 0)[20:]]),
        lambda X: da.roll(X, 10, axis=0),
        lambda X: da.where(X > 5, X, 0),
    ],
    ids=["order", "twice", "reversed", "set", "slices", "blocks", "joined", "rolled", "computed"],
)
def test_blocks_that_are_not_the_rows_of_a_source_are_not_read_from_it(change, opened):
    changed = change(opened())
    assert changed.shape == ROWS.shape
    assert not np.array_equal(changed.compute(scheduler="sync"), ROWS)
    assert split_source(changed, 3) is None
    with pytest.raises(DataError, match=r"of X has 160 B, more than .*computed as a whole"):
        stream_blocks({"X": changed}, client=None, block_limit_bytes=100)


@pytest.mark.parametrize(
    "change",
    [lambda X: X, lambda X: X[:], lambda X: X.blocks[0:5]],
    ids=["opened", "rows", "blocks"],
)
def test_the_rows_of_a_store_are_read_in_slices(change, opened):
    stream, _ = stream_blocks({"X": change(opened())}, client=None, block_limit_bytes=100)
    assert stream.lengths == (5,) * 10
    found = [stream.compute(block, 5 * block, stream.values)[0] for block in range(10)]
    np.testing.assert_array_equal(np.concatenate(found), ROWS)


def test_a_source_with_a_lock_is_read_in_slices_under_the_same_one():
    lock = SerializableLock()

    class Guarded(Source):
        def __getitem__(self, index):
            assert lock.locked()
            return super().__getitem__(index)

    source = Guarded()
    array = da.from_array(source, chunks=(25, 4), asarray=False, lock=lock, meta=ROWS[:0])
    smaller = split_source(array, 5)
    np.testing.assert_array_equal(smaller.compute(scheduler="sync"), ROWS)
    assert max(source.read) == 5


def test_what_only_a_kept_column_needed_is_released(client):
    y = lazy()[:, 0].rechunk(50).rechunk(10)  # one chunk that all blocks are cut from
    stream, surveyor = stream_blocks({"X": lazy(), "y": y}, client=client, block_limit_bytes=None)
    assert (stream.shared, surveyor.futures) == ((), [])
    np.testing.assert_array_equal(stream.kept[1], ROWS[:, 0])
    scaled = lazy() - lazy().mean(axis=0)
    stream, surveyor = stream_blocks({"X": scaled, "y": y}, client=client, block_limit_bytes=None)
    assert len(stream.shared) == len(surveyor.futures) == 1


def counted(counts: list[int], chunks: int = 25) -> da.Array:
    """Return an array whose chunks note that they are computed."""

    def read(block):
        counts.append(int(block[0, 0]))
        return ROWS[block[0, 0] * chunks : (block[0, 0] + 1) * chunks]

    return da.map_blocks(
        read,
        da.arange(-(-50 // chunks), chunks=1)[:, None],
        chunks=(da.core.normalize_chunks(chunks, (50,))[0], (4,)),
        dtype="f4",
        meta=np.empty((0, 4), "f4"),
    )


def test_large_chunks_that_many_blocks_are_cut_from_are_not_held(monkeypatch):
    """They are computed for each block, and only so many times."""
    counts: list[int] = []
    fine = counted(counts).rechunk((5, 4))
    small, _ = stream_blocks({"X": fine}, client=None, block_limit_bytes=None)
    assert len(small.shared) == 2
    monkeypatch.setattr("dask_nn.data.recipes.SHARED_BYTES", 300)
    stream, _ = stream_blocks({"X": fine}, client=None, block_limit_bytes=None)
    assert not any("read" in str(key) for key in stream.shared)
    counts.clear()
    found = [stream.compute(block, 5 * block, stream.values)[0] for block in range(10)]
    np.testing.assert_array_equal(np.concatenate(found), ROWS)
    assert sorted(counts) == [0] * 5 + [1] * 5
    monkeypatch.setattr("dask_nn.data.recipes.MOST_REPEATS", 4)
    with pytest.raises(DataError, match=r"5 blocks need the same .* too large to be at every"):
        stream_blocks({"X": fine}, client=None, block_limit_bytes=None)


def test_a_mean_is_shared_though_the_chunks_below_it_are_large(monkeypatch):
    monkeypatch.setattr("dask_nn.data.recipes.SHARED_BYTES", 300)
    X = lazy(5)
    stream, _ = stream_blocks({"X": X - X.mean(axis=0)}, client=None, block_limit_bytes=None)
    assert len(stream.shared) == 1
    np.testing.assert_allclose(
        stream.compute(3, 15, stream.values)[0], ROWS[15:20] - ROWS.mean(axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["shuffle", "rechunk"])
def test_what_goes_between_all_workers_at_once_is_refused_by_name(kind, client):
    if kind == "rechunk":
        with dask.config.set({"array.rechunk.method": "p2p"}):
            X = lazy().rechunk((-1, 1)).rechunk((7, 4))
    else:
        frame = pd.DataFrame(ROWS, columns=list("abcd")).astype({"a": "int64"})
        parts = dd.from_pandas(frame, npartitions=4).shuffle("a").to_delayed()
        arrays = [da.from_delayed(delayed(np.asarray)(p), (np.nan, 4), "f8") for p in parts]
        X = da.concatenate(arrays, allow_unknown_chunksizes=True)
    with pytest.raises(DataError, match=r"P2P.*Zarr or Parquet first"):
        write_recipes([X])


def test_a_large_literal_is_sent_once_and_not_with_every_block(client, monkeypatch):
    monkeypatch.setattr("dask_nn.data.recipes.LARGE_LITERAL_BYTES", 100)
    table = delayed(ROWS, name="table", traverse=False)
    cut = delayed(lambda rows, start: rows[start : start + 5])
    X = da.concatenate([da.from_delayed(cut(table, n), (5, 4), "f4") for n in range(0, 50, 5)])
    stream, surveyor = stream_blocks({"X": X}, client=client, block_limit_bytes=None)
    assert stream.shared == ("table",)
    assert list(surveyor.literals) == ["table"]
    assert len(client.who_has(surveyor.futures)["table"]) == 2
    assert ROWS.tobytes() not in cloudpickle.dumps(stream.recipes[0])


def test_a_store_is_listed_once_however_many_blocks_are_read_from_it(tmp_path):
    store = LoggingStore(LocalStore(tmp_path / "rows.zarr"), log_level="ERROR")
    stored = zarr.create_array(store, data=ROWS, chunks=(2, 4))
    store.counter.clear()
    X = da.from_zarr(stored)
    recipes, _ = write_recipes([X[:, :3], X[:, 3] + 1])
    assert len(recipes) == 25
    assert store.counter["list_prefix"] == 1
    np.testing.assert_array_equal(cook(recipes[4], {})[0], ROWS[8:10, :3])
    (tmp_path / "rows.zarr" / "c" / "4" / "0").unlink()
    with pytest.raises(FileNotFoundError, match="lacks a chunk that it had"):
        cook(recipes[4], {})
