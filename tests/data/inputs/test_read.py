from __future__ import annotations

import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from dask.delayed import delayed

from dask_nn.data.inputs.read import read_inputs
from dask_nn.errors import ConfigurationError, DataError

X = np.arange(60, dtype="f4").reshape(12, 5)
Y = np.arange(12) % 3
NAMES = [f"f{number}" for number in range(5)]


def frame() -> pd.DataFrame:
    return pd.DataFrame(X, columns=NAMES).assign(label=Y)


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return torch.from_numpy(X[index]), int(Y[index])


def pairs() -> list:
    return [delayed((X[start : start + 4], Y[start : start + 4])) for start in (0, 4, 8)]


COLLECTIONS = {
    "arrays": lambda: (X, Y),
    "dask arrays": lambda: (da.from_array(X, chunks=4), da.from_array(Y, chunks=5)),
    "tensors": lambda: (torch.from_numpy(X), torch.from_numpy(Y)),
    "tensor dataset": lambda: (
        torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
    ),
    "dataset": lambda: (Samples(),),
    "pandas and a name": lambda: (frame(), "label"),
    "pandas twice": lambda: (frame()[NAMES], frame()["label"]),
    "dask table and a name": lambda: (dd.from_pandas(frame(), npartitions=3), "label"),
    "dask table twice": lambda: (
        dd.from_pandas(frame(), npartitions=3)[NAMES],
        dd.from_pandas(frame(), npartitions=3)["label"],
    ),
    "delayed pairs": lambda: (pairs(),),
    "pairs of delayed": lambda: ([tuple(delayed(m) for m in p.compute()) for p in pairs()],),
    "two lists of delayed": lambda: (
        [delayed(X[s : s + 4]) for s in (0, 4, 8)],
        [delayed(Y[s : s + 4]) for s in (0, 4, 8)],
    ),
    "bag of samples": lambda: (
        db.from_sequence(list(zip(X, Y.tolist(), strict=True)), npartitions=3),
    ),
    "bag of blocks": lambda: (db.from_sequence([p.compute() for p in pairs()], npartitions=2),),
    "xarray": lambda: (xr.DataArray(X, dims=("time", "f")), xr.DataArray(Y, dims=("time",))),
    "xarray, rows last": lambda: (
        xr.DataArray(X.T, dims=("f", "time")),
        xr.DataArray(Y, dims=("time",)),
    ),
}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_every_kind_gives_the_same_rows(kind):
    options = {"batch_dim": "time"} if kind == "xarray, rows last" else {}
    found = read_inputs(*COLLECTIONS[kind](), block_size_bytes=100, **options)
    assert list(found) == ["X", "y"]
    np.testing.assert_array_equal(np.asarray(found["X"]), X)
    np.testing.assert_array_equal(np.asarray(found["y"]), Y)


def test_dictionaries_give_a_field_for_each_member():
    found = read_inputs({"image": X, "table": frame()[NAMES[:2]]}, {"a": Y, "b": Y * 2})
    assert list(found) == ["X.image", "X.table", "y.a", "y.b"]
    np.testing.assert_array_equal(found["X.table"], X[:, :2])


def test_an_xarray_dataset_gives_its_variables():
    data = xr.Dataset({"u": (("time", "f"), X), "label": (("time",), Y)})
    found = read_inputs(data, "label")
    assert list(found) == ["X.u", "y"]


def test_features_choose_and_order_columns():
    found = read_inputs(frame(), "label", features=["f3", "f1"])
    np.testing.assert_array_equal(found["X"], X[:, [3, 1]])


def test_weights_may_be_a_column_or_the_third_of_a_tuple():
    weights = np.linspace(0, 1, 12, dtype="f4")
    by_name = read_inputs(frame().assign(w=weights), "label", "w")
    assert by_name["X"].shape == (12, 5)
    np.testing.assert_array_equal(by_name["sample_weight"], weights)
    triples = [delayed((X, Y, weights))]
    np.testing.assert_array_equal(np.asarray(read_inputs(triples)["sample_weight"]), weights)


