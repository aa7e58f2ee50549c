from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from distributed import Client, wait

from dask_nn.errors import ConfigurationError, TrainingInterrupted
from dask_nn.examples.mnist import compare as module
from dask_nn.examples.mnist.compare import (
    Comparison,
    Job,
    check,
    evaluate_parallel,
    run_sequential,
    train_parallel,
)
from dask_nn.examples.mnist.data import Dataset
from dask_nn.examples.mnist.digits import make_digits
from dask_nn.examples.mnist.layout import to_cluster
from dask_nn.examples.mnist.report import (
    describe_speedup,
    draw_curves,
    draw_misread,
    make_table,
)

if TYPE_CHECKING:
    from pathlib import Path

DIGITS = make_digits(train=2_000, test=500)
JOB = Job(epochs=2, batch_size=100, lr=0.1, hidden_size=32, shards=2)
PNG = b"\x89PNG\r\n\x1a\n"


def test_an_array_is_laid_out_in_turns(client: Client) -> None:
    values = np.arange(700).reshape(70, 10)
    array = to_cluster(client, values, rows=20)
    assert array.chunks == ((20, 20, 20, 10), (10,))
    labels = to_cluster(client, values[:, 0], rows=20)
    homes = []
    for collection in (array, labels):
        futures = client.futures_of(collection)
        wait(futures)
        where = client.who_has(futures)
        keys = sorted(where, key=str)
        homes.append([where[key] for key in keys])
    assert homes[0] == homes[1]
    assert len({home for (home,) in homes[0]}) == 2
    np.testing.assert_array_equal(client.compute(array).result(), values)


def test_the_whole_comparison(client: Client, tmp_path: Path) -> None:
    sequential = run_sequential(JOB, DIGITS, lambda *_: None)
    result = train_parallel(JOB, DIGITS, client)
    parallel = evaluate_parallel(result, DIGITS, client)
    assert parallel.accuracy == pytest.approx(np.mean(parallel.labels == DIGITS.test_labels))
    assert parallel.accuracy == pytest.approx(sequential.best.accuracy, abs=0.1)

    dataset = Dataset(name="digits", note="", digits=DIGITS)
    comparison = Comparison(dataset=dataset, sequential=sequential, parallel=parallel)
    values = json.loads(json.dumps(comparison.as_dict()))
    assert list(values) == [
        "dataset",
        "train_samples",
        "test_samples",
        "sequential",
        "parallel",
        "speedup",
    ]
    assert set(values["sequential"]["guide"]) == {"epoch_s", "loss", "accuracy"}
    assert set(values["sequential"]["best"]) == {"epoch_s", "loss", "accuracy", "threads"}
    assert list(values["parallel"]) == [
        "engine",
        "strategy",
        "num_workers",
        "world_size",
        "shards",
        "threads_per_rank",
        "collective",
        "start_s",
        "epoch_s",
        "loss",
        "accuracy",
        "weights_sha256",
    ]
    assert set(values["speedup"]) == {"over_guide", "over_best"}
    assert len(values["parallel"]["epoch_s"]) == len(values["parallel"]["loss"]) == 2

    table = make_table(comparison)
    assert table.row_count == 3
    assert "times as fast" in describe_speedup(comparison)
    draw_curves(comparison, tmp_path / "curves.png")
    wrong = draw_misread(DIGITS, parallel, tmp_path / "misread.png")
    assert wrong == round((1 - parallel.accuracy) * 500)
    for name in ("curves.png", "misread.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)

    alone = Comparison(dataset=dataset, sequential=None, parallel=parallel)
    assert alone.as_dict()["sequential"] is alone.as_dict()["speedup"] is None
    assert make_table(alone).row_count == 1
    assert describe_speedup(alone) == ""


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(batch_size=2_001, shards=1), "batch_size must be at most the number of samples"),
        (Job(batch_size=100, shards=3), "batch_size must be divisible by the number of shards"),
        (Job(lr=float("nan")), "lr must be a positive number, got nan"),
        (Job(lr=-1), "lr must be a positive number"),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_any_training(job: Job, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(job, 2_000)


@pytest.mark.parametrize(
    ("finished", "steps", "saved"), [(0, 1, 0), (0, 0, None), (1, 1, 1), (1, 0, 0)]
)
def test_an_interrupted_loop_hands_over_what_is_trained(
    monkeypatch: pytest.MonkeyPatch, finished: int, steps: int, saved: int | None
) -> None:
    """An interrupted loop counts from its first step on; until then, the loop before it does."""
    models: list[torch.nn.Module] = []

    def loop(model: torch.nn.Module, *_: object, **__: object) -> None:
        models.append(model)
        if len(models) <= finished or steps:
            with torch.no_grad():
                model.fc2.bias.add_(1)
        if len(models) > finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "guide_loop", loop)
    monkeypatch.setattr(module, "best_loop", loop)
    with pytest.raises(TrainingInterrupted) as caught:
        run_sequential(JOB, DIGITS, lambda *_: None)
    if saved is None:
        assert caught.value.result is None
    else:
        assert caught.value.result.model is models[saved]
