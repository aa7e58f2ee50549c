"""Training against an independent loop in plain PyTorch, on the plan's order of samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

import dask_nn
from dask_nn.data.plan import Plan

ROWS, BLOCK, BATCH, EPOCHS, SEED, WINDOW = 203, 17, 24, 3, 11, 4

# shards=1 is bit for bit the plain loop, but for the averages of batch norm, which are kept as
# changes that are added up: equal to a few units in the last place of float32.
NORM_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# Eight partial sums instead of one, in float32, over 27 steps.
SHARDS_TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}
DOUBLE_TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    X = rng.normal(size=(ROWS, 6)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0.5)
    return X, y.astype(np.int64), rng.uniform(0.0, 3.0, size=ROWS)


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def normalized() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def plain(
    model: nn.Module,
    *,
    optimizer: Any,
    loss: Any = None,
    shards: int = 1,
    scheduler: Any = None,
    every: str = "epoch",
    clip: float | None = None,
    weighted: bool = False,
) -> tuple[nn.Module, list[float]]:
    """Train as one would without any library; return the model and each epoch's mean loss."""
    X, y, weights = data()
    loss = loss or nn.CrossEntropyLoss()
    floating = next(model.parameters()).dtype
    features, targets = torch.from_numpy(X).to(floating), torch.from_numpy(y)
    weights = torch.from_numpy(weights).to(floating)
    steps = optimizer(model.parameters())
    schedule = scheduler(steps) if scheduler else None
    lengths = tuple(da.from_array(X, chunks=(BLOCK, 6)).chunks[0])
    losses = []
    for epoch in range(EPOCHS):
        plan = Plan(
            block_lengths=lengths,
            shards=shards,
            batch_size=BATCH,
            window=WINDOW,
            seed=SEED,
            epoch=epoch,
        )
        total = seen = 0.0
        for t in range(plan.num_steps):
            rows = torch.from_numpy(np.concatenate([plan.sample_ids(t, v) for v in range(shards)]))
            output = model(features[rows].clone())
            if weighted:
                each = nn.functional.cross_entropy(output, targets[rows], reduction="none")
                value = (each * weights[rows]).sum() / weights[rows].sum()
                share = float(weights[rows].sum())
            else:
                value = loss(output, targets[rows])
                share = float(len(rows))
            steps.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.step()
            if schedule and every == "step":
                schedule.step()
            total, seen = total + value.item() * share, seen + share
        losses.append(total / seen)
        if schedule and every == "epoch":
            schedule.step(*([losses[-1]] if isinstance(schedule, ReduceLROnPlateau) else []))
    return model, losses


def ours(model: nn.Module, *, shards: int = 1, weighted: bool = False, **options: Any) -> Any:
    X, y, weights = data()
    return dask_nn.train(
        model,
        da.from_array(X, chunks=(BLOCK, 6)),
        y,
        sample_weight=weights if weighted else None,
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=SEED,
        window=WINDOW,
        strategy=dask_nn.Synchronous(shards=shards, threads_per_rank=1),
        **({"loss": nn.CrossEntropyLoss()} | options),
    )


def assert_same_bits(result: Any, model: nn.Module) -> None:
    found = result.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


