from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dask_nn.errors import ConfigurationError, DataError, ModelError
from dask_nn.inference import predict
from dask_nn.metrics.forward import one_thread_per_task

if TYPE_CHECKING:
    from distributed import Client

pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")


def rows(*shape: int, count: int = 50) -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.PCG64(3)).normal(size=(count, *shape))


def network(num_outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, num_outputs)
    )


def expected(model: nn.Module, X: np.ndarray[Any, Any], output: str) -> np.ndarray[Any, Any]:
    model.eval()
    with torch.no_grad():
        raw = model(torch.from_numpy(X).float())
    model.train()
    if output == "raw":
        return raw.numpy()
    if raw.shape[1] == 1:
        return (raw.sigmoid() if output == "proba" else (raw[:, 0] > 0).long()).numpy()
    return (raw.softmax(dim=1) if output == "proba" else raw.argmax(dim=1)).numpy()


def scale(batch: Tensor) -> Tensor:
    return batch.float().div_(255)


@pytest.mark.parametrize("output", ["label", "proba", "raw"])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_numpy_and_dask_give_what_the_model_gives(output: Any, num_outputs: int) -> None:
    X, model = rows(6), network(num_outputs)
    want = expected(model, X, output)
    got = predict(model, X, output=output, batch_size=7)
    assert isinstance(got, np.ndarray)
    lazy = predict(model, da.from_array(X, chunks=(20, 4)), output=output, batch_size=7)
    assert lazy.chunks == ((20, 20, 10), *((n,) for n in want.shape[1:]))
    assert lazy.dtype == lazy._meta.dtype == got.dtype == want.dtype
    for found in (got, lazy.compute(scheduler="threads")):
        assert found.shape == want.shape
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    assert model.training


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def fail(block: Any) -> Any:
        raise AssertionError

    X = da.ones((10, 6), chunks=5).map_blocks(fail, dtype=float, meta=np.empty((0, 6)))
    assert predict(network(), X, output="raw").shape == (10, 3)


def test_unknown_chunk_sizes_stay_unknown_and_empty_blocks_stay_empty() -> None:
    X = da.from_array(rows(6), chunks=(10, 6))
    kept = X[da.from_array(np.arange(50) >= 20, chunks=10)]
    lazy = predict(network(), kept, output="raw")
    assert np.isnan(lazy.chunks[0]).all()
    assert lazy.shape[1] == 3
    found = lazy.compute(scheduler="sync")
    np.testing.assert_allclose(found, expected(network(), rows(6)[20:], "raw"), rtol=1e-5)


def test_no_rows_give_no_rows() -> None:
    assert predict(network(), np.empty((0, 6))).shape == (0,)


def test_batches_are_bounded_and_stored_bytes_reach_the_transform() -> None:
    seen: list[tuple[int, torch.dtype]] = []

    def watched(batch: Tensor) -> Tensor:
        seen.append((len(batch), batch.dtype))
        return scale(batch)

    X = np.arange(300, dtype=np.uint8).reshape(50, 6)
    X.flags.writeable = False
    predict(network(), X, batch_size=20, transform=watched)
    assert seen[1:] == [(20, torch.uint8), (20, torch.uint8), (10, torch.uint8)]


def test_transforms_in_place_leave_the_data_alone() -> None:
    X = rows(6).astype(np.float32)
    before = X.copy()
    predict(network(), X, transform=lambda batch: batch.zero_())
    np.testing.assert_array_equal(X, before)


def test_floating_rows_take_the_models_type() -> None:
    assert predict(network().double(), rows(6).astype("float32"), output="raw").dtype == np.float64
    assert predict(network().bfloat16(), rows(6), output="raw").dtype == np.float32


def test_images_and_maps_keep_their_axes() -> None:
    model = nn.Conv2d(1, 4, 3)
    X = da.from_array(rows(1, 8, 8, count=9), chunks=(4, 1, 3, 8))
    assert predict(model, X, output="proba").shape == (9, 4, 6, 6)
    labels = predict(model, X)
    assert labels.shape == (9, 6, 6)
    assert labels.compute(scheduler="sync").shape == (9, 6, 6)


