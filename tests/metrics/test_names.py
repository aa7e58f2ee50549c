from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
)

from dask_nn.errors import ConfigurationError
from dask_nn.metrics.names import METRIC_NAMES, infer_task, resolve


def test_every_name_gives_a_metric_for_every_task() -> None:
    for num_outputs, task in ((1, None), (3, None), (3, "multilabel")):
        found = resolve(METRIC_NAMES, num_outputs=num_outputs, task=task)
        assert list(found) == list(METRIC_NAMES)
        assert all(isinstance(metric, Metric) for metric in found.values())


def test_the_task_follows_the_number_of_outputs() -> None:
    assert isinstance(resolve("accuracy", num_outputs=1)["accuracy"], BinaryAccuracy)
    several = resolve(["accuracy", "f1"], num_outputs=5)
    assert isinstance(several["accuracy"], MulticlassAccuracy)
    assert several["accuracy"].average == "micro"
    assert isinstance(several["f1"], MulticlassF1Score)
    assert several["f1"].average == "macro"


@pytest.mark.parametrize(
    ("num_outputs", "target_ndim", "over_classes", "task"),
    [
        (1, 1, False, "binary"),
        (3, 1, True, "multiclass"),
        (3, 1, False, "multiclass"),
        (3, 2, False, "multilabel"),
        (3, 2, True, "multiclass"),
    ],
)
def test_the_task_follows_the_shapes(
    num_outputs: int, target_ndim: int, over_classes: bool, task: str
) -> None:
    inferred = infer_task(
        num_outputs, output_ndim=2, target_ndim=target_ndim, over_classes=over_classes
    )
    assert inferred == task


def test_objects_are_copied_and_emptied() -> None:
    given = BinaryAccuracy()
    given.update(torch.tensor([1]), torch.tensor([1]))
    found = resolve([given], num_outputs=1)["BinaryAccuracy"]
    assert found is not given
    assert found.update_count == 0
    assert given.update_count == 1


def test_a_mapping_and_a_collection_keep_their_names() -> None:
    collection = MetricCollection({"a": BinaryAccuracy(), "b": BinaryRecall()}, prefix="x_")
    assert list(resolve(collection, num_outputs=1)) == ["x_a", "x_b"]
    found = resolve({"mine": BinaryAccuracy(), "also": "f1"}, num_outputs=1)
    assert list(found) == ["mine", "also"]


def test_labels_can_be_left_out() -> None:
    metric = resolve("accuracy", num_outputs=2, ignore_index=-100)["accuracy"]
    metric.update(torch.eye(2), torch.tensor([0, -100]))
    assert float(metric.compute()) == 1.0
    labels = resolve("accuracy", num_outputs=2, task="multilabel")["accuracy"]
    assert isinstance(labels, MultilabelAccuracy)


@pytest.mark.parametrize(
    ("metrics", "num_outputs", "message"),
    [
        (["acuracy"], 2, "did you mean 'accuracy'.*Valid names are accuracy, precision"),
        (["nothing_like_it"], 2, "unknown metric 'nothing_like_it'.*Valid names"),
        (["f1", "f1"], 2, "'f1' is given twice"),
        ({"loss": "mse"}, 1, "cannot be called 'loss'"),
        (["accuracy"], None, "needs the number of outputs"),
        ([BinaryAccuracy], 1, "not its class"),
        (3, 1, "must be names"),
    ],
)
def test_what_cannot_work_is_refused(metrics: Any, num_outputs: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(metrics, num_outputs=num_outputs)