def assert_close(result: Any, model: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(
        dict(result.model.state_dict()), dict(model.state_dict()), **tolerance
    )


SETTINGS = {
    "sgd": {"optimizer": partial(SGD, lr=0.1, momentum=0.9, nesterov=True)},
    "adam with weight decay": {"optimizer": partial(Adam, lr=0.01, weight_decay=0.01)},
    "clipped": {"optimizer": partial(SGD, lr=0.5), "clip": 0.05},
    "step schedule": {
        "optimizer": partial(SGD, lr=0.3),
        "scheduler": partial(StepLR, step_size=4, gamma=0.7),
        "every": "step",
    },
    "one cycle, which moves the momentum too": {
        "optimizer": partial(SGD, lr=0.3, momentum=0.9),
        "scheduler": partial(OneCycleLR, max_lr=0.5, total_steps=EPOCHS * 9 + 1),
        "every": "step",
    },
    "epoch schedule": {
        "optimizer": partial(SGD, lr=0.3),
        "scheduler": partial(CosineAnnealingLR, T_max=EPOCHS),
    },
    "plateau": {
        "optimizer": partial(SGD, lr=0.3),
        "scheduler": partial(ReduceLROnPlateau, mode="max", patience=0, factor=0.1),
    },
}


def in_our_words(setting: dict[str, Any]) -> dict[str, Any]:
    names = {"scheduler": "lr_scheduler", "every": "lr_scheduler_every", "clip": "clip_grad_norm"}
    return {names.get(name, name): value for name, value in setting.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_shard_is_the_plain_loop_bit_for_bit(name):
    model, losses = plain(perceptron(), **SETTINGS[name])
    result = ours(perceptron(), **in_our_words(SETTINGS[name]))
    assert_same_bits(result, model)
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-6)


def test_a_convolution_is_the_plain_loop_bit_for_bit():
    optimizer = partial(SGD, lr=0.1)
    assert_same_bits(
        ours(convolution(), optimizer=optimizer), plain(convolution(), optimizer=optimizer)[0]
    )


def test_one_shard_with_batch_norm_is_the_plain_loop():
    optimizer = partial(SGD, lr=0.1)
    result = ours(normalized(), optimizer=optimizer)
    assert_close(result, plain(normalized(), optimizer=optimizer)[0], **NORM_TOLERANCE)
    assert int(result.model[1].num_batches_tracked) == result.steps


@pytest.mark.parametrize("name", SETTINGS)
def test_eight_shards_are_the_plain_loop_within_rounding(name):
    model, losses = plain(perceptron(), shards=8, **SETTINGS[name])
    result = ours(perceptron(), shards=8, **in_our_words(SETTINGS[name]))
    assert_close(result, model, **SHARDS_TOLERANCE)
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["mean", "smoothed", "class weights", "ignored label", "sum"],
)
def test_uneven_parts_make_the_exact_mean(loss, shards):
    optimizer = partial(SGD, lr=0.001 if loss.reduction == "sum" else 0.1)
    model, _ = plain(perceptron(torch.float64), optimizer=optimizer, loss=loss, shards=shards)
    result = ours(perceptron(torch.float64), optimizer=optimizer, loss=loss, shards=shards)
    assert_close(result, model, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("shards", [1, 8])
def test_sample_weights_make_the_exact_weighted_mean(shards):
    optimizer = partial(SGD, lr=0.1)
    model, losses = plain(
        perceptron(torch.float64), optimizer=optimizer, shards=shards, weighted=True
    )
    result = ours(perceptron(torch.float64), optimizer=optimizer, shards=shards, weighted=True)
    assert_close(result, model, **DOUBLE_TOLERANCE)
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-9)


def test_equal_sample_weights_are_no_weights():
    X, y, _ = data()
    options = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(SGD, lr=0.1), "batch_size": 24}
    model = perceptron(torch.float64)
    without = dask_nn.train(model, X, y, **options)
    with_ones = dask_nn.train(model, X, y, sample_weight=np.full(ROWS, 0.5), **options)
    assert_close(with_ones, without.model, **DOUBLE_TOLERANCE)


def test_batches_whose_weights_are_all_zero_change_nothing():
    X, y, _ = data()
    model = perceptron()
    result = dask_nn.train(
        model,
        X,
        y,
        sample_weight=np.zeros(ROWS),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(SGD, lr=0.1, weight_decay=0.1),
        batch_size=24,
    )
    assert_same_bits(result, model)
    assert result.history[0]["loss"] == 0.0


class Two(nn.Module):
    """One part in float32, one in float64, one that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Linear(6, 8)
        self.wide = nn.Linear(8, 3).double()
        self.unused = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(requires_grad=False)
        self.register_buffer("offset", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.tanh(self.narrow(self.frozen(x))).double()) + self.offset


def test_parameters_of_two_types_and_unused_ones_train_as_in_the_plain_loop():
    # Weight decay would move the unused parameters if they had a gradient of zero.
    optimizer = partial(SGD, lr=0.1, weight_decay=0.1, momentum=0.9)
    assert_same_bits(ours(Two(), optimizer=optimizer), plain(Two(), optimizer=optimizer)[0])


def test_half_precision_is_the_plain_loop_bit_for_bit():
    optimizer = partial(SGD, lr=0.1)
    model, _ = plain(perceptron(torch.bfloat16), optimizer=optimizer)
    assert_same_bits(ours(perceptron(torch.bfloat16), optimizer=optimizer), model)


def test_a_sparse_embedding_trains_as_in_the_plain_loop():
    X, y, _ = data()
    words = np.abs(X * 10).astype(np.int64) % 30

    def model(*, sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(30, 4, sparse=sparse), nn.Flatten(), nn.Linear(24, 3))

    options = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(SGD, lr=0.1), "batch_size": 24}
    dense, sparse = (
        dask_nn.train(model(sparse=sparse), words, y, **options) for sparse in (False, True)
    )
    assert_close(sparse, dense.model, rtol=1e-6, atol=1e-7)