def test_tasks_of_a_thread_pool_use_one_core_each() -> None:
    seen = []

    def task() -> None:
        torch.set_num_threads(2)
        with one_thread_per_task():
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=task)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [1, 2]


class Counted(nn.Module):
    """Writes a file each time that it is unpickled."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Path(self.folder, f"{os.getpid()}-{uuid4()}").touch()

    def forward(self, batch: Tensor) -> Tensor:
        found: Tensor = self.linear(batch)
        return found


def test_a_worker_receives_the_model_once(client: Client, tmp_path: Any) -> None:
    X = da.from_array(rows(6), chunks=(3, 6))
    lazy = predict(Counted(str(tmp_path)), X, output="raw")
    mine = f"{os.getpid()}-"
    before = list(tmp_path.iterdir())
    assert lazy.compute().shape == (50, 3)
    made = [path for path in tmp_path.iterdir() if path not in before]
    assert not any(path.name.startswith(mine) for path in made)
    workers = [path.name.split("-")[0] for path in made]
    assert len(workers) == len(set(workers)) <= 2


def test_predictions_stay_a_collection_on_the_cluster(client: Client) -> None:
    X = da.from_array(rows(6), chunks=(20, 6))
    wrong = (predict(network(), X) != 1).sum()
    assert int(wrong.compute()) == int((expected(network(), rows(6), "label") != 1).sum())


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Odd(nn.Module):
    def forward(self, batch: Tensor) -> Any:
        return {"rows": batch, "note": "text"}


class Mean(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        return batch.mean()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Locked(), ModelError, "module.lock"),
        (Odd(), ModelError, "returned str"),
        (Mean(), ModelError, r"shape \(\) for 2 rows"),
        (nn.Linear(5, 2), ModelError, r"rows of shape \(6,\) and type float64"),
        ("model", ModelError, "must be a torch.nn.Module"),
    ],
)
def test_models_that_cannot_work_are_refused(model: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        predict(model, da.from_array(rows(6), chunks=(20, 6)))


@pytest.mark.parametrize(
    ("X", "options", "error", "message"),
    [
        (rows(6), {"output": "logits"}, ConfigurationError, "'label', 'proba', 'raw'"),
        (rows(6), {"batch_size": 0}, ConfigurationError, "must be positive, got 0"),
        (rows(6), {"batch_size": 1.5}, ConfigurationError, "must be an integer"),
        (np.zeros((3, 6), dtype=np.uint8), {}, ModelError, "with transform="),
        (np.array(["a", "b"]), {}, DataError, "expected numbers"),
        (rows(6).astype(np.longdouble), {}, DataError, "X has dtype .*at most 64 bits"),
        (np.float64(1), {}, DataError, "at least one axis"),
        (rows(6), {"transform": threading.Lock()}, ModelError, "module cannot process"),
    ],
)
def test_bad_input_is_refused(X: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        predict(network(), X, **options)


@pytest.mark.parametrize("columns", [8, 2], ids=["one chunk", "four chunks"])
def test_columns_whose_number_is_unknown_are_counted(columns: int) -> None:
    wide, model = rows(8), network()
    lazy = da.from_array(wide, chunks=(20, columns))
    chosen = lazy[:, da.from_array([True] * 6 + [False] * 2, chunks=columns)]
    assert np.isnan(chosen.shape[1])
    np.testing.assert_array_equal(
        predict(model, chosen).compute(), expected(model, wide[:, :6], "label")
    )


def test_a_transform_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    def locked(batch: Tensor) -> Tensor:
        with lock:
            return batch

    with pytest.raises(ModelError, match=r"transform \(variable lock\)"):
        predict(network(), da.from_array(rows(6), chunks=(20, 6)), transform=locked)


def test_equal_calls_have_equal_keys() -> None:
    X = da.from_array(rows(6), chunks=(20, 6))
    model = network()
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        assert predict(model, X).name == predict(model, X).name
