from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError
from torchmetrics.wrappers import MinMaxMetric

from dask_nn import evaluation
from dask_nn.errors import ConfigurationError, DataError, ModelError
from dask_nn.evaluation import evaluate

if TYPE_CHECKING:
    from distributed import LocalCluster
    from torchmetrics import Metric

pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")

RAGGED = ((7, 1, 20, 0, 32),)
RNG = np.random.Generator(np.random.PCG64(5))
X = RNG.normal(size=(60, 6))
LABELS = RNG.integers(0, 4, size=60)
VALUES = RNG.normal(size=60)
WEIGHTS = RNG.uniform(size=60)


def network(num_outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, num_outputs))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network(1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch)[:, 0]  # type: ignore[no-any-return]


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(torch.from_numpy(X).float())
    model.train()
    return found


def ragged(array: np.ndarray[Any, Any]) -> da.Array:
    chunks = (*RAGGED, *((length,) for length in array.shape[1:]))
    return da.from_array(array, chunks=chunks)


def over_all(metric: Metric, output: Tensor, y: np.ndarray[Any, Any]) -> float:
    metric.update(output, torch.from_numpy(y))
    return float(metric.compute())


@pytest.mark.parametrize("lazy", [False, True])
def test_class_metrics_and_loss_are_those_over_the_whole_array(lazy: bool) -> None:
    model = network()
    inputs = (ragged(X), da.from_array(LABELS, chunks=9)) if lazy else (X, LABELS)
    found = evaluate(
        model,
        *inputs,
        metrics=["accuracy", "f1", "auroc"],
        loss=nn.CrossEntropyLoss(),
        batch_size=8,
    )
    output = outputs(model)
    assert list(found) == ["loss", "accuracy", "f1", "auroc"]
    assert found == pytest.approx(
        {
            "loss": float(F.cross_entropy(output, torch.from_numpy(LABELS))),
            "accuracy": over_all(MulticlassAccuracy(4, average="micro"), output, LABELS),
            "f1": over_all(MulticlassF1Score(4), output, LABELS),
            "auroc": over_all(MulticlassAUROC(4), output, LABELS),
        },
        rel=1e-6,
    )
    assert model.training


@pytest.mark.parametrize("lazy", [False, True])
def test_values_are_compared_as_values(lazy: bool) -> None:
    inputs = (ragged(X), VALUES) if lazy else (X, VALUES)
    found = evaluate(Flat(), *inputs, metrics=["mse", "r2"], loss=nn.MSELoss())
    expected = over_all(MeanSquaredError(), outputs(Flat()).double(), VALUES)
    assert found["mse"] == pytest.approx(expected, rel=1e-6)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert "r2" in found


