from __future__ import annotations

import re
from uuid import uuid4

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
from distributed import get_worker

from dask_nn.data.blocks import Blocks, align
from dask_nn.data.inputs.read import read_inputs
from dask_nn.data.memory import Room
from dask_nn.data.peek import label_range, sample
from dask_nn.data.streaming import is_persisted, measure
from dask_nn.errors import DataError

X = np.arange(60, dtype=np.float32).reshape(20, 3)
Y = np.arange(20)


def aligned(client=None, *, block_size_bytes: int = 1 << 20, **inputs) -> Blocks:
    return align(inputs, client=client, block_size_bytes=block_size_bytes)


def joined(blocks: Blocks) -> list[np.ndarray]:
    return [np.concatenate(column) for column in zip(*blocks.arrays, strict=True)]


def unknown(array: np.ndarray, chunks: int) -> da.Array:
    lazy = da.from_array(array, chunks=chunks)
    found = lazy[da.from_array(np.ones(len(array), bool), chunks=chunks)]
    assert np.isnan(found.shape[0])
    return found


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, Y),
        (da.from_array(X, chunks=(7, 3)), Y),
        (da.from_array(X, chunks=(7, 2)), da.from_array(Y, chunks=6)),
        (X, da.from_array(Y, chunks=7)),
        (unknown(X, 7), Y),
        (X, unknown(Y, 7)),
        (unknown(X, 7), unknown(Y, 4)),
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (X.tolist(), Y.tolist()),
    ],
)
def test_all_inputs_are_cut_at_the_same_rows(x, y):
    blocks = aligned(X=x, y=y)
    for lengths in ([len(array) for array in arrays] for arrays in blocks.arrays):
        assert lengths[0] == lengths[1]
    assert blocks.lengths == tuple(len(arrays[0]) for arrays in blocks.arrays)
    assert blocks.num_samples == 20
    found = joined(blocks)
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_array_equal(found[1], Y)


def test_the_first_dask_array_decides_where_to_cut():
    assert aligned(X=da.from_array(X, chunks=(7, 3)), y=Y).lengths == (7, 7, 6)
    assert aligned(X=X, y=da.from_array(Y, chunks=8)).lengths == (8, 8, 4)
    lazy = da.from_array(Y, chunks=8)
    assert aligned(X=da.from_array(X, chunks=(7, 3)), y=lazy).lengths == (7, 7, 6)


@pytest.mark.parametrize(
    ("size_bytes", "lengths"), [(1, (1,) * 20), (12, (1,) * 20), (84, (7, 7, 6)), (10**9, (20,))]
)
def test_arrays_of_this_process_are_cut_by_the_size_of_x(size_bytes, lengths):
    assert aligned(X=X, y=Y, block_size_bytes=size_bytes).lengths == lengths


def test_rows_without_columns_can_be_cut():
    assert aligned(X=np.zeros((4, 0)), y=np.zeros(4), block_size_bytes=2).lengths == (2, 2)


def test_fields_tell_the_shape_and_type_of_a_row():
    blocks = aligned(X=np.zeros((5, 2, 3), np.uint8), y=np.zeros(5), sample_weight=np.ones(5))
    assert [field.name for field in blocks.fields] == ["X", "y", "sample_weight"]
    assert [field.shape for field in blocks.fields] == [(2, 3), (), ()]
    assert [field.dtype for field in blocks.fields] == [np.uint8, np.float64, np.float64]
    assert blocks.size_bytes == 5 * (6 + 8 + 8)


def test_on_a_cluster_every_block_lies_on_a_worker(threads_client):
    blocks = aligned(threads_client, X=da.from_array(X, chunks=(7, 2)), y=Y)
    assert blocks.arrays is None
    assert blocks.lengths == (7, 7, 6)
    keys = [key for row in blocks.keys for key in row]
    assert all(threads_client.who_has(keys).values())


def test_persisted_arrays_keep_their_keys(threads_client):
    lazy = da.from_array(X, chunks=(7, 3)).persist()
    blocks = aligned(threads_client, X=lazy, y=Y)
    assert [row[0] for row in blocks.keys] == [block[0] for block in lazy.__dask_keys__()]


def test_what_inputs_share_is_computed_once(threads_client, tmp_path):
    def load(block: np.ndarray) -> np.ndarray:
        (tmp_path / uuid4().hex).touch()
        return block

    table = da.from_array(X, chunks=(5, 3)).map_blocks(load, meta=X[:0])
    blocks = aligned(threads_client, X=table[:, 1:], y=table[:, 0], sample_weight=table[:, 2])
    assert len(blocks.lengths) == len(list(tmp_path.iterdir())) == 4


