from __future__ import annotations

import pickle

import cloudpickle
import dask.array as da
import numpy as np
import pytest
from dask.delayed import delayed

from dask_nn.data.recipes import cook, split_source, write_recipes
from dask_nn.data.streaming import stream_blocks

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


def test_what_only_a_kept_column_needed_is_released(client):
    y = lazy()[:, 0].rechunk(50).rechunk(10)  # one chunk that all blocks are cut from
    stream, futures = stream_blocks({"X": lazy(), "y": y}, client=client, block_limit_bytes=None)
    assert (stream.shared, futures) == ((), [])
    np.testing.assert_array_equal(stream.kept[1], ROWS[:, 0])
    scaled = lazy() - lazy().mean(axis=0)
    stream, futures = stream_blocks({"X": scaled, "y": y}, client=client, block_limit_bytes=None)
    assert len(stream.shared) == len(futures) == 1
