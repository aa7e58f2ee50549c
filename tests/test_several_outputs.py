"""Modules with several outputs and targets: metrics and predictions of each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

import dask_nn
from dask_nn.cli.data import write
from dask_nn.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from pathlib import Path

METRICS = {"kind": ["accuracy", "f1"], "size": "mae"}
CHUNKS = (150, 150, 0, 60, 240)


class Named(nn.Module):
    """Returns a dictionary: scores of four kinds, and a size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.size = nn.Linear(20, 4), nn.Linear(20, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return {"kind": self.kind(x), "size": self.size(x)[:, 0]}


class Placed(Named):
    """Returns the same as a tuple."""

    def forward(self, x: torch.Tensor) -> Any:
        return tuple(super().forward(x).values())


def named_loss(output: Any, target: Any) -> torch.Tensor:
    size = F.mse_loss(output["size"], target["size"])
    return F.cross_entropy(output["kind"], target["kind"]) + size


def placed_loss(output: Any, target: Any) -> torch.Tensor:
    return named_loss({"kind": output[0], "size": output[1]}, target)


@pytest.fixture
def targets(blobs) -> dict[str, np.ndarray]:
    return {"kind": blobs.y, "size": blobs.X.sum(axis=1)}


def lazily(array: np.ndarray) -> da.Array:
    return da.from_array(array, chunks=(CHUNKS, *array.shape[1:]))


def fit(model: nn.Module, X: Any, y: Any, **options: Any) -> Any:
    defaults = {
        "loss": named_loss,
        "optimizer": partial(SGD, lr=0.01),
        "epochs": 2,
        "batch_size": 60,
        "metrics": METRICS,
        "strategy": dask_nn.Synchronous(shards=4, threads_per_rank=1),
    }
    return dask_nn.train(model, X, y, **(defaults | options))


def by_hand(model: nn.Module, X: np.ndarray, targets: dict[str, np.ndarray]) -> dict[str, float]:
    with torch.no_grad():
        output = Named.forward(model, torch.from_numpy(X))
    right = output["kind"].argmax(dim=1).numpy() == targets["kind"]
    return {
        "kind_accuracy": right.mean(),
        "size_mae": np.abs(output["size"].numpy() - targets["size"]).mean(),
    }


@pytest.mark.parametrize("engine", ["spmd", "graph"])
def test_training_and_validation_give_the_metrics_of_each_output(
    engine, client, blobs, targets
) -> None:
    X, y = lazily(blobs.X), {name: lazily(array) for name, array in targets.items()}
    result = fit(Named(), X, y, validation=(X, y), engine=engine)
    record = result.history[-1]
    assert {name for name in record if name.startswith(("kind", "size"))} == {
        "kind_accuracy",
        "kind_f1",
        "size_mae",
    }
    for name, value in by_hand(result.model, blobs.X, targets).items():
        assert record[f"val_{name}"] == pytest.approx(value, rel=1e-5)
    found = dask_nn.evaluate(result.model, X, y, metrics=METRICS, loss=named_loss)
    for name in ("loss", "kind_accuracy", "kind_f1", "size_mae"):
        assert found[name] == pytest.approx(record[f"val_{name}"], rel=1e-5)


def test_a_tuple_meets_the_targets_in_their_order(blobs, targets) -> None:
    named = fit(Named(), blobs.X, targets)
    placed = fit(Placed(), blobs.X, targets, loss=placed_loss)
    assert placed.weights_sha256 == named.weights_sha256
    for name in ("kind_accuracy", "kind_f1", "size_mae"):
        assert placed.history[-1][name] == named.history[-1][name]
    scores = dask_nn.evaluate(placed.model, blobs.X, targets, metrics=METRICS)
    assert scores == pytest.approx(scores | by_hand(placed.model, blobs.X, targets), rel=1e-5)


def test_predictions_are_shaped_as_the_outputs(blobs, client) -> None:
    model, X = Named(), lazily(blobs.X)
    output = {"kind": "label", "size": "raw"}
    here = dask_nn.predict(model, blobs.X, output=output)
    lazy = dask_nn.predict(model, X, output=output)
    assert list(lazy) == ["kind", "size"]
    assert lazy["kind"].chunks == (CHUNKS,)
    assert (lazy["kind"].dtype, lazy["size"].dtype) == (np.int64, np.float32)
    kinds, sizes = dask.compute(lazy["kind"], lazy["size"])
    np.testing.assert_array_equal(kinds, here["kind"])
    np.testing.assert_allclose(sizes, here["size"], rtol=1e-5)
    proba, _ = dask_nn.predict(Placed(), X, output="proba")
    assert proba.shape == (600, 4)
    np.testing.assert_array_equal(proba.compute().argmax(axis=1), kinds)


def test_a_mapping_leaves_out_what_it_does_not_name(blobs) -> None:
    assert list(dask_nn.predict(Named(), blobs.X, output={"size": "raw"})) == ["size"]


def test_outputs_computed_together_run_the_model_once(blobs, tmp_path) -> None:
    class Counting(Named):
        def forward(self, x: torch.Tensor) -> Any:
            with (tmp_path / "rows").open("ab") as file:
                file.write(b"." * len(x))
            return super().forward(x)

    lazy = dask_nn.predict(Counting(), lazily(blobs.X), output="raw")
    (tmp_path / "rows").unlink()  # of the probe
    dask.compute(*lazy.values(), scheduler="sync")
    assert (tmp_path / "rows").stat().st_size == 600


def test_a_table_gives_series_with_its_index(blobs) -> None:
    table = pd.DataFrame(blobs.X, index=np.arange(600) * 3)
    lazy = dask_nn.predict(Named(), dd.from_pandas(table, npartitions=3))
    found = lazy["kind"].compute()
    assert found.name == "kind"
    np.testing.assert_array_equal(found.index, table.index)
    np.testing.assert_array_equal(found, dask_nn.predict(Named(), blobs.X)["kind"])


def test_several_predictions_are_written_to_one_store(blobs, tmp_path: Path) -> None:
    output = {"kind": "label", "size": "raw"}
    here = dask_nn.predict(Named(), blobs.X, output=output)
    lazy = dask_nn.predict(Named(), da.from_array(blobs.X, chunks=(100, 20)), output=output)
    write(lazy, "zarr", str(tmp_path / "found.zarr"))
    group = zarr.open_group(tmp_path / "found.zarr", mode="r")
    write(lazy, "parquet", str(tmp_path / "found.parquet"))
    table = pd.read_parquet(tmp_path / "found.parquet")
    for name, values in here.items():
        np.testing.assert_allclose(group[name][:], values, rtol=1e-5)
        np.testing.assert_allclose(table[name], values, rtol=1e-5)
    with pytest.raises(ConfigurationError, match="one array, but the model gives kind, size"):
        write(lazy, "npy", str(tmp_path / "found.npy"))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["accuracy"], r"several outputs or targets \(kind, size\).*metrics={'kind'"),
        ({"kinds": "accuracy"}, "'kinds'.*did you mean 'kind'"),
        ({"kind": "acuracy"}, "did you mean 'accuracy'"),
    ],
)
def test_metrics_that_do_not_fit_the_outputs_are_refused(metrics, message, blobs, targets) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(Named(), blobs.X, targets, metrics=metrics)
    with pytest.raises(ConfigurationError, match=message):
        dask_nn.evaluate(Named(), blobs.X, targets, metrics=metrics)


def test_a_label_outside_its_output_is_named(blobs, targets) -> None:
    targets["kind"] = targets["kind"] + 1
    with pytest.raises(DataError, match=r"y\['kind'\] has labels from 1 to 4.*0 to 3"):
        dask_nn.evaluate(Named(), blobs.X, targets, metrics=METRICS)


def test_output_must_name_what_the_module_returns(blobs) -> None:
    with pytest.raises(ConfigurationError, match=r"'kinds'.*returns kind, size"):
        dask_nn.predict(Named(), blobs.X, output={"kinds": "raw"})
    with pytest.raises(ConfigurationError, match="a mapping, but the module returns tuple"):
        dask_nn.predict(Placed(), blobs.X, output={"kind": "raw"})
