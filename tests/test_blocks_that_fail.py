"""evaluate and predict name the block and worker of what goes wrong, and try reads again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from dask.delayed import delayed
from dask.utils import ensure_dict
from distributed import Client, LocalCluster
from distributed.client import futures_of
from torch import nn

import dask_nn
from dask_nn import evaluation, inference
from dask_nn.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.random.Generator(np.random.PCG64(2)).normal(size=(60, 5)).astype(np.float32)
Y = np.arange(60) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def predicted(X: Any, y: Any = None) -> Any:
    found = dask_nn.predict(network(), X)
    return np.concatenate(dask.compute(*found)) if isinstance(found, list) else found.compute()


def evaluated(X: Any, y: Any = Y) -> Any:
    return dask_nn.evaluate(network(), X, y, metrics=["accuracy"])


both = pytest.mark.parametrize("call", [predicted, evaluated])


def blocks(function: Callable[..., Any], *arguments: Any) -> da.Array:
    """Make an array of six blocks by a function of their number."""
    parts = [delayed(function, pure=False)(number, *arguments) for number in range(6)]
    like = np.empty((0, 5), np.float32)
    return da.concatenate([da.from_delayed(part, (10, 5), meta=like) for part in parts])


def rows_of(number: int) -> np.ndarray[Any, Any]:
    return X[10 * number : 10 * (number + 1)]


def failing(number: int) -> np.ndarray[Any, Any]:
    if number == 3:
        message = "bad sector"
        raise RuntimeError(message)
    return rows_of(number)


@both
def test_a_partition_that_raises_is_named_with_its_worker_and_traceback(call, client) -> None:
    text = r"block 3 could not be computed on worker tcp://.*: RuntimeError: bad sector"
    with pytest.raises(DataError, match=text) as caught:
        call(blocks(failing))
    assert "raise RuntimeError(message)" in str(caught.value)
    assert "in failing" in str(caught.value)


@both
def test_a_partition_of_delayed_is_named(call, client) -> None:
    parts = [delayed(failing)(number) for number in range(6)]
    y = [delayed(Y[10 * number : 10 * (number + 1)]) for number in range(6)]
    with pytest.raises(DataError, match=r"block 3 could not be computed on worker"):
        call(parts, y)


@both
@pytest.mark.usefixtures("_in_this_thread")
def test_without_a_cluster_the_cause_is_kept(call) -> None:
    with pytest.raises(DataError, match=r"block 3 could not be computed: RuntimeError") as caught:
        call(blocks(failing))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.fixture
def _in_this_thread():
    with dask.config.set(scheduler="sync"):
        yield


def narrow(number: int) -> np.ndarray[Any, Any]:
    return rows_of(number)[:, :4] if number == 3 else rows_of(number)


@both
def test_a_block_of_another_width_is_named(call, client) -> None:
    text = r"block 3 could .* on worker tcp.*: X has shape \(10, 4\), expected \(10, 5\)"
    with pytest.raises(DataError, match=text):
        call(blocks(narrow))


def test_inputs_of_unknown_lengths_are_named_where_they_differ():
    lazy = blocks(rows_of)
    y = da.from_array(Y, chunks=10)[da.from_array(np.arange(60) != 33, chunks=10)]
    with pytest.raises(DataError, match=r"block 3 could .*but X has 10, y has 9"):
        evaluated(lazy[da.from_array(np.ones(60, bool), chunks=10)], y)


def short(number: int) -> np.ndarray[Any, Any]:
    return rows_of(number)[:5] if number == 4 else rows_of(number)


@both
@pytest.mark.usefixtures("_in_this_thread")
def test_a_block_of_fewer_rows_than_its_chunk_is_refused(call) -> None:
    text = r"block 4 could not be computed: X has shape \(5, 5\), expected \(10, 5\)"
    with pytest.raises(DataError, match=text):
        call(blocks(short))


@both
@pytest.mark.usefixtures("_in_this_thread")
def test_a_file_that_has_grown_shorter_is_refused_by_block(call, tmp_path) -> None:
    np.save(tmp_path / "X.npy", X)
    lazy = dask_nn.open_data(f"npy:{tmp_path / 'X.npy'}", block_size_bytes=200)
    np.save(tmp_path / "X.npy", X[:45])
    with pytest.raises(DataError, match=r"block \d could not be computed: .*expected \(60, 5\)"):
        call(lazy)


def unsteady(number: int, folder: str, times: int) -> np.ndarray[Any, Any]:
    """Fail some times in block 2, as a store may do for a moment."""
    tried = list(Path(folder).glob(f"{number}-*"))
    Path(folder, f"{number}-{len(tried)}").touch()
    if number == 2 and len(tried) < times:
        message = "the store does not answer"
        raise OSError(message)
    return rows_of(number)


def fails_each_second_time(number: int, folder: str) -> np.ndarray[Any, Any]:
    """Fail in block 0 at the first, third, ... attempt."""
    if number == 0:
        tried = len(list(Path(folder).iterdir()))
        Path(folder, f"{tried}").touch()
        if tried % 2 == 0:
            message = "the store does not answer"
            raise OSError(message)
    return rows_of(number)


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inference, evaluation):
        assert len(module.RETRY_PAUSES_S) == 3
        monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))


@both
@pytest.mark.usefixtures("_no_pauses")
def test_a_store_that_fails_for_a_moment_is_asked_again(call, client, tmp_path) -> None:
    found = call(blocks(unsteady, str(tmp_path), 3))
    np.testing.assert_equal(found, call(da.from_array(X, chunks=(10, 5))))
    assert len(list(tmp_path.glob("2-*"))) == 4


@both
@pytest.mark.usefixtures("_no_pauses")
def test_a_store_that_goes_on_failing_is_named(call, client, tmp_path) -> None:
    text = r"block 2 could not be computed on worker .* after 4 attempts: OSError: the store does"
    with pytest.raises(DataError, match=text):
        call(blocks(unsteady, str(tmp_path), 9))


@pytest.mark.parametrize("engine", ["spmd", "graph"])
def test_training_asks_a_store_again_that_fails_for_a_moment(engine, client, tmp_path) -> None:
    """Before it, when blocks are looked at, and in a step."""
    options: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.01),
        "batch_size": 10,
        "memory": "stream",
        "engine": engine,
        "strategy": dask_nn.Synchronous(shards=2),
    }
    expected = dask_nn.train(network(), da.from_array(X, chunks=(10, 5)), Y, **options)
    found = dask_nn.train(network(), blocks(fails_each_second_time, str(tmp_path)), Y, **options)
    assert found.weights_sha256 == expected.weights_sha256
    assert len(list(tmp_path.iterdir())) >= 4, "the block was not looked at and then read"


class Fussy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == 7).any():
            message = "seven"
            raise RuntimeError(message)
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_block_that_the_model_cannot_process_is_named(client) -> None:
    rows = X.copy()
    rows[33] = 7
    lazy = da.from_array(rows, chunks=(10, 5))
    text = r"block 3 could not be computed on worker tcp.*: RuntimeError: seven\nTraceback"
    with pytest.raises(ModelError, match=text):
        dask_nn.predict(Fussy(), lazy).compute()
    with pytest.raises(ModelError, match=text):
        dask_nn.evaluate(Fussy(), lazy, Y)


@pytest.mark.parametrize("output", ["float32", "float64"])
def test_targets_that_are_no_numbers_are_refused(output, client) -> None:
    y = X[:, 0].astype(output)
    y[33] = np.nan
    options: dict[str, Any] = {"metrics": ["mse"]}
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    with pytest.raises(DataError, match=r"^y has 1 rows with values that are missing.*row 33;"):
        dask_nn.evaluate(model, X, y, **options)
    with pytest.raises(
        DataError, match=r"block 3 could .* on worker tcp.*: y has 1 rows.*is row 3;"
    ):
        dask_nn.evaluate(model, da.from_array(X, chunks=(10, 5)), y, **options)


def test_weights_that_are_no_numbers_are_refused() -> None:
    weights = np.ones(60)
    weights[5] = np.inf
    with pytest.raises(DataError, match=r"sample_weight has 1 rows.*row 5"):
        dask_nn.evaluate(network(), X, Y, loss=nn.CrossEntropyLoss(), sample_weight=weights)


@pytest.mark.usefixtures("_in_this_thread")
def test_missing_labels_of_a_table_name_the_block() -> None:
    import dask.dataframe as dd

    frame = pd.DataFrame(X, columns=list("abcde"))
    frame["label"] = pd.array([None if row == 33 else 1 for row in range(60)], dtype="Int64")
    with pytest.raises(DataError, match=r"block 3 could not be .*'label'.*first at index 33"):
        dask_nn.evaluate(network(), dd.from_pandas(frame, npartitions=6), "label")


def test_a_block_is_read_and_predicted_by_one_task(tmp_path) -> None:
    np.save(tmp_path / "X.npy", X)
    lazy = dask_nn.open_data(f"npy:{tmp_path / 'X.npy'}", block_size_bytes=200)
    (optimized,) = dask.optimize(dask_nn.predict(network(), lazy))
    tasks = [
        node
        for node in ensure_dict(optimized.dask).values()
        if type(node).__name__ == "Task" and "objects" not in str(node.key)
    ]
    assert len(tasks) == 6


def test_what_persisted_blocks_rest_on_is_kept(client) -> None:
    lazy = da.from_array(X, chunks=(10, 5)).persist()
    found = dask_nn.predict(network(), lazy - lazy.mean(axis=0))
    assert futures_of(found)
    del lazy
    assert found.compute().shape == (60,)


@pytest.fixture(scope="module")
def small_worker(_quiet_dask):
    """Start one worker of little memory."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_block_larger_than_a_worker_is_read_in_slices(small_worker, tmp_path) -> None:
    rows, width = 250_000, 1000  # whole, it would take 1 GB twice
    stored = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", dtype="f4", shape=(rows, width))
    stored[-1] = 1  # the rest are holes: the disk holds little of it
    stored.flush()
    lazy = dask_nn.open_data(f"npy:{tmp_path / 'X.npy'}", block_size_bytes=1 << 40)
    assert lazy.numblocks == (1, 1)
    torch.manual_seed(0)
    model, y = nn.Linear(width, 2), np.zeros(rows, np.int64)
    found = dask_nn.predict(model, lazy, output="raw", batch_size=2048)
    assert found.numblocks[0] > 2
    last = found[-2:].compute()
    with torch.no_grad():
        expected = model(torch.stack([torch.zeros(width), torch.ones(width)]))
    np.testing.assert_allclose(last, expected, rtol=1e-4)
    scores = dask_nn.evaluate(model, lazy, y, batch_size=2048)
    zeros = float(expected[0].argmax() == 0)
    assert scores["accuracy"] == pytest.approx(zeros, abs=1e-5)
    for call in (dask_nn.predict, partial(dask_nn.evaluate, y=y)):
        with pytest.raises(DataError, match=r"block 0 of X has 0.93 GiB.*computed as a whole"):
            call(model, X=lazy + 1)
