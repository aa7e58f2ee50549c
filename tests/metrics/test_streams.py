from __future__ import annotations

import timeit

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassAUROC

from dask_nn.errors import DataError
from dask_nn.metrics import streams
from dask_nn.metrics.merge import compute
from dask_nn.metrics.names import resolve
from dask_nn.metrics.streams import BufferedMetrics, MetricStream

METRICS = resolve(["accuracy", "auroc"], num_outputs=4)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 4, (6,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [3, 5, 11])
def test_buffered_batches_give_the_value_over_all_of_them(count: int) -> None:
    buffered = BufferedMetrics(METRICS, every=4)
    for outputs, targets in batches(count):
        buffered.update(outputs.requires_grad_(), targets)
    values = compute(METRICS, buffered.partial())
    outputs, targets = (torch.cat(each) for each in zip(*batches(count), strict=True))
    for name, metric in METRICS.items():
        metric.reset()
        metric.update(outputs, targets)
        assert values[name] == pytest.approx(float(metric.compute()))
        metric.reset()


def test_reset_forgets_everything() -> None:
    buffered = BufferedMetrics(METRICS, every=4)
    for outputs, targets in batches(7):
        buffered.update(outputs, targets)
    buffered.reset()
    assert all(partial.num_updates == 0 for partial in buffered.partial().values())


def test_running_values_change_no_bits_and_skip_metrics_that_keep_outputs() -> None:
    watched, alone = BufferedMetrics(METRICS, every=4), BufferedMetrics(METRICS, every=4)
    assert watched.compute_running() == {}
    for outputs, targets in batches(6):
        watched.update(outputs, targets)
        watched.compute_running()
        alone.update(outputs, targets)
    assert list(watched.compute_running()) == ["accuracy"]
    for name, partial in watched.partial().items():
        assert partial.num_updates == alone.partial()[name].num_updates == 2


def test_large_batches_are_not_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BUFFER_BYTES", 300)
    buffered = BufferedMetrics(METRICS)
    for outputs, targets in batches(4):  # 144 bytes each
        buffered.update(outputs, targets)
    assert all(partial.num_updates == 2 for partial in buffered.partial().values())


def test_updates_work_in_and_out_of_inference_mode() -> None:
    buffered = BufferedMetrics(METRICS, every=1)
    for outputs, targets in batches(4):
        with torch.inference_mode():
            buffered.update(outputs * 2, targets)
        buffered.update(outputs, targets)
    assert set(compute(METRICS, buffered.partial())) == {"accuracy", "auroc"}


def test_one_output_meets_flat_and_floating_labels() -> None:
    stream = MetricStream("accuracy", BinaryAccuracy())
    stream.update(torch.tensor([[0.2], [-1.0], [3.0]]), torch.tensor([1.0, 0.0, 0.0]))
    values = compute({"accuracy": BinaryAccuracy()}, {"accuracy": stream.partial()})
    assert values["accuracy"] == pytest.approx(2 / 3)


def test_soft_labels_count_as_their_largest_class() -> None:
    metric = MulticlassAccuracy(3, average="micro")
    stream = MetricStream("accuracy", metric)
    stream.update(torch.eye(3), torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]))
    values = compute({"accuracy": metric}, {"accuracy": stream.partial()})
    assert values["accuracy"] == pytest.approx(2 / 3)


def test_targets_that_are_no_labels_are_refused() -> None:
    stream = MetricStream("auroc", MulticlassAUROC(3))
    with pytest.raises(DataError, match="'auroc' needs class labels"):
        stream.update(torch.randn(2, 3), torch.tensor([0.5, 1.0]))


def test_an_update_costs_the_training_loop_almost_nothing() -> None:
    buffered = BufferedMetrics({}, every=64)
    outputs, targets = batches(1)[0]
    per_call_s = min(timeit.repeat(lambda: buffered.update(outputs, targets), number=200)) / 200
    assert per_call_s < 20e-6  # about 1 us on an idle machine