@pytest.mark.parametrize("lazy", [False, True])
def test_sample_weights_weigh_the_loss(lazy: bool) -> None:
    inputs = [X, LABELS, WEIGHTS]
    if lazy:
        inputs = [ragged(X), LABELS, da.from_array(WEIGHTS, chunks=50)]
    losses = F.cross_entropy(outputs(network()), torch.from_numpy(LABELS), reduction="none")
    expected = np.average(losses.numpy(), weights=WEIGHTS)
    found = evaluate(
        network(), inputs[0], inputs[1], loss=nn.CrossEntropyLoss(), sample_weight=inputs[2]
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_ignored_labels_count_nowhere() -> None:
    y = LABELS.copy()
    y[:9] = -100
    found = evaluate(network(), ragged(X), y, loss=nn.CrossEntropyLoss())
    output = outputs(network())
    assert found["loss"] == pytest.approx(
        float(F.cross_entropy(output, torch.from_numpy(y))), rel=1e-6
    )
    right = (output.argmax(dim=1).numpy() == y)[9:].mean()
    assert found["accuracy"] == pytest.approx(right)


def test_soft_labels_are_compared_by_the_largest() -> None:
    y = RNG.dirichlet(np.ones(4), size=60).astype(np.float32)
    found = evaluate(network(), ragged(X), y, loss=nn.CrossEntropyLoss())
    right = (outputs(network()).argmax(dim=1).numpy() == y.argmax(axis=1)).mean()
    assert found["accuracy"] == pytest.approx(right)


def test_one_output_is_a_binary_task() -> None:
    y = (VALUES > 0).astype(np.float32)
    found = evaluate(Flat(), ragged(X), y, metrics=["auroc"], loss=nn.BCEWithLogitsLoss())
    assert found["auroc"] == pytest.approx(
        over_all(BinaryAUROC(), outputs(Flat()), y.astype(np.int64))
    )
    column = evaluate(network(1), X, y[:, None].astype(np.int64), metrics=["accuracy"])
    assert column["accuracy"] == pytest.approx(((outputs(Flat()) > 0).numpy() == y).mean())


def test_several_labels_at_once() -> None:
    y = RNG.integers(0, 2, size=(60, 4))
    found = evaluate(network(), X, y, metrics=["accuracy"])
    assert found["accuracy"] == pytest.approx(((outputs(network()) > 0).numpy() == y).mean())


def test_unknown_lengths_are_found_and_blocks_without_rows_are_harmless() -> None:
    kept = np.arange(60) >= 30
    lazy_x, lazy_y = da.from_array(X, chunks=(10, 6)), da.from_array(LABELS, chunks=20)
    unknown_x, unknown_y = lazy_x[da.from_array(kept, chunks=10)], lazy_y[kept]
    expected = evaluate(network(), X[30:], LABELS[30:], loss=nn.CrossEntropyLoss())
    for y in (unknown_y, LABELS[30:]):
        found = evaluate(network(), unknown_x, y, loss=nn.CrossEntropyLoss())
        assert found == pytest.approx(expected, rel=1e-6)
    assert np.isnan(unknown_x.chunks[0]).all()


def test_feature_chunks_are_joined() -> None:
    found = evaluate(network(), da.from_array(X, chunks=(20, 2)), da.from_array(LABELS, chunks=20))
    assert found == evaluate(network(), X, LABELS)


def test_the_shape_of_the_tree_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    y = da.from_array(VALUES, chunks=3)
    lazy = da.from_array(X, chunks=(3, 6))
    found = evaluate(Flat(), lazy, y, metrics=["r2"], loss=nn.MSELoss())
    for split_every in (2, 64):
        monkeypatch.setattr(evaluation, "SPLIT_EVERY", split_every)
        assert evaluate(Flat(), lazy, y, metrics=["r2"], loss=nn.MSELoss()) == found


def test_a_cluster_gives_the_same_bits(client: Client) -> None:
    options: dict[str, Any] = {"metrics": ["accuracy", "auroc"], "loss": nn.CrossEntropyLoss()}
    lazy, y = ragged(X), ragged(LABELS)
    on_cluster = evaluate(network(), client.persist(lazy), y, **options)
    with client.as_current():
        assert evaluate(network(), lazy, y, client=client, **options) == on_cluster
    assert on_cluster == pytest.approx(evaluate(network(), X, LABELS, **options), rel=1e-6)


def test_a_client_that_is_not_the_current_one_is_used(cluster2: LocalCluster) -> None:
    seen_by = da.from_array(X, chunks=(30, 6)).map_blocks(_only_on_a_worker, dtype=X.dtype)
    with Client(cluster2, set_as_default=False) as client:
        found = evaluate(network(), seen_by, LABELS, client=client)
        unknown = seen_by[da.from_array(np.ones(60, dtype=bool), chunks=30)]
        assert evaluate(network(), unknown, LABELS, client=client) == found


def _only_on_a_worker(block: Any) -> Any:
    from distributed import get_worker

    if block.size:
        get_worker()
    return block


def test_names_and_objects_of_the_user() -> None:
    mine = MulticlassAccuracy(4, average=None)
    found = evaluate(network(), ragged(X), LABELS, metrics={"mine": mine, "all": "accuracy"})
    assert list(found) == ["mine_0", "mine_1", "mine_2", "mine_3", "all"]
    assert mine.update_count == 0


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (LABELS[:50], {}, DataError, "X has 60, y has 50"),
        (LABELS + 1, {}, DataError, "labels from 1 to 4.*from 0 to 3"),
        (LABELS + 1.0, {}, DataError, "labels from 1.0 to 4.0.*from 0 to 3"),
        (LABELS - 1, {"loss": nn.CrossEntropyLoss()}, DataError, "labels from -1 to 2"),
        (VALUES, {"loss": nn.CrossEntropyLoss(), "metrics": ()}, DataError, r"float32 \(n,\)"),
        (VALUES, {"loss": nn.MSELoss(), "metrics": ()}, DataError, r"outputs float32 \(n, 4\)"),
        (LABELS, {"loss": nn.MSELoss(reduction="none")}, DataError, "cannot compare"),
        (VALUES[:, None], {"metrics": "mse"}, ConfigurationError, "'mse'"),
        (LABELS, {"metrics": ["acc"]}, ConfigurationError, "unknown metric 'acc'"),
        (LABELS, {"metrics": [MulticlassAccuracy(3)]}, ConfigurationError, "cannot compare"),
        (
            LABELS,
            {"metrics": {"m": MinMaxMetric(MulticlassAccuracy(4))}},
            ConfigurationError,
            "'m'.*cannot be merged",
        ),
        (LABELS, {"sample_weight": WEIGHTS}, ConfigurationError, "pass loss="),
        (
            LABELS,
            {"sample_weight": WEIGHTS[:5], "loss": F.cross_entropy},
            DataError,
            "sample_weight has 5",
        ),
        (
            LABELS,
            {"sample_weight": WEIGHTS[:, None], "loss": F.cross_entropy},
            DataError,
            r"shape \(60, 1\)",
        ),
        (
            LABELS,
            {"sample_weight": WEIGHTS.astype(np.longdouble), "loss": F.cross_entropy},
            DataError,
            r"sample_weight has dtype \S+, expected numbers .* at most 64 bits",
        ),
        (LABELS, {"batch_size": 0}, ConfigurationError, "must be positive"),
    ],
)
def test_bad_input_is_refused(lazy: bool, y: Any, options: Any, error: Any, message: str) -> None:
    features = da.from_array(X, chunks=(20, 6)) if lazy else X
    with pytest.raises(error, match=message):
        evaluate(network(), features, y, **options)


