"""The same data in any collection, held or streamed, gives the same bits."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from dask.delayed import delayed
from torch import nn

import dask_nn
from dask_nn.data.memory import Room
from dask_nn.errors import DataError, RankFailed

ROWS = 100


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(20, 4)

    def forward(self, x):
        return self.layer(x)


class Data(NamedTuple):
    X: np.ndarray
    y: np.ndarray
    store: str


@pytest.fixture
def data(blobs, tmp_path) -> Data:
    group = zarr.open_group(tmp_path / "blobs.zarr", mode="w")
    group.create_array("X", data=blobs.X, chunks=(ROWS, 20))
    group.create_array("y", data=blobs.y, chunks=(600,))
    return Data(blobs.X, blobs.y, str(tmp_path / "blobs.zarr"))


class Samples(torch.utils.data.Dataset):
    def __init__(self, data: Data) -> None:
        self.X, self.y = data.X, data.y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int):
        return self.X[index], int(self.y[index])


def table(data: Data) -> dd.DataFrame:
    names = [f"f{number}" for number in range(20)]
    return dd.from_pandas(pd.DataFrame(data.X, columns=names).assign(label=data.y), npartitions=6)


def slices(data: Data) -> list:
    return [delayed((data.X[s : s + ROWS], data.y[s : s + ROWS])) for s in range(0, 600, ROWS)]


COLLECTIONS = {
    "table": lambda d: (table(d), "label"),
    "delayed": lambda d: (slices(d),),
    "zarr": lambda d: (
        da.from_zarr(d.store, component="X"),
        da.from_zarr(d.store, component="y"),
    ),
    "zarr and an array": lambda d: (da.from_zarr(d.store, component="X"), d.y),
    "xarray": lambda d: (
        xr.DataArray(da.from_array(d.X, chunks=(ROWS, 20)), dims=("t", "f")),
        xr.DataArray(d.y, dims=("t",)),
    ),
    "dataset": lambda d: (Samples(d),),
}


def train(*inputs, model=Linear, **options) -> dask_nn.TrainingResult:
    defaults = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "epochs": 2,
        "batch_size": 32,
        "window": 2,
        "metrics": ["accuracy"],
        "strategy": dask_nn.Synchronous(shards=4, threads_per_rank=1),
    }
    with dask.config.set({"dask-nn.block-size": ROWS * 88}):
        return dask_nn.train(model(), *inputs, **(defaults | options))


def sha256(result: dask_nn.TrainingResult) -> str:
    values = result.model.state_dict().values()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


@pytest.fixture
def expected(data) -> str:
    return sha256(
        train(da.from_array(data.X, chunks=(ROWS, 20)), da.from_array(data.y, chunks=ROWS))
    )


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("kind", COLLECTIONS)
def test_bits_in_this_process(kind, memory, data, expected):
    assert sha256(train(*COLLECTIONS[kind](data), memory=memory)) == expected


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("kind", COLLECTIONS)
def test_bits_on_a_cluster(kind, memory, data, expected, client):
    result = train(*COLLECTIONS[kind](data), memory=memory, client=client)
    assert sha256(result) == expected
    assert result.run.streamed == (memory == "stream")


@pytest.mark.parametrize("kind", ["delayed", "zarr"])
def test_bits_of_a_stream_with_the_graph_engine(kind, data, expected, client):
    assert sha256(train(*COLLECTIONS[kind](data), memory="stream", engine="graph")) == expected


def test_a_stream_that_needs_a_mean_over_everything(data, client):
    X = da.from_zarr(data.store, component="X")
    scaled = (X - X.mean(axis=0)) / X.std(axis=0)
    streamed, held = (
        train(scaled, data.y, memory=memory, validation=(scaled, data.y))
        for memory in ("stream", "resident")
    )
    assert sha256(streamed) == sha256(held)
    assert streamed.history[-1]["val_loss"] == held.history[-1]["val_loss"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(20, 4)

    def forward(self, left, right):
        return self.layer(torch.cat([left, right], dim=1))


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_module_of_two_inputs(memory, data, expected, client):
    X = da.from_zarr(data.store, component="X")
    inputs = {"left": X[:, :5], "right": X[:, 5:]}
    result = train(inputs, data.y, model=TwoInputs, memory=memory)
    assert sha256(result) == expected
    scores = dask_nn.evaluate(result.model, inputs, da.from_array(data.y, chunks=ROWS))
    labels = dask_nn.predict(result.model, inputs).compute()
    assert scores["accuracy"] == pytest.approx((labels == data.y).mean())


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.size = nn.Linear(20, 4), nn.Linear(20, 1)

    def forward(self, x):
        return {"kind": self.kind(x), "size": self.size(x)[:, 0]}


def both(output, target):
    return nn.functional.cross_entropy(output["kind"], target["kind"]) + nn.functional.mse_loss(
        output["size"], target["size"]
    )


def test_a_module_of_two_outputs(data, client):
    X = da.from_zarr(data.store, component="X")
    targets = {"kind": data.y, "size": data.X[:, 0]}
    results = [
        train(
            X,
            targets,
            model=TwoOutputs,
            loss=both,
            optimizer=partial(torch.optim.SGD, lr=1e-3),
            metrics=(),
            memory=memory,
            validation=(X, targets),
        )
        for memory in ("resident", "stream")
    ]
    assert sha256(results[0]) == sha256(results[1])
    assert results[0].history[-1]["val_loss"] < results[0].history[0]["loss"]
    found = dask_nn.evaluate(results[0].model, X, targets, loss=both, metrics=())
    assert found["loss"] == pytest.approx(results[0].history[-1]["val_loss"], rel=1e-5)


def failing(number: int, which: int) -> tuple[np.ndarray, np.ndarray]:
    if number == which:
        message = "bad sector"
        raise RuntimeError(message)
    return np.ones((ROWS, 20), "f4"), np.zeros(ROWS, "i8")


def failing_array(which: int) -> tuple[da.Array, np.ndarray]:
    parts = [delayed(failing, pure=False)(number, which)[0] for number in range(6)]
    X = da.concatenate([da.from_delayed(part, (ROWS, 20), "f4") for part in parts])
    return X, np.zeros(6 * ROWS, "i8")


def failing_frame(which: int) -> tuple[dd.DataFrame, str]:
    def read(number: int) -> pd.DataFrame:
        X, y = failing(number, which)
        return pd.DataFrame(X, columns=[f"x{column}" for column in range(20)]).assign(label=y)

    parts = [delayed(read, pure=False)(number) for number in range(6)]
    return dd.from_delayed(parts, meta=read(7), verify_meta=False), "label"


def failing_parts(which: int) -> tuple[list[Any]]:
    return ([delayed(failing, pure=False)(number, which) for number in range(6)],)


@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("memory", ["auto", "resident", "stream"])
@pytest.mark.parametrize("form", [failing_array, failing_frame, failing_parts])
@pytest.mark.parametrize("engine", ["spmd", "graph", "here"])
def test_a_partition_that_raises_is_named(form, memory, which, engine, request):
    here = engine == "here"
    client = None if here else request.getfixturevalue("client")
    options = {} if here else {"engine": engine}
    where = "" if here else r" on worker tcp://\S+"
    text = rf"block {which} of .* could not be computed{where}: RuntimeError: bad sector"
    if engine == "graph":  # of a stream, while it trains
        text += rf"|tcp://\S+ failed .*block {which} of X could not be computed: RuntimeError: bad"
    with pytest.raises((DataError, RankFailed), match=rf"(?s)({text}).*in failing\n"):
        train(*form(which), memory=memory, client=client, **options)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_missing_targets_are_refused_before_the_start(memory, data, client):
    y = data.X[:, 0].copy()
    y[321] = np.nan
    with pytest.raises(DataError, match=r"missing .NaN.*row 321"):
        train(
            da.from_zarr(data.store, component="X"),
            y,
            memory=memory,
            loss=nn.MSELoss(),
            metrics=(),
        )


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_blocks_of_another_width_are_named(memory, data, client):
    parts = slices(data)
    parts[3] = delayed((data.X[:ROWS, :19], data.y[:ROWS]))
    with pytest.raises(DataError, match=r"block 3 of X has shape .100, 19."):
        train(parts, memory=memory)


def test_a_stream_of_an_array_in_this_process_is_refused(data):
    with pytest.raises(DataError, match=r"lie in this process"):
        train(data.X, data.y, memory="stream")


def test_a_stream_of_what_is_persisted_is_refused(data, client):
    X = da.from_zarr(data.store, component="X").persist()
    y = da.from_zarr(data.store, component="y").persist()
    with pytest.raises(DataError, match=r"before persist"):
        train(X, y, memory="stream")


def persisted_targets(X: da.Array, y: da.Array) -> tuple[da.Array, da.Array]:
    return X, y.persist()


def persisted_scale(X: da.Array, y: da.Array) -> tuple[da.Array, da.Array]:
    return X * da.ones(20, dtype="f4").persist(), y


def persisted_below(X: da.Array, y: da.Array) -> tuple[da.Array, da.Array]:
    return X.persist() + np.float32(0), y.persist()


@pytest.mark.parametrize("form", [persisted_targets, persisted_scale, persisted_below])
def test_a_stream_of_which_something_is_persisted(form, data, client, expected, monkeypatch):
    inputs = form(
        da.from_zarr(data.store, component="X"),
        da.from_zarr(data.store, component="y").rechunk(ROWS),
    )
    monkeypatch.setattr("dask_nn.data.reader.SHARED_BYTES", 1)
    result = train(*inputs, memory="stream")
    assert result.run.streamed
    assert sha256(result) == expected


def test_what_does_not_fit_is_streamed_and_said(data, client, monkeypatch):
    def none_left(*_):
        return Room(held_bytes=1000, worker_bytes=1 << 30, num_workers=2)

    monkeypatch.setattr("dask_nn.controller.data_sets._room", none_left)
    X, y = da.from_zarr(data.store, component="X"), da.from_array(data.y, chunks=ROWS)
    for targets in (y, y.persist()):
        result = train(X, targets)
        assert result.run.streamed
        (event,) = [event for event in result.events if event.name == "streaming"]
        assert event.details["blocks"] == 6
        assert not event.details["asked"]
    assert not train(X.persist(), y.persist()).run.streamed


class Remover(dask_nn.Callback):
    """Takes a file away once an epoch is over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_epoch_end(self, record):
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def save_npy(path: Path, X: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, X)


