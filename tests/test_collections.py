"""The same data in any collection, held or streamed, gives the same bits."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("memory", ["resident", "stream"])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda c: sum(c) >= 8),
    known=st.booleans(),
    window=st.integers(1, 4),
    shards=st.sampled_from([1, 2, 4, 8]),
)
def test_every_sample_once_per_epoch(memory, lengths, known, window, shards, tmp_path_factory):
    """Counted by the module that sees them, whatever the blocks."""
    folder = tmp_path_factory.mktemp("seen")
    starts = np.cumsum([0, *lengths])
    ids = np.arange(starts[-1], dtype="f4")[:, None]
    parts = [
        da.from_delayed(
            delayed(ids[start : start + rows]),
            (rows if known else np.nan, 1),
            dtype="f4",
            meta=ids[:0],
        )
        for start, rows in zip(starts[:-1], lengths, strict=True)
    ]
    X = da.concatenate(parts, allow_unknown_chunksizes=True)
    train(
        X,
        X[:, 0] * 0,
        model=partial(Recorder, str(folder / "seen")),
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        metrics=(),
        batch_size=8,
        epochs=2,
        window=window,
        strategy=dask_nn.Synchronous(shards=shards, threads_per_rank=1),
        memory=memory,
    )
    seen = np.fromfile(folder / "seen", dtype="f4")
    # What was tried on a few rows before the first step comes first.
    trained = seen[len(seen) - 2 * len(ids) :].reshape(2, -1)
    for epoch in trained:
        np.testing.assert_array_equal(np.sort(epoch), ids[:, 0])


class Recorder(nn.Module):
    """Writes down the rows that it is trained on."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        if self.training:
            with open(self.path, "ab") as file:  # noqa: PTH123 - appended to in place
                file.write(x.detach().numpy().tobytes())
        return self.layer(x)[:, 0]


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_partition_that_raises_is_named(memory, data, client):
    def fail(block, block_info=None):
        if block_info[0]["chunk-location"][0] == 4:
            message = "bad sector"
            raise RuntimeError(message)
        return block

    X = da.map_blocks(fail, da.from_zarr(data.store, component="X"), dtype="f4")
    with pytest.raises((DataError, RankFailed), match=r"block 4.*bad sector"):
        train(X, data.y, memory=memory)


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


def test_blocks_of_another_width_are_named(data, client):
    parts = slices(data)
    parts[3] = delayed((data.X[:ROWS, :19], data.y[:ROWS]))
    with pytest.raises(DataError, match=r"block 3 of X has shape .100, 19."):
        train(parts, memory="stream")


def test_a_stream_of_an_array_in_this_process_is_refused(data):
    with pytest.raises(DataError, match=r"lie in this process"):
        train(data.X, data.y, memory="stream")


def test_a_stream_of_what_is_persisted_is_refused(data, client):
    X = da.from_zarr(data.store, component="X").persist()
    with pytest.raises(DataError, match=r"before persist"):
        train(X + 1, data.y, memory="stream")


class Remover(dask_nn.Callback):
    """Takes a file away once an epoch is over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_epoch_end(self, record):
        self.path.unlink(missing_ok=True)


def test_a_file_that_vanishes_ends_the_run_and_leaves_the_checkpoint(data, client, tmp_path):
    path = tmp_path / "X.npy"
    np.save(path, data.X)
    options = {
        "memory": "stream",
        "epochs": 40,
        "checkpoint": str(tmp_path / "checkpoints"),
    }
    X = dask_nn.open_data(f"npy:{path}", block_size_bytes=ROWS * 80)
    with pytest.raises(RankFailed, match=r"could not be computed on tcp.*after 4 attempts.*X\.npy"):
        train(X, data.y, callbacks=[Remover(path)], **options)
    np.save(path, data.X)
    again = train(X, data.y, resume=True, **options)
    assert "resumed" in [event.name for event in again.events]
    assert sha256(again) == sha256(train(X, data.y, memory="stream", epochs=40))


def test_a_source_that_grows_shorter_is_refused_by_block(data, client, tmp_path):
    path = tmp_path / "X.npy"
    np.save(path, data.X)
    X = dask_nn.open_data(f"npy:{path}", block_size_bytes=ROWS * 80)

    class Shortener(dask_nn.Callback):
        def on_epoch_end(self, record):
            np.save(tmp_path / "shorter.npy", data.X[:550])
            (tmp_path / "shorter.npy").rename(path)

    with pytest.raises(RankFailed, match=r"block \d (gave an array of shape|could not be)"):
        train(X, data.y, memory="stream", epochs=40, callbacks=[Shortener()])


def test_a_block_larger_than_a_worker_is_read_in_slices(data, tmp_path, monkeypatch):
    np.save(tmp_path / "X.npy", data.X)
    X = dask_nn.open_data(f"npy:{tmp_path / 'X.npy'}")
    assert X.numblocks == (1, 1)
    monkeypatch.setattr(Room, "block_bytes", property(lambda _: ROWS * 80))
    result = train(X, data.y, memory="stream")
    assert result.run.num_blocks == 6
    with pytest.raises(DataError, match=r"block 0 of X has .* computed as a whole"):
        train(X + 1, data.y, memory="stream")