@pytest.mark.parametrize("columns", [6, 2], ids=["one chunk", "three chunks"])
def test_columns_whose_number_is_unknown_are_counted(columns: int) -> None:
    wide = da.from_array(X, chunks=(20, columns))
    chosen = wide[:, da.from_array([True] * 4 + [False] * 2, chunks=columns)]
    assert np.isnan(chosen.shape[1])
    model = nn.Linear(4, 4)
    assert evaluate(model, chosen, LABELS) == evaluate(model, wide[:, :4], LABELS)


@pytest.mark.parametrize(
    ("model", "features", "y", "error", "message"),
    [
        (network(), X[:0], LABELS[:0], DataError, "0 rows"),
        (network(), da.from_array(X)[:0], LABELS[:0], DataError, "0 rows"),
        (network(), da.from_array(X)[X[:, 0] > 99], LABELS[:0], DataError, "0 rows"),
        (Locked(), da.from_array(X), LABELS, ModelError, "module.lock"),
        (network(), X[:, :5], LABELS, ModelError, r"rows of shape \(5,\)"),
        ("model", X, LABELS, ModelError, "must be a torch.nn.Module"),
        (network(), X.astype(str), LABELS, DataError, "X has dtype <U.*, expected numbers"),
    ],
)
def test_data_and_models_that_cannot_work_are_refused(
    model: Any, features: Any, y: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, features, y)
