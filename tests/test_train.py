"""What ``train`` gives back, whom it tells, and what it takes."""

from __future__ import annotations

import pickle
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, wait
from torch import nn
from torch.optim import SGD
from torchmetrics.classification import MulticlassAccuracy

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.checkpoints.serialization import weights_sha256
from dask_nn.controller import block_fetch
from dask_nn.errors import TrainingInterrupted

if TYPE_CHECKING:
    from dask_nn.training.result import TrainingResult

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")

TIMES = {"seconds", "samples_per_s"}


def network(inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, 4))


def options(**given: Any) -> dict[str, Any]:
    return {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.05),
        "batch_size": 64,
        "seed": 3,
        "strategy": dask_nn.Synchronous(shards=8, threads_per_rank=1),
    } | given


class Recorder(Callback):
    """Notes every call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_train_start(self, run):
        self.calls.append(("start", run))

    def on_progress(self, progress):
        self.calls.append(("progress", progress))

    def on_epoch_end(self, record):
        self.calls.append(("epoch", record))

    def on_train_end(self, result):
        self.calls.append(("end", result))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture(params=["no cluster", "spmd", "graph"])
def where(request) -> dict[str, Any]:
    """Give the options that say where to train: in this process, or on two workers."""
    if request.param == "no cluster":
        return {}
    return {"client": request.getfixturevalue("threads_client"), "engine": request.param}


def timeless(result: TrainingResult) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in result.history]


def test_the_result_tells_the_story(where, blobs):
    X, y = blobs
    given = network()
    before = pickle.dumps(given.state_dict())
    random_state = torch.get_rng_state()
    recorder = Recorder()
    result = dask_nn.train(
        given,
        X[:500],
        y[:500],
        validation=(X[500:], y[500:]),
        metrics=["accuracy", "f1"],
        epochs=3,
        callbacks=[recorder],
        **options(),
        **where,
    )

    assert pickle.dumps(given.state_dict()) == before
    assert given.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert result.model is not given
    assert not result.model.training
    assert result.weights_sha256 == weights_sha256(result.model.state_dict())

    names = ["epoch", "loss", "accuracy", "f1", "val_loss", "val_accuracy", "val_f1"]
    assert [list(record) for record in result.history] == [[*names, "samples_per_s", "seconds"]] * 3
    assert [record["epoch"] for record in result.history] == [0, 1, 2]
    assert result.history[2]["loss"] < result.history[0]["loss"]
    assert all(np.isfinite(value) for record in result.history for value in record.values())
    last = result.history[-1]
    expected = dask_nn.evaluate(
        result.model, X[500:], y[500:], metrics=["accuracy", "f1"], loss=nn.CrossEntropyLoss()
    )
    assert {f"val_{name}": value for name, value in expected.items()} == pytest.approx(
        {name: last[name] for name in last if name.startswith("val_")}, rel=1e-6
    )

    run = result.run
    assert (run.num_samples, run.num_steps, run.epochs, run.batch_size) == (500, 8, 3, 64)
    assert (run.engine, run.shards, run.threads_per_rank) == (where.get("engine", "spmd"), 8, 1)
    assert run.num_workers == (2 if where else 0)
    assert result.steps == 24
    assert np.isfinite(result.start_s)
    assert result.start_s > 0

    assert recorder.names[0] == "start"
    assert recorder.names[-1] == "end"
    assert recorder.names.count("epoch") == 3
    assert recorder.calls[0][1] == run
    assert [record for name, record in recorder.calls if name == "epoch"] == result.history
    assert recorder.calls[-1][1] is result

    text = result.summary()
    assert "Sequential: 3 of 3 epochs, 24 steps of 64 samples" in text
    assert "8 shards" in text
    assert "val_accuracy" in text
    assert result.weights_sha256 in text
    assert len(text.splitlines()) == 7


def test_results_travel(blobs):
    result = dask_nn.train(network(), *blobs, **options())
    found = pickle.loads(pickle.dumps(result))
    assert found.weights_sha256 == result.weights_sha256
    assert found.history == result.history


def test_events_name_the_first_step_and_the_epochs(threads_client, blobs):
    result = dask_nn.train(network(), *blobs, epochs=2, **options())
    assert [event.name for event in result.events] == ["first-step", "epoch", "epoch"]


def test_progress_is_told_in_order_between_start_and_end(where, blobs):
    recorder = Recorder()
    with dask.config.set({"dask-nn.progress-interval": "1 us"}):
        dask_nn.train(
            network(), *blobs, epochs=2, metrics=["accuracy"], callbacks=[recorder],
            **options(), **where,
        )  # fmt: skip
    seen = [progress for name, progress in recorder.calls if name == "progress"]
    assert recorder.names[0] == "start"
    assert [(p.epoch, p.step) for p in seen] == sorted((p.epoch, p.step) for p in seen)
    assert {p.epoch for p in seen} == {0, 1}
    assert all(p.num_steps == 10 and p.samples_per_s > 0 and p.loss > 0 for p in seen)
    first_end = recorder.names.index("epoch")
    assert all(p.epoch == 0 for name, p in recorder.calls[:first_end] if name == "progress")


def test_metrics_are_those_of_the_training_batches(where, blobs):
    """With a learning rate of zero all batches meet the same model."""
    X, y = blobs
    result = dask_nn.train(
        network(),
        X,
        y,
        metrics={"hits": MulticlassAccuracy(num_classes=4, average="micro")},
        **options(optimizer=partial(SGD, lr=0.0)),
        **where,
    )
    found = dask_nn.evaluate(result.model, X, y, metrics=["accuracy"], loss=nn.CrossEntropyLoss())
    assert result.history[0]["hits"] == pytest.approx(found["accuracy"], rel=1e-6)
    assert result.history[0]["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_callback_that_fails_ends_training(where, blobs):
    class Failing(Callback):
        def on_train_start(self, run):
            message = "no more"
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="no more"):
        dask_nn.train(network(), *blobs, epochs=10_000, callbacks=[Failing()], **options(), **where)


def test_ctrl_c_gives_what_is_trained_so_far(where, blobs):
    class Interrupting(Recorder):
        def on_epoch_end(self, record):
            super().on_epoch_end(record)
            if record["epoch"] == 1:
                raise KeyboardInterrupt

    recorder = Interrupting()
    with pytest.raises(TrainingInterrupted) as caught:
        dask_nn.train(network(), *blobs, epochs=10_000, callbacks=[recorder], **options(), **where)
    result = caught.value.result
    assert 2 <= len(result.history) < 10_000
    assert result.steps >= 20
    assert recorder.names[-1] == "end"
    assert result.weights_sha256 != weights_sha256(network().state_dict())


def test_callbacks_that_always_interrupt_lose_no_result(where, blobs, tmp_path, monkeypatch):
    """However far apart; nor do workers stay taken, or checkpoints unwritten."""
    if not where:
        monkeypatch.setattr("dask_nn.presses.SAME_PRESS_S", -1.0)

    class Interrupting(Callback):
        def on_progress(self, progress):
            raise KeyboardInterrupt

        on_epoch_end = on_event = on_train_end = on_progress

    with pytest.raises(TrainingInterrupted) as caught:
        dask_nn.train(
            network(),
            *blobs,
            epochs=10_000,
            callbacks=[Interrupting()],
            checkpoint=dask_nn.Checkpoint(tmp_path / "run"),
            **options(),
            **where,
        )
    result = caught.value.result
    assert result.steps >= 1
    saved = [event for event in result.events if event.name == "checkpoint"]
    assert saved[-1].details["steps"] == result.steps
    dask_nn.train(network(), *blobs, epochs=1, **options(), **where)


def test_a_class_or_function_may_make_the_model_from_the_seed(blobs):
    def make() -> nn.Module:
        return nn.Linear(20, 4)

    torch.manual_seed(123)
    before = torch.get_rng_state()
    digests = [
        dask_nn.train(make, *blobs, **options(seed=seed)).weights_sha256 for seed in (3, 3, 4)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_of_data_is_kept_without_shuffling():
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.rows: list[float] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.extend(x[:, 0].tolist())
            return x * self.weight

    order: list[float] = []
    X = np.arange(40, dtype=np.float32)[:, None]
    given = options(loss=nn.MSELoss(), batch_size=8, strategy=dask_nn.Synchronous(shards=1))
    for shuffle, same in [(False, True), (True, False), ("within", False)]:
        order.clear()
        dask_nn.train(Seen(), X, X, shuffle=shuffle, **given)
        epoch = order[-40:]
        assert sorted(epoch) == list(range(40))
        assert (epoch == sorted(epoch)) is same


# What train takes


def digest(X: Any, y: Any, model: nn.Module | None = None, **given: Any) -> str:
    return dask_nn.train(model or network(), X, y, **options(**given)).weights_sha256


@pytest.fixture
def chunked(blobs) -> da.Array:
    return da.from_array(blobs.X, chunks=(70, 20))


def test_the_same_rows_in_other_clothes_give_the_same_bits(threads_client, blobs, chunked):
    X, y = blobs
    expected = digest(chunked, y)
    every = X[:, 0] > -1e9
    unknown = da.from_array(every, chunks=70)
    clothes = {
        "y of other chunks": (chunked, da.from_array(y, chunks=(91,))),
        "y as int32": (chunked, y.astype(np.int32)),
        "y as a tensor": (chunked, torch.from_numpy(y)),
        "several column chunks": (da.from_array(X, chunks=(70, 7)), y),
        "float64": (chunked.astype(np.float64), y),
        "foreign byte order": (chunked.astype(">f4"), y.astype(">i8")),
        "unknown lengths": (chunked[unknown], da.from_array(y, chunks=70)[unknown]),
        "unknown lengths beside known ones": (chunked[unknown], y),
        "persisted": (chunked.persist(), da.from_array(y, chunks=70).persist()),
        "a list of labels": (chunked, y.tolist()),
    }
    found = {name: digest(*arrays) for name, arrays in clothes.items()}
    assert found == dict.fromkeys(clothes, expected)


def test_arrays_of_this_process_are_cut_alike_with_and_without_a_cluster(request, blobs):
    X, y = blobs
    with dask.config.set({"dask-nn.block-size": "4 kB"}):
        expected = digest(X, y)
        request.getfixturevalue("threads_client")
        assert digest(X, y) == expected
        assert digest(torch.from_numpy(X), torch.from_numpy(y)) == expected


def test_a_client_that_is_not_the_current_one_resolves_unknown_lengths(
    threads_cluster2, blobs, chunked
):
    keep = chunked[:, 0] < 1e9
    expected = digest(chunked, blobs.y)
    with Client(threads_cluster2, set_as_default=False) as client:
        found = dask_nn.train(network(), chunked[keep], blobs.y, **options(client=client))
    assert found.run.num_workers == 2
    assert found.weights_sha256 == expected


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_rows_may_have_any_shape(request, shape):
    rng = np.random.Generator(np.random.PCG64(1))
    X = rng.normal(size=(120, *shape)).astype(np.float32)
    y = rng.integers(0, 4, size=120)
    model = nn.Sequential(nn.Flatten(), network(int(np.prod(shape))))
    expected = digest(da.from_array(X, chunks=(50, *shape)), y, model)
    request.getfixturevalue("threads_client")
    cut = (50, *(2 for _ in shape))
    assert digest(da.from_array(X, chunks=cut), y, model) == expected
    flat = digest(da.from_array(X.reshape(120, -1), chunks=(50, -1)), y, model)
    assert flat == expected


def test_targets_may_have_several_columns(threads_client, blobs):
    targets = blobs.X[:, :4] * 2.0
    result = dask_nn.train(
        network(), blobs.X, targets.astype(np.float64), epochs=3, **options(loss=nn.MSELoss())
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_bytes_stay_bytes_until_the_transform(where, blobs):
    X = np.clip(blobs.X * 20 + 128, 0, 255).astype(np.uint8)
    types = set()

    def scaled(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return x.float() / 255

    expected = digest(X.astype(np.float32) / 255, blobs.y)
    assert digest(X, blobs.y, transform=scaled, **where) == expected
    assert not types


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "uint32", "uint64", "float16"])
def test_every_type_of_numbers_can_be_stored(blobs, dtype):
    X = (np.abs(blobs.X) * 3).astype(dtype)
    assert digest(X, blobs.y, transform=lambda x: x.float()) == digest(
        X.astype(np.float32), blobs.y
    )


def test_the_same_array_may_be_input_and_target(threads_client, blobs, chunked):
    model = nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 20))
    result = dask_nn.train(model, chunked, chunked, epochs=3, **options(loss=nn.MSELoss()))
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("full", "rows"),
    [([0], 50), ([11], 50), ([3, 4, 8], 50), (range(12), 50), ([3, 4, 8], 2), (range(12), 1)],
)
def test_blocks_may_be_empty_or_of_one_row(request, blobs, full, rows):
    """Filters leave such blocks: of twelve, some keep all their rows or one, the others none."""
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    keep = np.zeros((12, 50), bool)
    keep[list(full), :rows] = True
    keep = keep.ravel()
    mask = da.from_array(keep, chunks=50)
    X, y = da.from_array(blobs.X, chunks=(50, 20)), da.from_array(blobs.y, chunks=50)
    given = options(epochs=2, batch_size=min(6, keep.sum()), strategy=dask_nn.Synchronous(shards=1))
    found = [
        dask_nn.train(model, X[mask], y[mask], **given)
        for place in ("this process", "threads_client")
        if place == "this process" or request.getfixturevalue(place)
    ]
    assert found[0].run.num_samples == keep.sum()
    assert found[0].weights_sha256 == found[1].weights_sha256


def test_persisted_data_is_used_where_it_lies(client, blobs, chunked):
    X = chunked.persist()
    wait(X)
    keys = sorted(map(str, X.__dask_keys__()))
    holders = client.who_has(X)
    dask_nn.train(network(), X, blobs.y, **options())
    assert sorted(map(str, X.__dask_keys__())) == keys
    held = client.who_has(X)
    assert {key: set(at) for key, at in held.items()} == {
        key: set(at) for key, at in holders.items()
    }
    np.testing.assert_array_equal(X.compute(), blobs.X)


@pytest.mark.usefixtures("_quiet_dask")
def test_blocks_that_are_still_computed_are_waited_for(monkeypatch, blobs, chunked):
    """A rank looks for blocks, and would find that the slowest one lies nowhere yet."""
    monkeypatch.setattr(block_fetch, "FETCH_S", 0.05)

    def slow(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        if block_info[0]["chunk-location"][0] == len(chunked.chunks[0]) - 1:
            time.sleep(0.5)  # it is the work of this block
        return block

    targets = da.from_array(blobs.X[:, :4], chunks=(70, 4))
    X = chunked.map_blocks(slow, meta=blobs.X[:0])
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster),
    ):
        dask_nn.train(network(), chunked, blobs.y, **options())  # the next start is a quick one
        result = dask_nn.train(network(), X, targets, **options(loss=nn.MSELoss()))
    assert np.isfinite(result.history[0]["loss"])