def test_categories_become_codes_and_missing_features_nan():
    table = pd.DataFrame(
        {
            "colour": pd.Categorical(["b", "a", "b"]),
            "count": pd.array([1, None, 3], dtype="Int64"),
            "kind": pd.Categorical(["x", "y", "x"]),
        }
    )
    for data in (table, dd.from_pandas(table, npartitions=1)):
        found = read_inputs(data, "kind")
        np.testing.assert_array_equal(np.asarray(found["X"]), [[1, 1], [0, np.nan], [1, 3]])
        np.testing.assert_array_equal(np.asarray(found["y"]), [0, 1, 0])


def test_a_dask_table_is_read_column_by_column_of_what_is_wanted(tmp_path):
    for start in (0, 4, 8):
        frame()[start : start + 4].to_parquet(tmp_path / f"part-{start}.parquet")
    data = dd.read_parquet(tmp_path / "*.parquet")
    found = read_inputs(data, "label", features=["f1"])
    np.testing.assert_array_equal(np.asarray(found["X"])[:, 0], X[:, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((frame, "lable"), {}, "did you mean 'label'"),
        ((frame, "label"), {"features": ["f9"]}, "there is no column 'f9'"),
        ((lambda: frame().assign(name="a"), "label"), {}, "'name' of X has type"),
        ((lambda: X, "label"), {}, "without named columns"),
        ((lambda: X,), {"features": ["a"]}, "without any"),
        ((lambda: X,), {}, "y is missing"),
        ((lambda: xr.DataArray(X, dims=("time", "f")), Y), {"batch_dim": "tme"}, "'time'"),
        ((lambda: {"a": X, "b": Y}, "c"), {}, "there is no entry 'c'"),
        ((lambda: [delayed((X, Y, Y, Y))],), {}, "tuples of 4 members"),
        ((lambda: [delayed("nothing")],), {}, "must be arrays of rows"),
    ],
)
def test_what_cannot_be_read_is_named(arguments, options, message):
    make, *rest = arguments
    with pytest.raises(DataError, match=message):
        read_inputs(make(), *rest, **options)


@pytest.mark.parametrize("target", [None, "kind"])
def test_categories_are_those_of_the_whole_table_in_every_partition(target):
    table = pd.DataFrame({"a": range(8), "kind": list("aabbbbcc")})

    def part(rows, order):
        return rows.assign(kind=pd.Categorical(rows.kind, categories=list(order)))

    parts = [delayed(part)(rows, order) for rows, order in ((table[:4], "abc"), (table[4:], "cba"))]
    read = read_inputs(dd.from_delayed(parts), target, needs_target=False)
    codes = read["y"].compute() if target else read["X"].compute()[:, 1]
    np.testing.assert_array_equal(codes, [0, 0, 1, 1, 1, 1, 2, 2])


def test_a_category_that_the_whole_table_does_not_tell_is_named():
    table = dd.from_pandas(pd.DataFrame({"a": range(8), "kind": list("aabbbbcc")}), npartitions=2)
    each = table.map_partitions(lambda rows: rows.assign(kind=rows.kind.astype("category")))
    with pytest.raises(DataError, match=r"'kind' of X has the category 'b'.*call categorize\(\)"):
        read_inputs(each, needs_target=False)["X"].compute()


@pytest.mark.parametrize(
    ("told", "made", "message"),
    [
        (int, "category", "'kind' of X is a category in this partition, and none in the DataFrame"),
        ("category", int, "'kind' of X has type int64 in this partition and is a category"),
    ],
)
def test_a_meta_that_is_wrong_about_categories_is_said(told, made, message):
    table = pd.DataFrame({"a": range(8), "kind": [10, 20] * 4})
    each = dd.from_pandas(table, npartitions=2).map_partitions(
        lambda rows: rows.assign(kind=rows.kind.astype(made)),
        meta=table[:2].assign(kind=table.kind[:2].astype(told)),
    )
    with pytest.raises(DataError, match=message):
        read_inputs(each, needs_target=False)["X"].compute()


