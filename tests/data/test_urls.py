from __future__ import annotations

import itertools
import os
import shutil
import threading

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


@pytest.mark.parametrize("layout", [X, np.asfortranarray(X)], ids=["rows", "columns"])
def test_a_numpy_file_gives_its_rows_in_either_layout(layout, tmp_path):
    np.save(tmp_path / "X.npy", layout)
    found = open_data(f"npy:{tmp_path / 'X.npy'}", block_size_bytes=60)
    np.testing.assert_array_equal(found.compute(), X)


def test_a_numpy_file_replaced_at_any_moment_is_read_whole_or_refused(tmp_path):
    path = tmp_path / "X.npy"
    np.save(path, X)
    np.save(tmp_path / "shorter.npy", X[:7])
    shutil.copy(path, tmp_path / "longer.npy")
    found = open_data(f"npy:{path}")
    ended = threading.Event()

    def replace_over_and_over() -> None:
        for source in itertools.cycle(["shorter.npy", "longer.npy"]):
            if ended.is_set():
                return
            os.link(tmp_path / source, tmp_path / "next.npy")
            (tmp_path / "next.npy").rename(path)
            (tmp_path / "next.npy").unlink(missing_ok=True)

    thread = threading.Thread(target=replace_over_and_over)
    thread.start()
    refused = []
    try:
        for _ in range(500):
            try:
                np.testing.assert_array_equal(found.compute(scheduler="sync"), X)
            except ValueError as error:
                refused.append(str(error))
    finally:
        ended.set()
        thread.join()
    assert 0 < len(refused) < 500
    assert all("has changed since it was opened: shape (7, 5)" in one for one in refused)


def test_a_numpy_file_that_was_cut_off_is_refused(tmp_path):
    np.save(tmp_path / "X.npy", X)
    found = open_data(f"npy:{tmp_path / 'X.npy'}")
    os.truncate(tmp_path / "X.npy", 200)
    with pytest.raises(ValueError, match=r"X\.npy has fewer rows than its header says"):
        found.compute()


@pytest.mark.parametrize("name", ["X.h5", "X.npy"])
def test_a_file_whose_type_changes_is_refused(name, tmp_path):
    def save(values) -> None:
        (tmp_path / name).unlink(missing_ok=True)
        if name == "X.npy":
            np.save(tmp_path / name, values)
        else:
            with h5py.File(tmp_path / name, "w") as file:
                file["X"] = values

    save(X)
    found = open_data(f"npy:{tmp_path / name}" if name == "X.npy" else f"hdf5:{tmp_path / name}#X")
    save(X.astype("f8"))
    with pytest.raises(ValueError, match=r"type float64, expected .* and float32"):
        found.compute()


@pytest.mark.parametrize("other", [np.ones((3, 4), "f4"), np.ones((3, 3), "f8")])
def test_files_of_one_pattern_must_hold_equal_rows(tmp_path, other):
    np.save(tmp_path / "1.npy", np.ones((5, 3), "f4"))
    np.save(tmp_path / "2.npy", other)
    with pytest.raises(
        DataError, match=r"2.npy holds rows of .* expected \(3,\) and float32 as in"
    ):
        open_data(f"npy:{tmp_path}/*.npy")


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
