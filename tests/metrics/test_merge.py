from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassHingeLoss,
    MulticlassRecall,
    MulticlassROC,
    MultilabelAUROC,
)
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from dask_nn.errors import ConfigurationError
from dask_nn.metrics.merge import (
    LossPartial,
    MetricPartial,
    compute,
    merge,
    merge_named,
)
from dask_nn.metrics.states import check_mergeable
from dask_nn.metrics.streams import MetricStream

CUTS = (0, 7, 8, 8, 30, 61, 100)


def outputs(*shape: int) -> Tensor:
    return torch.randn(100, *shape, generator=torch.Generator().manual_seed(1))


def labels(*shape: int, classes: int = 4) -> Tensor:
    return torch.randint(0, classes, (100, *shape), generator=torch.Generator().manual_seed(2))


class SumOfOutputs(Metric):
    """Leaves full_state_update unset, as many metrics of users do."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("seen", [], dist_reduce_fx=None)
        self.add_state("biggest", torch.tensor(-1e9), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total = self.total + preds.double().sum()
        self.seen.append(target)
        self.biggest = torch.maximum(self.biggest, preds.max())

    def compute(self) -> Tensor:
        return self.total + self.biggest + 0 * torch.cat(self.seen).sum()


class Ordered(SumOfOutputs):
    def merge_state(self, incoming_state: Any) -> None:
        self.total = incoming_state.total + self.total
        self.seen = incoming_state.seen + self.seen
        self.biggest = torch.maximum(incoming_state.biggest, self.biggest)


def partials(metric: Metric, output: Tensor, target: Tensor) -> list[MetricPartial]:
    stream = MetricStream("it", metric)
    found = []
    for lo, hi in itertools.pairwise(CUTS):
        stream.reset()
        for row in range(lo, hi, 5):
            stream.update(output[row : min(row + 5, hi)], target[row : min(row + 5, hi)])
        found.append(pickle.loads(pickle.dumps(stream.partial())))
    return found


def merged(metric: Metric, output: Tensor, target: Tensor) -> dict[str, float]:
    return compute({"it": metric}, {"it": merge(partials(metric, output, target))})


def whole(metric: Metric, output: Tensor, target: Tensor) -> Tensor:
    metric.reset()
    metric.update(output, target)
    value: Tensor = metric.compute()
    metric.reset()
    return value


BINARY = (outputs(), labels(classes=2))
SMALL = (outputs() / 3 + 0.5, labels(classes=2))  # only a few outputs lie outside [0, 1]
CLASSES = (outputs(4), labels())


@pytest.mark.parametrize(
    ("metric", "output", "target"),
    [
        (MulticlassAccuracy(4, average="micro"), *CLASSES),
        (MulticlassF1Score(4), *CLASSES),
        (MulticlassAUROC(4), *CLASSES),
        (MulticlassAUROC(4, thresholds=20), *CLASSES),
        (MulticlassHingeLoss(4), *CLASSES),
        (BinaryAccuracy(), *BINARY),
        (BinaryAccuracy(), *SMALL),
        (BinaryAUROC(), *SMALL),
        (BinaryCalibrationError(), *SMALL),
        (BinaryAccuracy(), outputs().sigmoid(), labels(classes=2)),
        (BinaryAUROC(), outputs().sigmoid(), labels(classes=2)),
        (MulticlassAUROC(4), outputs(4).softmax(dim=1), labels()),
        (MultilabelAUROC(3), outputs(3), labels(3, classes=2)),
        (MeanSquaredError(), outputs(), outputs().flip(0)),
        (R2Score(), outputs(), outputs() + 0.1 * outputs().flip(0)),
        (PearsonCorrCoef(), outputs(), outputs() + outputs().flip(0)),
        (SumOfOutputs(), outputs(), outputs()),
        (Ordered(), outputs(), outputs()),
        (MeanSquaredError() + R2Score(), outputs(), outputs().flip(0)),
    ],
)
def test_parts_merge_to_the_value_over_all_samples(
    metric: Metric, output: Tensor, target: Tensor
) -> None:
    expected = float(whole(metric, output, target))
    assert merged(metric, output, target)["it"] == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_groups_of_a_power_of_two_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    losses = [
        LossPartial(total=float(x), normalizer=1.0)
        for x in torch.randn(37, generator=generator, dtype=torch.float64)
    ]
    at_once = merge(losses)
    for size in (2, 4, 16):
        groups = [merge(losses[lo : lo + size]) for lo in range(0, 37, size)]
        assert merge(groups) == at_once


def test_merging_changes_no_partial() -> None:
    parts = partials(MulticlassAccuracy(4, average="micro"), *CLASSES)
    before = pickle.dumps(parts)
    merge(parts)
    assert pickle.dumps(parts) == before


def test_several_values_become_several_entries() -> None:
    recall = MulticlassRecall(4, average=None)
    values = merged(recall, *CLASSES)
    assert list(values) == ["it_0", "it_1", "it_2", "it_3"]
    torch.testing.assert_close(torch.tensor(list(values.values())), whole(recall, *CLASSES))
    assert len(merged(MulticlassConfusionMatrix(2), outputs(2), labels(classes=2))) == 4
    wise = ClasswiseWrapper(MulticlassAUROC(4, average=None), labels=["a", "b", "c", "d"])
    assert set(merged(wise, *CLASSES)) == {f"multiclassauroc_{label}" for label in "abcd"}


def test_a_float32_value_is_its_shortest_decimal() -> None:
    right = MulticlassAccuracy(2, average="micro")
    stream = MetricStream("it", right)
    stream.update(torch.ones(10_000, dtype=torch.int64), (torch.arange(10_000) < 8_889).long())
    assert compute({"it": right}, {"it": stream.partial()}) == {"it": 0.8889}


def test_no_samples_give_nan() -> None:
    stream = MetricStream("it", MulticlassAccuracy(4))
    value = compute({"it": MulticlassAccuracy(4)}, {"it": stream.partial()})["it"]
    assert value != value  # noqa: PLR0124 - NaN
    loss = LossPartial(total=0.0, normalizer=0.0).value
    assert loss != loss  # noqa: PLR0124 - NaN


def test_losses_merge_by_name() -> None:
    parts = [
        {"loss": LossPartial(total=3.0, normalizer=2.0)},
        {"loss": LossPartial(total=1.0, normalizer=6.0)},
    ]
    assert compute({}, merge_named(parts)) == {"loss": 0.5}


def test_curves_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="curves"):
        merged(MulticlassROC(4), *CLASSES)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MinMaxMetric(BinaryAccuracy()), "MinMaxMetric.*pass the metric that it wraps"),
        (PeakSignalNoiseRatio(data_range=1.0), "'data_range' is a mean over processes"),
    ],
)
def test_metrics_that_cannot_merge_are_named(metric: Metric, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_mergeable("it", metric)


def test_metrics_that_read_logits_differently_are_not_combined() -> None:
    with pytest.raises(ConfigurationError, match="pass them one by one"):
        MetricStream("it", BinaryAccuracy() + MeanSquaredError())
