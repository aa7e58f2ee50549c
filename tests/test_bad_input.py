"""What cannot work ends in one clear error, before any work where that is possible."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.data.plan import Plan
from dask_nn.errors import (
    ClusterError,
    ConfigurationError,
    DataError,
    ModelError,
    NonFiniteLoss,
    RankFailed,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")

MARK = 1e6
ROWS, BATCH, SHARDS = 200, 20, 4


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.normal(size=(ROWS, 6)).astype(np.float32), rng.integers(0, 3, size=ROWS)


X, Y = data()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class NoWork(Callback):
    """Fails the test if training starts."""

    def on_train_start(self, run):
        pytest.fail("training started")


def train(*arrays: Any, model: Any = None, **given: Any) -> Any:
    options = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.1),
        "batch_size": BATCH,
        "strategy": dask_nn.Synchronous(shards=SHARDS, threads_per_rank=1),
    } | given
    return dask_nn.train(network() if model is None else model, *(arrays or (X, Y)), **options)


class Unpool(nn.Module):
    """Needs a kernel whose bits may vary from run to run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled, at = nn.functional.max_pool1d(x[:, None], 2, return_indices=True)
        return self.layer(nn.functional.max_unpool1d(pooled, at, 2)[:, 0])


class Detached(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 3, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def number(output: torch.Tensor, target: torch.Tensor) -> float:
    return float((output.detach()[:, 0] - target).mean())


def labels(*, last: int) -> np.ndarray:
    found = Y.copy()
    found[-1] = last
    return found


# From name to (arrays, options, error, what its text names).
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "different lengths": ((X, Y[:150]), {}, DataError, "X has 200, y has 150"),
    "different lengths of Dask arrays": (
        (da.from_array(X, chunks=50), da.from_array(Y[:150], chunks=50)),
        {},
        DataError,
        "X has 200, y has 150",
    ),
    "weights of another length": (
        (X, Y),
        {"sample_weight": np.ones(3)},
        DataError,
        "sample_weight has 3",
    ),
    "a column of weights": (
        (X, Y),
        {"sample_weight": np.ones((ROWS, 1))},
        DataError,
        r"got shape \(200, 1\)",
    ),
    "no rows": ((X[:0], Y[:0]), {}, ConfigurationError, r"shards \(4\) than samples \(0\)"),
    "text": ((X, Y.astype(str)), {}, DataError, "y has dtype <U"),
    "a label above the outputs": (
        (X, labels(last=3)),
        {},
        DataError,
        r"labels from 0 to 3, but the model has 3 outputs.* 0\.\.2",
    ),
    "labels that begin above the outputs": ((X, Y + 5), {}, DataError, "labels from 5 to 7"),
    "a negative label": ((X, labels(last=-1)), {}, DataError, "labels from -1 to 2"),
    "a bad label in a Dask array": (
        (X, da.from_array(labels(last=9), chunks=30)),
        {},
        DataError,
        "labels from 0 to 9",
    ),
    "a bad label in the validation data": (
        (X, Y),
        {"validation": (X, Y + 1)},
        DataError,
        "labels from 1 to 3",
    ),
    "floating labels": (
        (X, Y.astype(np.float32)),
        {},
        ModelError,
        r"y float32.* use y\.astype\('int64'\)",
    ),
    "integer targets of a regression": (
        (X, (Y[:, None] == np.arange(3)).astype(np.int64)),
        {"loss": nn.BCEWithLogitsLoss()},
        ModelError,
        r"y int64.* use y\.astype\('float32'\)",
    ),
    "targets that broadcast": (
        (X, X[:, 0]),
        {"loss": nn.MSELoss(), "model": nn.Linear(6, 1)},
        ModelError,
        r"target size .* is different to the input size.*Reshape y",
    ),
    "rows of another shape than the model takes": (
        (X[:, :4], Y),
        {},
        ModelError,
        r"X float32\(5, 4\).*cannot be multiplied",
    ),
    "bytes without a transform": ((X.astype(np.uint8), Y), {}, ModelError, "pass a transform="),
    "batch size 0": ((X, Y), {"batch_size": 0}, ConfigurationError, "positive, got 0"),
    "batch size -4": ((X, Y), {"batch_size": -4}, ConfigurationError, "positive, got -4"),
    "batch size of a float": (
        (X, Y),
        {"batch_size": 20.0},
        ConfigurationError,
        "must be an integer, got 20.0",
    ),
    "batch size above the data": (
        (X, Y),
        {"batch_size": 400},
        ConfigurationError,
        "batch_size is 400, but there are only 200 samples; use batch_size=200",
    ),
    "batch size that shards do not divide": (
        (X, Y),
        {"batch_size": 22},
        ConfigurationError,
        "batch_size=22 and shards=4",
    ),
    "more shards than samples": (
        (X[:30], Y[:30]),
        {"batch_size": 40, "strategy": dask_nn.Synchronous(shards=40)},
        ConfigurationError,
        r"more shards \(40\) than samples \(30\)",
    ),
    "more shards than samples that a filter leaves": (
        (da.from_array(X, chunks=50)[da.from_array(Y, chunks=50) == 9], Y[:0]),
        {},
        DataError,
        "0 rows",
    ),
    "a loss for each sample": (
        (X, Y),
        {"loss": nn.CrossEntropyLoss(reduction="none")},
        ModelError,
        r"CrossEntropyLoss returned a tensor of shape \(5,\), expected a scalar",
    ),
    "a loss that is no tensor": (
        (X, Y),
        {"loss": number},
        ModelError,
        "returned float, expected a scalar tensor",
    ),
    "a loss without gradient": (
        (X, Y),
        {"model": Detached(6, 3)},
        ModelError,
        "does not depend on any trained parameter",
    ),
    "a loss that cannot weigh samples": (
        (X, Y),
        {"sample_weight": np.ones(ROWS), "loss": number},
        ConfigurationError,
        "sample weights need the loss of every sample",
    ),
    "a loss class": (
        (X, Y),
        {"loss": nn.CrossEntropyLoss},
        ConfigurationError,
        r"pass CrossEntropyLoss\(\)",
    ),
    "an optimizer that is made already": (
        (X, Y),
        {"optimizer": SGD(network().parameters(), lr=0.1)},
        ConfigurationError,
        "optimizer must be callable",
    ),
    "an optimizer that lacks an argument": (
        (X, Y),
        {"optimizer": partial(SGD, momentum=-1)},
        ConfigurationError,
        "optimizer could not be made",
    ),
    "an optimizer that asks for the loss again": (
        (X, Y),
        {"optimizer": LBFGS},
        ConfigurationError,
        "LBFGS",
    ),
    "a scheduler that lacks an argument": (
        (X, Y),
        {"lr_scheduler": StepLR},
        ConfigurationError,
        "step_size",
    ),
    "a plateau watched in every step": (
        (X, Y),
        {"lr_scheduler": ReduceLROnPlateau, "lr_scheduler_every": "step"},
        ConfigurationError,
        "lr_scheduler_every='epoch'",
    ),
    "an unknown engine": ((X, Y), {"engine": "mpi"}, ConfigurationError, "'spmd', 'graph'.*'mpi'"),
    "an unknown shuffle": ((X, Y), {"shuffle": "all"}, ConfigurationError, "'within'.*'all'"),
    "no epochs": ((X, Y), {"epochs": 0}, ConfigurationError, "epochs must be positive, got 0"),
    "a norm of zero": ((X, Y), {"clip_grad_norm": 0.0}, ConfigurationError, "positive.*got 0.0"),
    "a norm in letters": ((X, Y), {"clip_grad_norm": "1"}, ConfigurationError, "got '1'"),
    "a negative seed": ((X, Y), {"seed": -1}, ConfigurationError, "seed must be at least 0"),
    "no window": ((X, Y), {"window": 0}, ConfigurationError, "window must be positive"),
    "a strategy by name": ((X, Y), {"strategy": "sync"}, ConfigurationError, "Synchronous"),
    "a callback alone": ((X, Y), {"callbacks": NoWork()}, ConfigurationError, "sequence"),
    "a client of something else": (
        (X, Y),
        {"client": "tcp://127.0.0.1:1"},
        ConfigurationError,
        "distributed.Client or None, got str",
    ),
    "no model": ((X, Y), {"model": 3}, ModelError, "torch.nn.Module, got int"),
    "a model without parameters": (
        (X, Y),
        {"model": nn.ReLU()},
        ConfigurationError,
        "ReLU has no trainable parameters",
    ),
    "a complex model": ((X, Y), {"model": Complex()}, ModelError, "complex parameters"),
    "a kernel without reproducible bits": (
        (X, Y),
        {"model": Unpool()},
        ModelError,
        r"deterministic.*Synchronous\(bitwise=False\)",
    ),
    "a batch norm that meets a single row at the end": (
        (X[:101], Y[:101]),
        {"model": nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))},
        ModelError,
        r"on 1 rows.*another batch_size \(20\) or other shards \(4\)",
    ),
    "an unknown metric": ((X, Y), {"metrics": ["acuracy"]}, ConfigurationError, "accuracy"),
    "validation without labels": (
        (X, Y),
        {"validation": X},
        DataError,
        r"tuple \(X, y\), got a ndarray",
    ),
    "validation without weights": (
        (X, Y),
        {"validation": (X, Y), "sample_weight": np.ones(ROWS)},
        DataError,
        r"\(X, y, sample_weight\), got a tuple of 2",
    ),
    "validation rows of another shape": (
        (X, Y),
        {"validation": (X[:, :3], Y)},
        DataError,
        r"\(6,\) in the training data, but \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_without_a_cluster(name):
    arrays, options, error, text = BAD[name]
    callbacks = {} if "callbacks" in options else {"callbacks": [NoWork()]}
    with pytest.raises(error, match=rf"(?s){text}"):
        train(*arrays, **options, **callbacks)


@pytest.mark.parametrize("name", BAD)
def test_on_a_cluster(threads_client, name):
    test_without_a_cluster(name)


def test_a_good_input_is_not_refused():
    assert train().steps == 10


def test_a_model_that_cannot_be_pickled_names_the_attribute(threads_client):
    model = network()
    model[2].lock = threading.Lock()
    with pytest.raises(ModelError, match=r"2\.lock"):
        train(model=model)


def test_a_loss_that_cannot_be_pickled_is_named(threads_client):
    lock = threading.Lock()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with lock:
            return nn.functional.cross_entropy(output, target)

    with pytest.raises(ModelError, match="loss"):
        train(loss=loss)


def test_a_closed_client_is_named(threads_cluster2):
    client = Client(threads_cluster2, set_as_default=False)
    client.close()
    with pytest.raises(ClusterError, match="client is closed"):
        train(client=client)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_smallest_last_batch_may_have_one_row(weighted):
    """Only models that need more refuse it."""
    weights = {"sample_weight": np.ones(101)} if weighted else {}
    assert train(X[:101], Y[:101], **weights).steps == 6


# What only shows while training


@pytest.fixture(params=["no cluster", "spmd", "graph"])
def where(request) -> dict[str, Any]:
    if request.param == "no cluster":
        return {}
    return {"client": request.getfixturevalue("threads_client"), "engine": request.param}


def marked() -> tuple[np.ndarray, int]:
    """Return X with a marked row near its end, and the step of the first epoch that meets it."""
    found, row = X.copy(), ROWS - 7
    found[row] = MARK
    plan = Plan(block_lengths=(50, 50, 50, 50), shards=SHARDS, batch_size=BATCH)
    steps = [
        t
        for t in range(plan.num_steps)
        for v in range(SHARDS)
        if row in plan.sample_ids(t, v).tolist()
    ]
    return found, steps[0]


def stumble(x: torch.Tensor) -> torch.Tensor:
    if (x == MARK).any():
        message = "a marked row"
        raise LookupError(message)
    return x


def spoil(value: float, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == MARK, torch.full_like(x, value), x)


def test_an_exception_arrives_with_rank_step_worker_and_traceback(where):
    found, step = marked()
    assert step > 0
    with pytest.raises(RankFailed) as caught:
        train(da.from_array(found, chunks=(50, 6)), Y, transform=stumble, epochs=3, **where)
    error = caught.value
    assert error.message == "LookupError: a marked row"
    assert error.step == step
    assert error.rank in {0, 1}
    assert "in stumble" in error.traceback
    client: Client | None = where.get("client")
    if client is None:
        assert error.address == "this process"
    else:
        assert error.address in client.scheduler_info(n_workers=-1)["workers"]
    text = str(error)
    assert f"rank {error.rank} on worker {error.address} failed at step {step}" in text
    assert "in stumble" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_last_good_state(where, value):
    found, step = marked()

    def absolute(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.sum(dim=1) - target).abs().mean()

    with pytest.raises(NonFiniteLoss) as caught:
        train(
            da.from_array(found, chunks=(50, 6)),
            Y,
            loss=absolute,
            transform=partial(spoil, value),
            epochs=3,
            **where,
        )
    error = caught.value
    assert not np.isfinite(error.value)
    assert (error.step, error.epoch) == (step, 0)
    assert f"at step {step} (epoch 0)" in str(error)
    state = error.result.model.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert error.result.steps == step
    assert error.result.weights_sha256 == good_digest(found, step, absolute)


def good_digest(found: np.ndarray, step: int, loss: Any) -> str:
    """Train without the mark, in this process, with a learning rate that ends with the step."""
    clean = np.where(found == MARK, np.float32(0), found)
    result = train(
        da.from_array(clean, chunks=(50, 6)),
        Y,
        loss=loss,
        lr_scheduler=partial(LambdaLR, lr_lambda=lambda t: float(t < step)),
        lr_scheduler_every="step",
    )
    assert result.steps > step
    return result.weights_sha256