def test_labels_of_all_blocks_have_a_range(threads_client):
    labels = np.where(Y % 5 == 0, -100, Y - 3)
    for client in (None, threads_client):
        blocks = aligned(client, X=X, y=da.from_array(labels, chunks=3))
        found = label_range(blocks, ignore=-100, place=1, client=client)
        assert (found.low, found.high, found.ignored) == (-2, 16, True)
        found = label_range(blocks, ignore=77, place=1, client=client)
        assert (found.low, found.high, found.ignored) == (-100, 16, False)


def test_labels_that_are_all_ignored_have_no_range():
    blocks = aligned(X=X, y=np.full(20, -100))
    found = label_range(blocks, ignore=-100, place=1, client=None)
    assert found.low > found.high
    assert found.ignored


@pytest.mark.parametrize("rows", [1, 3, 8, 20, 99])
def test_a_sample_is_the_first_rows_whatever_the_blocks(threads_client, rows):
    for client in (None, threads_client):
        lazy = da.from_array(X.astype(">f4"), chunks=((1, 2, 1, 0, 16), 3))
        found = sample(aligned(client, X=lazy, y=Y), rows, client=client)
        np.testing.assert_array_equal(found[0], X[:rows])
        np.testing.assert_array_equal(found[1], Y[:rows])
        assert found[0].dtype.isnative


def failing() -> np.ndarray:
    message = "the disk is gone"
    raise OSError(message)


BAD = {
    "lengths": ({"X": X, "y": Y[:19]}, "X has 20, y has 19"),
    "lengths found late": ({"X": unknown(X, 7), "y": Y[:19]}, "X has 20, y has 19"),
    "no rows": ({"X": X[:0], "y": Y[:0]}, "X, y have 0 rows"),
    "no rows in blocks": (
        {"X": da.zeros((0, 3), chunks=(0, 3)), "y": da.zeros(0, chunks=0)},
        "have 0 rows",
    ),
    "no rows after a filter": (
        {"X": da.from_array(X, chunks=7)[da.zeros(20, chunks=7, dtype=bool)], "y": Y[:0]},
        "have 0 rows",
    ),
    "a number": ({"X": np.float32(3), "y": Y}, "X must have at least one axis"),
    "nothing": ({"X": None, "y": Y}, "X must have at least one axis"),
    "text": ({"X": X, "y": np.array(["a"] * 20)}, "y has dtype <U1, expected numbers"),
    "complex": ({"X": X.astype(np.complex64), "y": Y}, "X has dtype complex64"),
    "long double": ({"X": X.astype(np.longdouble), "y": Y}, "at most 64 bits"),
    "ragged lists": ({"X": [[1], [1, 2]], "y": [0, 1]}, "X cannot be read as an array"),
    "weights with a column": (
        {"X": X, "y": Y, "sample_weight": np.ones((20, 1))},
        r"sample_weight .* got shape \(20, 1\)",
    ),
    "a column length nobody knows": (
        {"X": da.from_array(X, chunks=(7, 2))[:, da.from_array([True, True, False])], "y": Y},
        "the length of axis 1 of X is unknown",
    ),
    "blocks that cannot be computed": (
        {"X": da.from_delayed(dask.delayed(failing)(), (20, 3), dtype=float), "y": Y},
        "X.* could not be computed.*the disk is gone",
    ),
    "chunk sizes that cannot be computed": (
        {"X": da.from_delayed(dask.delayed(failing)(), (np.nan, 3), dtype=float), "y": Y},
        "X.* could not be computed.*the disk is gone",
    ),
}


@pytest.mark.parametrize("where", ["this process", "cluster"])
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_data_errors_that_name_the_input(request, name, where):
    client = request.getfixturevalue("threads_client") if where == "cluster" else None
    inputs, text = BAD[name]
    with pytest.raises(DataError, match=text):
        aligned(client, **inputs)


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_that_were_computed_are_not_computed_again_to_find_the_one_that_fails(streamed):
    computed = []

    def block(number):
        computed.append(number)
        if number == computed[:3][-1] and len(computed) > 2:  # the third one that is tried
            message = "bad sector"
            raise OSError(message)
        return X[:2]

    parts = [dask.delayed(block, pure=False)(number) for number in range(6)]
    rows = np.nan if streamed else 2
    lazy = da.concatenate([da.from_delayed(part, (rows, 3), dtype=X.dtype) for part in parts])
    with (
        dask.config.set(scheduler="synchronous"),
        pytest.raises(DataError, match=r"block \d of X could not be computed: OSError: bad sector"),
    ):
        measure({"X": lazy}, None) if streamed else aligned(X=lazy, y=Y[:12])
    assert computed == [*dict.fromkeys(computed[:3]), computed[2]]


