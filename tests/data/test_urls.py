from __future__ import annotations

import dask
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr

from dask_nn.data.urls import open_data
from dask_nn.errors import ConfigurationError, DataError

X = np.arange(60, dtype="f4").reshape(12, 5)
Y = np.arange(12)


@pytest.fixture
def folder(tmp_path):
    group = zarr.open_group(tmp_path / "both.zarr", mode="w")
    group.create_array("X", data=X, chunks=(5, 5))
    group.create_array("y", data=Y, chunks=(12,))
    with h5py.File(tmp_path / "both.h5", "w") as file:
        file["X"], file["inner/y"], file["number"] = X, Y, 3
    np.save(tmp_path / "a.npy", X[:7])
    np.save(tmp_path / "b.npy", X[7:])
    pd.DataFrame(X, columns=list("abcde")).to_parquet(tmp_path / "table.parquet")
    return tmp_path


def test_a_group_gives_all_its_arrays_in_their_chunks(folder):
    found = open_data(f"zarr:{folder / 'both.zarr'}")
    assert sorted(found) == ["X", "y"]
    assert found["X"].chunks == ((5, 5, 2), (5,))
    np.testing.assert_array_equal(found["X"].compute(), X)


@pytest.mark.parametrize("url", ["zarr:{}/both.zarr#X", "hdf5:{}/both.h5#X", "npy:{}/*.npy"])
def test_one_array(folder, url):
    found = open_data(url.format(folder), block_size_bytes=60)
    assert found.numblocks[0] > 2
    np.testing.assert_array_equal(found.compute(), X)


def test_an_hdf5_file_gives_its_datasets_by_path_and_no_single_numbers(folder):
    found = open_data(f"hdf5:{folder / 'both.h5'}")
    assert sorted(found) == ["X", "inner/y"]
    np.testing.assert_array_equal(found["inner/y"].compute(), Y)


def test_a_table(folder):
    found = open_data(f"parquet:{folder / 'table.parquet'}")
    assert list(found.columns) == list("abcde")


def test_paths_are_those_of_this_folder_wherever_workers_run(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(folder)
    found = open_data("npy:a.npy")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    np.testing.assert_array_equal(found.compute(), X[:7])


def test_workers_read_by_themselves(folder, client):
    for url in ("hdf5:{}/both.h5#X", "npy:{}/a.npy"):
        found = open_data(url.format(folder))
        graph = dask.utils.ensure_dict(found.__dask_graph__())
        assert len(dask.base.tokenize(graph)) > 0
        np.testing.assert_array_equal(client.compute(found).result(), X[: len(found)])


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("csv:{}/a.csv", ConfigurationError, "must begin with one of zarr:, parquet:"),
        ("zarr:", ConfigurationError, "names no place"),
        ("zarr:{}/none.zarr", DataError, "no such folder"),
        ("zarr:{}/both.zarr#x", DataError, r"no array 'x'.*'X', 'y'"),
        ("parquet:{}/none/*.parquet", DataError, "no such file"),
        ("hdf5:{}/a.npy", DataError, "cannot be read"),
        ("npy:{}/none*.npy", DataError, "fits the pattern"),
        ("npy:{}/table.parquet", DataError, "cannot be read"),
    ],
)
def test_what_is_not_there_is_named(folder, url, kind, message):
    with pytest.raises(kind, match=message):
        open_data(url.format(folder))
