from __future__ import annotations

import functools
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dask_nn.errors import ConfigurationError, ModelError
from dask_nn.metrics.objective import Objective

CUTS = (0, 3, 4, 11, 24)
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)


def outputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, *shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, ignored: int | None = None) -> torch.Tensor:
    drawn = torch.randint(0, 4, (24, *shape), generator=torch.Generator().manual_seed(2))
    if ignored is not None:
        drawn.view(-1)[::5] = ignored
    return drawn


def in_parts(
    objective: Objective, output: torch.Tensor, target: torch.Tensor, weight: Any = None
) -> torch.Tensor:
    total = normalizer = torch.tensor(0.0, dtype=torch.float64)
    for lo, hi in itertools.pairwise(CUTS):
        part = None if weight is None else weight[lo:hi]
        added, by = objective.sum_and_normalizer(output[lo:hi], target[lo:hi], part)
        total, normalizer = total + added, normalizer + by
    return total / normalizer


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


CLASS_LOSSES = [
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHT), labels()),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.2), labels(ignored=-100)),
    (nn.CrossEntropyLoss(label_smoothing=0.1), labels(ignored=-100)),
    (nn.CrossEntropyLoss(ignore_index=2), labels()),
    (nn.CrossEntropyLoss(ignore_index=9, weight=CLASS_WEIGHT), labels(ignored=9)),
    (nn.NLLLoss(weight=CLASS_WEIGHT, ignore_index=1), labels()),
    (functools.partial(F.cross_entropy, weight=CLASS_WEIGHT), labels()),
    (functools.partial(F.nll_loss, ignore_index=3), labels()),
]


@pytest.mark.parametrize(("loss", "target"), CLASS_LOSSES)
def test_uneven_parts_give_the_mean_over_the_whole_batch(loss: Any, target: torch.Tensor) -> None:
    objective = Objective(loss, weighted=False).with_ignored(bool((target == -100).any()))
    if not (target == -100).any():
        objective = Objective(loss, weighted=False)
    assert objective.kind == "mean_normalized"
    assert_same(in_parts(objective, outputs(4), target), loss(outputs(4), target))


def test_segmentation_divides_by_the_elements_that_count() -> None:
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHT)
    target = labels(3, 2, ignored=-100)
    output = outputs(4, 3, 2)
    objective = Objective(loss, weighted=False)
    assert_same(in_parts(objective, output, target), loss(output, target))


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_soft_labels_are_a_mean_over_rows(weight: Any) -> None:
    loss = nn.CrossEntropyLoss(weight=weight)
    target = outputs(4).softmax(dim=1)
    objective = Objective(loss, weighted=False)
    assert_same(in_parts(objective, outputs(4), target), loss(outputs(4), target))


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHT),
        nn.KLDivLoss(reduction="batchmean"),
        functools.partial(F.mse_loss, reduction="mean"),
        F.smooth_l1_loss,
    ],
)
def test_elementwise_losses_are_means_over_rows(loss: Any) -> None:
    target = outputs(4).flip(0).softmax(dim=1)
    objective = Objective(loss, weighted=False)
    assert objective.kind == "mean_rows"
    expected = loss(outputs(4), target)
    assert_same(objective.value(outputs(4), target), expected)
    assert_same(in_parts(objective, outputs(4), target), expected)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        *CLASS_LOSSES,
        (nn.CrossEntropyLoss(), labels()),
        (nn.MSELoss(), outputs(4).flip(0)),
        (nn.KLDivLoss(reduction="batchmean"), outputs(4).softmax(dim=1)),
        (F.mse_loss, outputs(4).flip(0)),
    ],
)
def test_integer_sample_weights_repeat_rows(loss: Any, target: torch.Tensor) -> None:
    weight = torch.arange(24) % 3
    repeats = torch.repeat_interleave(torch.arange(24), weight)
    objective = Objective(loss, weighted=True)
    assert objective.kind == "mean_normalized"
    got = in_parts(objective, outputs(4), target, weight.double())
    assert_same(got, loss(outputs(4)[repeats], target[repeats]))


def test_gradients_of_the_parts_add_up() -> None:
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHT)
    whole, parts = outputs(4).requires_grad_(), outputs(4).requires_grad_()
    loss(whole, labels()).backward()
    in_parts(Objective(loss, weighted=False), parts, labels()).backward()
    assert_same(parts.grad, whole.grad)


def test_kind_follows_the_labels_that_occur() -> None:
    assert Objective(nn.CrossEntropyLoss(), weighted=False).kind == "mean_rows"
    told = Objective(nn.CrossEntropyLoss(), weighted=False).with_ignored(True)
    assert told.kind == "mean_normalized"
    absent = Objective(nn.CrossEntropyLoss(ignore_index=7), weighted=False).with_ignored(False)
    assert absent.kind == "mean_rows"
    assert Objective(nn.MSELoss(reduction="sum"), weighted=False).kind == "sum"
    assert Objective(lambda a, b: (a - b).abs().mean(), weighted=False).kind == "mean_rows"


def test_ignore_index_is_known_for_class_losses_only() -> None:
    assert Objective(nn.CrossEntropyLoss(ignore_index=7), weighted=False).ignore_index == 7
    assert Objective(F.nll_loss, weighted=False).ignore_index == -100
    assert Objective(nn.MSELoss(), weighted=False).ignore_index is None


def test_the_users_loss_is_left_alone() -> None:
    loss = nn.CrossEntropyLoss()
    Objective(loss, weighted=True).sum_and_normalizer(outputs(4), labels(), torch.ones(24))
    assert loss.reduction == "mean"


def test_an_objective_pickles() -> None:
    objective = Objective(nn.CrossEntropyLoss(weight=CLASS_WEIGHT), weighted=False)
    again = pickle.loads(pickle.dumps(objective))
    assert_same(in_parts(again, outputs(4), labels()), objective.loss(outputs(4), labels()))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda a, b: a - b, r"shape \(24, 4\), expected a scalar"),
        (nn.MSELoss(reduction="none"), r"shape \(24, 4\), expected a scalar"),
        (lambda *_: 0.5, "returned float"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Objective(loss, weighted=False).value(outputs(4), outputs(4))


@pytest.mark.parametrize(
    ("loss", "weighted", "message"),
    [
        (lambda a, _: a.mean(), True, "reduction='none'"),
        (nn.MSELoss(reduction="sum"), True, "reduction='mean'"),
        ("mse", False, "must be a callable"),
        (nn.MSELoss, False, r"pass MSELoss\(\)"),
    ],
)
def test_losses_that_cannot_work_are_refused(loss: Any, weighted: bool, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Objective(loss, weighted=weighted)


def test_a_loss_without_one_value_per_sample_is_refused() -> None:
    class Wrong(nn.Module):
        reduction = "mean"

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return output.mean()

    with pytest.raises(ModelError, match="one loss per sample"):
        Objective(Wrong(), weighted=True).sum_and_normalizer(outputs(4), outputs(4))