@pytest.mark.parametrize("where", ["this process", "cluster"])
def test_a_block_that_is_not_what_its_array_says_is_found(request, where):
    client = request.getfixturevalue("threads_client") if where == "cluster" else None
    lazy = da.from_array(X, chunks=(5, 3)).map_blocks(lambda block: block[:1], dtype=X.dtype)
    text = {
        "this process": r"block 0 of X gave an array of 1 rows, expected 5: ",
        "cluster": r"block 0 of X, cut to its first rows, has shape \(1, 3\), expected \(4, 3\)",
    }
    with pytest.raises(DataError, match=text[where]):
        sample(aligned(client, X=lazy, y=Y), 4, client=client)


def halves(array: da.Array) -> da.Array:
    return array.persist() / np.float32(2)


HELD = {
    "persisted": (lambda array: array.persist(), True),
    "blocks of what is persisted": (lambda array: array.persist().blocks[::-1], True),
    "rows of what is persisted": (lambda array: array.persist()[:10], True),
    "computed from what is persisted": (halves, False),
    "computed from more blocks that are": (lambda array: halves(array)[:5], False),
    "partly persisted": (
        lambda array: da.concatenate([array[:5].persist(), array[5:].persist() + 1]),
        False,
    ),
    "lazy": (lambda array: array + 1, False),
}


@pytest.mark.parametrize("name", HELD)
def test_only_an_array_whose_own_blocks_are_there_counts_as_held(name, threads_client):
    make, held = HELD[name]
    array = make(da.from_array(X, chunks=(5, 3)))
    y = da.from_array(np.arange(len(array)), chunks=5).persist()
    assert is_persisted(array, threads_client) is held
    blocks = aligned(threads_client, X=array, y=y)
    assert blocks.new_bytes == (0 if held else array.nbytes)
    tight = Room(held_bytes=10, worker_bytes=1 << 30)
    for memory in ("auto", "stream"):
        options = {"block_size_bytes": 1 << 20, "memory": memory, "room": tight}
        if held and memory == "stream":
            with pytest.raises(DataError, match=r"persisted already"):
                align({"X": array, "y": y}, client=threads_client, **options)
        else:
            found = align({"X": array, "y": y}, client=threads_client, **options)
            assert (found.stream is not None) is not held


@pytest.mark.parametrize("where", ["this process", "cluster"])
def test_a_table_of_unknown_lengths_is_measured(request, where):
    client = request.getfixturevalue("threads_client") if where == "cluster" else None
    frame = pd.DataFrame(X, columns=list("abc"))
    parts = [dask.delayed(frame[start : start + 4]) for start in range(0, 20, 4)]
    table = dd.from_delayed(parts, meta=frame[:0], verify_meta=False)
    assert measure(read_inputs(table, needs_target=False), client) == X.nbytes


@pytest.mark.parametrize("moved", ["shuffle", "merge"])
def test_a_table_whose_rows_move_between_workers_is_measured(moved, client):
    frame = pd.DataFrame(X, columns=list("abc"))
    table = dd.from_pandas(frame, npartitions=4)
    if moved == "shuffle":
        table = table.shuffle("a", shuffle_method="p2p")
    else:
        table = table.merge(table[["a"]], on="a", shuffle_method="p2p", broadcast=False)
    assert measure(read_inputs(table, needs_target=False), client) > 0


def test_what_is_measured_stays_where_it_is_pinned(client):
    worker = min(client.scheduler_info(n_workers=-1)["workers"])

    def part() -> np.ndarray:
        assert get_worker().address == worker
        return X

    with dask.annotate(workers=[worker], allow_other_workers=False):
        parts = [dask.delayed(part, pure=False)() for _ in range(3)]
    rows = da.concatenate([da.from_delayed(one, (np.nan, 3), X.dtype) for one in parts])
    assert measure({"X": rows}, client) == 3 * X.nbytes


@pytest.mark.parametrize("where", ["this process", "cluster"])
@pytest.mark.parametrize("row_shape", [(2,), (), (3, 1)], ids=str)
@pytest.mark.parametrize("block", [0, 2])
def test_a_part_of_another_shape_is_named_where_lengths_are_unknown(
    request, block, row_shape, where
):
    client = request.getfixturevalue("threads_client") if where == "cluster" else None
    shapes = [(4, *(row_shape if number == block else (3,))) for number in range(3)]
    parts = [dask.delayed(np.ones)(shape, "f4") for shape in shapes]
    lazy = da.concatenate([da.from_delayed(part, (np.nan, 3), dtype="f4") for part in parts])
    text = rf"block {block} of X has shape {re.escape(str(shapes[block]))}, expected \(4, 3\)"
    with pytest.raises(DataError, match=text):
        aligned(client, X=lazy, y=Y[:12])
