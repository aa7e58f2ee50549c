"""Predictions have the kind, the index and the coordinates of what they are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from dask.delayed import delayed
from torch import nn

import dask_nn
from dask_nn.errors import ConfigurationError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

# Of Dask itself, with the newest pandas.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")

NAMES = list("abcde")
X = np.random.Generator(np.random.PCG64(2)).normal(size=(60, 5)).astype(np.float32)
Y = np.arange(60) % 3
INDEX = pd.Index(np.arange(60) * 3, name="id")


def network(num_outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, num_outputs)


def expected(output: str = "label") -> np.ndarray[Any, Any]:
    with torch.no_grad():
        raw = network()(torch.from_numpy(X)).numpy()
    return raw if output == "raw" else raw.argmax(axis=1)


def table() -> pd.DataFrame:
    return pd.DataFrame(X, columns=NAMES, index=INDEX).assign(label=Y)


@pytest.fixture
def parquet(tmp_path: Path) -> dd.DataFrame:
    """Write many small files, of which Dask joins some where few of many columns are read."""
    more = pd.DataFrame(np.zeros((60, 20)), index=INDEX).add_prefix("more")
    wide = table().join(more)
    for number, start in enumerate(range(0, 60, 5)):
        wide[start : start + 5].to_parquet(tmp_path / f"part-{number:02}.parquet")
    return dd.read_parquet(tmp_path)


@pytest.mark.parametrize("output", ["label", "raw"])
def test_a_table_of_many_files_keeps_its_index(parquet, output) -> None:
    found = dask_nn.predict(network(), parquet, features=NAMES, output=output)
    computed = found.compute(scheduler="sync")
    assert computed.index.equals(INDEX)
    assert list(found.columns if output == "raw" else [found.name]) == (
        ["raw_0", "raw_1", "raw_2"] if output == "raw" else ["label"]
    )
    np.testing.assert_allclose(computed.to_numpy(), expected(output), rtol=1e-5, atol=1e-6)


def test_a_partition_of_a_table_is_read_once(parquet) -> None:
    reads: list[int] = []

    def count(frame: pd.DataFrame) -> pd.DataFrame:
        reads.append(len(frame))
        return frame

    counted = parquet[NAMES].map_partitions(count, meta=parquet[NAMES]._meta)
    found = dask_nn.predict(network(), counted)
    reads.clear()
    found.compute(scheduler="sync")
    assert sum(reads) == 60


def test_evaluate_takes_x_and_y_of_many_files_apart(parquet) -> None:
    model = network()
    want = dask_nn.evaluate(model, X, Y)
    assert dask_nn.evaluate(model, parquet, "label", features=NAMES) == want
    assert dask_nn.evaluate(model, parquet[NAMES], parquet["label"]) == want


def test_known_divisions_stay() -> None:
    frame = dd.from_pandas(table()[NAMES], npartitions=4)
    assert dask_nn.predict(network(), frame).divisions == frame.divisions


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("where", ["here", "cluster"])
@pytest.mark.parametrize("chosen", [NAMES, None], ids=["columns", "all"])
def test_a_table_of_delayed_is_predicted(chosen, where, verify, request) -> None:
    if where == "cluster":
        request.getfixturevalue("client")
    parts = [delayed(table()[NAMES][start : start + 20]) for start in range(0, 60, 20)]
    frame = dd.from_delayed(parts, meta=table()[NAMES][:0], verify_meta=verify)
    found = dask_nn.predict(network(), frame, features=chosen).compute()
    pd.testing.assert_series_equal(found, pd.Series(expected(), index=INDEX, name="label"))
    arrays = dask.compute(*dask_nn.predict(network(), frame.to_delayed()))
    np.testing.assert_array_equal(np.concatenate(arrays), expected())


@pytest.mark.parametrize("output", ["label", "raw"])
def test_predictions_of_a_table_can_be_worked_on(output) -> None:
    frame = dd.from_pandas(table()[NAMES], npartitions=3)
    found = dask_nn.predict(network(), frame, output=output)
    rows = found.to_dask_array(lengths=True)
    np.testing.assert_allclose(rows.compute(), expected(output), rtol=1e-5, atol=1e-6)
    column = found if output == "label" else found["raw_0"]
    joined = frame.assign(found=column).to_dask_array().compute()[:, -1]
    want = expected(output) if output == "label" else expected(output)[:, 0]
    np.testing.assert_allclose(joined, want, rtol=1e-5, atol=1e-6)


def test_a_pandas_table_keeps_its_index() -> None:
    found = dask_nn.predict(network(), table()[NAMES])
    pd.testing.assert_series_equal(found, pd.Series(expected(), index=INDEX, name="label"))


class Scalars(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_a_series_keeps_its_index() -> None:
    series = dd.from_pandas(table()["a"], npartitions=3)
    found = dask_nn.predict(Scalars(), series, output="raw").compute(scheduler="sync")
    pd.testing.assert_series_equal(found, (table()["a"] * 2).rename("raw"))


def labelled(data: Any) -> xr.DataArray:
    return xr.DataArray(
        data,
        dims=("time", "f"),
        coords={
            "time": pd.date_range("2020", periods=60),
            "kind": ("time", Y),
            "f": NAMES,
            "run": 7,
            "both": (("time", "f"), X),
        },
    )


@pytest.mark.parametrize("data", [X, da.from_array(X, chunks=(20, 5))], ids=["numpy", "dask"])
def test_an_xarray_keeps_the_coordinates_of_its_rows_and_scalars(data) -> None:
    source = labelled(data)
    found = dask_nn.predict(network(), source.transpose("f", "time"), batch_dim="time")
    found = found.compute(scheduler="sync")
    assert found.dims == ("time",)
    assert set(found.coords) == {"time", "kind", "run"}  # the others lie along f as well
    assert found.sel(time="2020-01-04").item() == expected()[3]
    np.testing.assert_array_equal(found.kind, Y)
    assert int(found.run) == 7
    np.testing.assert_array_equal(found, expected())
    raw = dask_nn.predict(network(), source, output="raw")
    assert raw.dims == ("time", "raw_1")


def test_levels_of_an_index_stay() -> None:
    index = pd.MultiIndex.from_product([range(6), range(10)], names=["site", "day"])
    coords = xr.Coordinates.from_pandas_multiindex(index, "sample")
    source = xr.DataArray(X, dims=("sample", "f"), coords=coords)
    found = dask_nn.predict(network(), source)
    np.testing.assert_array_equal(found.sel(site=2), expected()[20:30])


def test_a_variable_gives_an_array_without_coordinates() -> None:
    found = dask_nn.predict(network(), xr.Variable(("time", "f"), X))
    assert not found.coords
    assert found.dims == ("time",)
    np.testing.assert_array_equal(found, expected())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = network()

    def forward(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([u, v], dim=1))  # type: ignore[no-any-return]


def pieces(kind: str) -> Any:
    left, right = table()[["a", "b"]], table()[["c", "d", "e"]]
    return {
        "pandas": lambda: (left, right),
        "dask table": lambda: (dd.from_pandas(left, npartitions=3), right),
        "two dask tables": lambda: (
            dd.from_pandas(left, npartitions=3),
            dd.from_pandas(right, npartitions=3),
        ),
        "array, then dask table": lambda: (X[:, :2], dd.from_pandas(right, npartitions=4)),
        "dask array, then table": lambda: (da.from_array(X[:, :2], chunks=(25, 2)), right),
        "dask table, then array": lambda: (
            dd.from_pandas(left, npartitions=4),
            da.from_array(X[:, 2:], chunks=(25, 3)),
        ),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "pandas",
        "dask table",
        "two dask tables",
        "array, then dask table",
        "dask array, then table",
        "dask table, then array",
    ],
)
def test_dictionaries_keep_the_index_of_their_first_table(kind) -> None:
    u, v = pieces(kind)
    found = dask_nn.predict(Named(), {"u": u, "v": v})
    (computed,) = dask.compute(found, scheduler="sync")
    pd.testing.assert_series_equal(computed, pd.Series(expected(), index=INDEX, name="label"))


def test_dictionaries_keep_coordinates() -> None:
    source = labelled(da.from_array(X, chunks=(20, 5)))
    found = dask_nn.predict(Named(), {"u": source[:, :2], "v": source[:, 2:]})
    assert found.sel(time="2020-01-04").compute(scheduler="sync").item() == expected()[3]


def test_an_xarray_dataset_keeps_coordinates_and_gives_targets_by_name() -> None:
    source = labelled(X).drop_vars("both")
    data = xr.Dataset({"u": source[:, :2], "v": source[:, 2:].rename(f="g")})
    found = dask_nn.predict(Named(), data)
    np.testing.assert_array_equal(found.kind, Y)
    np.testing.assert_array_equal(found, expected())
    assert dask_nn.evaluate(Named(), data, "kind") == dask_nn.evaluate(network(), X, Y)
    assert dask_nn.evaluate(network(), source, "kind") == dask_nn.evaluate(network(), X, Y)


@pytest.mark.parametrize(
    "order", [("u", "v"), ("v", "u")], ids=["the lazy one first", "the lazy one last"]
)
def test_numpy_and_dask_arrays_may_be_mixed(order) -> None:
    members = {"u": da.from_array(X[:, :2], chunks=(25, 2)), "v": X[:, 2:]}
    mixed = {name: members[name] for name in order}
    want = dask_nn.evaluate(network(), X, Y)
    found = dask_nn.predict(Named(), mixed)
    assert found.chunks == ((25, 25, 10),)
    np.testing.assert_array_equal(found.compute(scheduler="sync"), expected())
    for y in (Y, da.from_array(Y, chunks=20)):
        assert dask_nn.evaluate(Named(), mixed, y) == want
    assert dask_nn.evaluate(network(), X, da.from_array(Y, chunks=20)) == want


def test_dask_members_are_evaluated_on_workers(client) -> None:
    def here(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from distributed import get_worker

        get_worker()
        return block

    lazy = da.from_array(X[:, 2:], chunks=(25, 3)).map_blocks(here, meta=np.empty((0, 3), "f4"))
    mixed = {"u": X[:, :2], "v": lazy}
    assert dask_nn.evaluate(Named(), mixed, Y) == dask_nn.evaluate(network(), X, Y)


def test_delayed_parts_give_delayed_predictions() -> None:
    parts = [delayed(X[start : start + 20]) for start in range(0, 60, 20)]
    found = dask_nn.predict(network(), parts)
    assert len(found) == 3
    np.testing.assert_array_equal(
        np.concatenate(dask.compute(*found, scheduler="sync")), expected()
    )
    (one,) = dask.compute(dask_nn.predict(network(), delayed(X)), scheduler="sync")
    np.testing.assert_array_equal(one, expected())


BAGS = {
    "samples": lambda: db.from_sequence(list(X), npartitions=4),
    "pairs": lambda: db.from_sequence(list(zip(X, Y.tolist(), strict=True)), npartitions=4),
    "vector targets": lambda: db.from_sequence(list(zip(X, X[:, :2], strict=True)), npartitions=4),
    "blocks": lambda: db.from_sequence([X[:20], X[20:50], X[50:]], npartitions=2),
}


@pytest.mark.parametrize("kind", BAGS)
def test_a_bag_gives_a_prediction_for_each_row(kind) -> None:
    found = dask_nn.predict(network(), BAGS[kind]())
    assert isinstance(found, db.Bag)
    np.testing.assert_array_equal(found.compute(scheduler="sync"), expected())


def test_empty_partitions_of_a_bag_give_nothing() -> None:
    bag = db.from_sequence(list(enumerate(X)), npartitions=6)
    kept = bag.filter(lambda item: 20 <= item[0] < 45).map(lambda item: item[1])
    found = dask_nn.predict(network(), kept)
    np.testing.assert_array_equal(found.compute(scheduler="sync"), expected()[20:45])


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


def test_a_torch_dataset_gives_a_dask_array(client) -> None:
    found = dask_nn.predict(network(), Samples())
    assert isinstance(found, da.Array)
    np.testing.assert_array_equal(found.compute(), expected())


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kind": self.linear(x), "size": x[:, 0]}


def test_several_outputs_of_a_table_are_computed_together(parquet) -> None:
    output: Any = {"kind": "label", "size": "raw"}
    reads: list[int] = []

    def count(frame: pd.DataFrame) -> pd.DataFrame:
        reads.append(len(frame))
        return frame

    counted = parquet[NAMES].map_partitions(count, meta=parquet[NAMES]._meta)
    lazy = dask_nn.predict(Both(), counted, output=output)
    reads.clear()
    found = dict(zip(lazy, dask.compute(*lazy.values(), scheduler="sync"), strict=True))
    assert sum(reads) == 60
    pd.testing.assert_series_equal(found["kind"], pd.Series(expected(), index=INDEX, name="kind"))
    pd.testing.assert_series_equal(found["size"], table()["a"].rename("size"))


@pytest.mark.parametrize(
    "data",
    [
        table,
        lambda: dd.from_pandas(table(), npartitions=2),
        lambda: {"input": X, "label": Y},
        lambda: xr.Dataset({"input": (("t", "f"), X), "label": (("t",), Y)}),
    ],
    ids=["table", "dask table", "dictionary", "xarray dataset"],
)
def test_what_has_its_targets_in_it_says_how_to_leave_them_out(data) -> None:
    with pytest.raises(ModelError, match=r"label are given to the module.*with features="):
        dask_nn.predict(network(), data())


def test_a_name_instead_of_a_list_of_features_is_refused() -> None:
    for call in (dask_nn.predict, lambda *a, **k: dask_nn.evaluate(*a, "label", **k)):
        with pytest.raises(ConfigurationError, match=r"write features=\['abc'\]"):
            call(network(), table(), features="abc")
