from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dask_nn.metrics.block import block_partials
from dask_nn.metrics.merge import compute, merge_named
from dask_nn.metrics.names import resolve
from dask_nn.metrics.objective import Objective

RNG = np.random.Generator(np.random.PCG64(5))
X = RNG.normal(size=(30, 6))
Y = RNG.integers(0, 3, size=30).astype(np.uint8)
MODEL = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout())
METRICS = resolve(["accuracy"], num_outputs=3)


def test_blocks_merge_to_the_value_over_all_rows() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    parts = [
        block_partials(
            MODEL,
            X[lo:hi],
            torch.from_numpy(Y[lo:hi]),
            metrics=METRICS,
            loss=Objective(loss, weighted=False),
            batch_size=4,
        )
        for lo, hi in ((0, 7), (7, 7), (7, 30))
    ]
    found = compute(METRICS, merge_named(parts))
    MODEL.eval()
    output = MODEL(torch.from_numpy(X).float()).detach()
    MODEL.train()
    assert found["loss"] == pytest.approx(float(loss(output, torch.from_numpy(Y).long())))
    assert found["accuracy"] == pytest.approx((output.argmax(dim=1).numpy() == Y).mean())


def test_the_model_keeps_its_mode_and_its_buffers() -> None:
    MODEL.train()
    MODEL[2].eval()
    before = MODEL[0].running_mean.clone()
    block_partials(MODEL, X, Y, metrics=METRICS, loss=None, batch_size=8)
    assert MODEL.training
    assert not MODEL[2].training
    assert torch.equal(MODEL[0].running_mean, before)
    MODEL[2].train()


def test_a_loss_that_is_a_sum_is_averaged_over_rows() -> None:
    parts = {}
    for reduction in ("sum", "mean"):
        objective = Objective(nn.CrossEntropyLoss(reduction=reduction), weighted=False)
        parts |= {reduction: block_partials(MODEL, X, Y, metrics={}, loss=objective, batch_size=8)}
    assert compute({}, parts["sum"]) == pytest.approx(compute({}, parts["mean"]), rel=1e-6)


def test_a_run_can_go_on_after_it() -> None:
    block_partials(MODEL, X, Y, metrics=METRICS, loss=None, batch_size=8)
    MODEL(torch.from_numpy(X).float()).sum().backward()
    assert MODEL[1].weight.grad is not None