def test_unknown_categories_say_what_to_do():
    table = dd.from_pandas(frame().assign(c=pd.Categorical(["a"] * 12)), npartitions=2)
    with pytest.raises(DataError, match=r"categorize"):
        read_inputs(table.assign(c=table.c.cat.as_unknown()), "label")


def test_missing_labels_name_the_row():
    table = pd.DataFrame({"f": [1.0, 2, 3], "label": pd.array([0, None, 1], dtype="Int64")})
    with pytest.raises(DataError, match=r"1 missing values .the first at index 1"):
        read_inputs(table, "label")


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(X[0], 0)])


def test_an_iterable_dataset_is_refused():
    with pytest.raises(DataError, match=r"map-style"):
        read_inputs(Endless())


@delayed
def unreadable():
    message = "the disk is gone"
    raise OSError(message)


@pytest.mark.parametrize("where", ["here", "cluster", "persisted"])
def test_a_part_that_raises_is_named(where, request):
    client = None if where == "here" else request.getfixturevalue("threads_client")
    part = client.persist(unreadable()) if where == "persisted" else unreadable()
    worker = r" on worker inproc://\S+" if client else ""
    text = rf"block 0 of the list of Delayed for X could not be computed{worker}: OSError: the disk"
    with pytest.raises(DataError, match=text) as caught:
        read_inputs([part], client=client)
    assert "in unreadable" in str(caught.value)


def test_a_partition_of_a_bag_that_raises_is_named():
    bag = db.from_delayed([delayed([]), unreadable()])
    with pytest.raises(DataError, match=r"block 1 of the Bag for X could not be computed: OSError"):
        read_inputs(bag)


class Stuck(np.ndarray):
    """Rows that cannot leave their worker."""

    def __reduce__(self):
        message = "too large to travel"
        raise TypeError(message)


def test_the_first_part_stays_on_its_worker(client):
    parts = [delayed(lambda: X.view(Stuck))(), delayed(lambda: X.view(Stuck))()]
    for given in (client, None):
        found = read_inputs(parts, needs_target=False, client=given)
        assert found["X"].shape[1:] == (5,)
    persisted = [part.persist() for part in parts]
    assert read_inputs(persisted, needs_target=False, client=client)["X"].dtype == X.dtype


@pytest.mark.parametrize("lazy", [False, True])
def test_columns_may_have_numbers_as_names(lazy):
    table = pd.DataFrame(X).assign(w=np.ones(12)).rename(columns={"w": 5})
    if lazy:
        table = dd.from_pandas(table, npartitions=2)
    found = read_inputs(table, 4, 5, features=[2, 0])
    np.testing.assert_array_equal(np.asarray(found["X"]), X[:, [2, 0]])
    np.testing.assert_array_equal(np.asarray(found["y"]), X[:, 4])
    assert found["sample_weight"].ndim == 1
    with pytest.raises(DataError, match="there is no column '4'; did you mean 4"):
        read_inputs(table, "4")
    with pytest.raises(DataError, match="y=5 names a column, but X is a ndarray"):
        read_inputs(X, 5)


@pytest.mark.parametrize("features", ["abc", 5])
def test_features_that_are_no_list_are_refused(features):
    with pytest.raises(ConfigurationError, match="features must be a list of names"):
        read_inputs(frame(), "label", features=features)


def test_coordinates_may_be_targets_and_weights():
    coords = {"kind": ("t", Y), "w": ("t", np.ones(12))}
    array = xr.DataArray(X, dims=("t", "f"), coords=coords)
    found = read_inputs(array, "kind", "w")
    assert list(found) == ["X", "y", "sample_weight"]
    np.testing.assert_array_equal(found["y"], Y)
    found = read_inputs(xr.Dataset({"u": array}), "kind")
    assert list(found) == ["X.u", "y"]
    with pytest.raises(DataError, match="there is no entry 'kin'; did you mean 'kind'"):
        read_inputs(array, "kin")