def save_zarr(path: Path, X: np.ndarray) -> None:
    zarr.open_group(path, mode="w").create_array("X", data=X, chunks=(ROWS, 20))


SAVED = {
    "npy": (save_npy, lambda path: dask_nn.open_data(f"npy:{path}", block_size_bytes=ROWS * 80)),
    "zarr": (save_zarr, lambda path: dask_nn.open_data(f"zarr:{path}#X")),
    "zarr of the user's": (save_zarr, lambda path: da.from_zarr(str(path), component="X")),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_source_that_vanishes_ends_the_run_and_leaves_the_checkpoint(
    kind, data, client, tmp_path
):
    path = tmp_path / "source"
    save, read = SAVED[kind]
    save(path, data.X)
    options = {
        "memory": "stream",
        "epochs": 40,
        "checkpoint": str(tmp_path / "checkpoints"),
    }
    X = read(path)
    text = r"could not be computed on worker tcp.*after 4 attempts.*source"
    with pytest.raises(RankFailed, match=text):
        train(X, data.y, callbacks=[Remover(path)], **options)
    save(path, data.X)
    again = train(X, data.y, resume=True, **options)
    assert "resumed" in [event.name for event in again.events]
    assert sha256(again) == sha256(train(X, data.y, memory="stream", epochs=40))


@pytest.mark.parametrize("kind", SAVED)
def test_a_source_that_grows_shorter_is_refused_by_block(kind, data, client, tmp_path):
    path = tmp_path / "source"
    save, read = SAVED[kind]
    save(path, data.X)

    class Shortener(dask_nn.Callback):
        def on_epoch_end(self, record):
            if path.is_dir():
                zarr.open_group(path)["X"].resize((550, 20))
            else:
                save(tmp_path / "shorter", data.X[:550])
                (tmp_path / "shorter").rename(path)

    with pytest.raises(
        RankFailed, match=r"block \d of X could not .*has changed since.*\(550, 20\)"
    ):
        train(read(path), data.y, memory="stream", epochs=40, callbacks=[Shortener()])


def test_a_store_that_leaves_out_empty_chunks_reads_as_zeros(data, tmp_path):
    X = data.X.copy()
    X[ROWS : 2 * ROWS] = 0
    save_zarr(tmp_path / "sparse", X)
    assert not (tmp_path / "sparse" / "X" / "c" / "1" / "0").exists()
    found = SAVED["zarr"][1](tmp_path / "sparse")
    np.testing.assert_array_equal(found.compute(), X)
    assert train(found, data.y, memory="stream").run.streamed


def test_a_block_larger_than_a_worker_is_read_in_slices(data, tmp_path, monkeypatch):
    np.save(tmp_path / "X.npy", data.X)
    X = dask_nn.open_data(f"npy:{tmp_path / 'X.npy'}")
    assert X.numblocks == (1, 1)
    monkeypatch.setattr(Room, "block_bytes", property(lambda _: ROWS * 80))
    result = train(X, data.y, memory="stream")
    assert result.run.num_blocks == 6
    with pytest.raises(DataError, match=r"block 0 of X has .* computed as a whole"):
        train(X + 1, data.y, memory="stream")
