"""What processes compute is compared when a gang forms, and when a saved run goes on."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.errors import IncompatibleWorkers, TrainingInterrupted
from dask_nn.training import canary, rank_main
from dask_nn.training.layout import STOP, LeafLayout
from dask_nn.training.loop import TrainingLoop

ROWS = 96


def train(folder=None, *, bitwise=True, init=0, shift=0.0, **options):
    torch.manual_seed(init)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    rng = np.random.Generator(np.random.PCG64(1))
    X = rng.normal(size=(ROWS, 5)).astype(np.float32) + np.float32(shift)
    options = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
        "epochs": 2,
        "batch_size": 32,
        "strategy": dask_nn.Synchronous(shards=2, threads_per_rank=1, bitwise=bitwise),
        "checkpoint": folder,
    } | options
    return dask_nn.train(model, X, (X[:, 0] > 0).astype(np.int64), **options)


@pytest.fixture
def other_processor(monkeypatch):
    """Give a function that makes this process compute other bits, or its own again."""

    def set_other(other=True):
        monkeypatch.undo()
        if other:
            monkeypatch.setattr(rank_main, "fingerprint", lambda *_, **__: b"other".ljust(32))

    return set_other


def test_a_saved_run_goes_on_where_the_same_bits_are_computed(tmp_path):
    """The module was initialised anew: what is compared does not depend on it."""
    whole = train(epochs=4)
    train(tmp_path / "run")
    result = train(tmp_path / "run", resume=True, epochs=4, init=7)
    assert result.weights_sha256 == whole.weights_sha256
    assert result.bitwise


def test_fingerprints_that_were_made_in_another_way_are_not_compared(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(canary, "METHOD", b"0")
        before.setattr(rank_main, "fingerprint", lambda *_, **__: b"other".ljust(32))
        train(tmp_path / "run", epochs=1)
    assert train(tmp_path / "run", resume=True).bitwise


def test_votes_and_marks_are_no_part_of_what_is_compared():
    layout = LeafLayout(nn.Linear(5, 3))
    views = layout.views(torch.zeros(layout.size))
    views.tail[STOP:] = 1.0
    assert not views.flat[: layout.num_result_elements].any()
    views.tail[:STOP] = 1.0
    for gradient in views.gradients:
        gradient.fill_(1.0)
    assert views.flat[: layout.num_result_elements].sum() == 5 * 3 + 3 + STOP


def test_a_processor_that_computes_other_bits_is_refused_at_resume(tmp_path, other_processor):
    train(tmp_path / "run", epochs=1)
    other_processor()
    with pytest.raises(IncompatibleWorkers, match=r"this process.*than when the run was saved"):
        train(tmp_path / "run", resume=True)


def test_a_run_that_went_on_elsewhere_is_marked_for_good(tmp_path, other_processor):
    train(tmp_path / "run", epochs=1, bitwise=False)
    other_processor()
    assert not train(tmp_path / "run", resume=True, bitwise=False).bitwise
    other_processor(False)
    assert not train(tmp_path / "run", resume=True, bitwise=False, epochs=3).bitwise


def test_other_values_of_the_data_accuse_no_processor(tmp_path):
    train(tmp_path / "run", epochs=1)
    assert train(tmp_path / "run", resume=True, shift=0.25).bitwise


@pytest.mark.parametrize("when", ["at the end", "at an interrupt"])
def test_a_rank_that_cannot_leave_its_state_still_ends_in_order(tmp_path, monkeypatch, when):
    def keepsake(self):
        raise MemoryError

    class Stop(dask_nn.Callback):
        def on_epoch_end(self, record):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "keepsake", keepsake)
    if when == "at the end":
        assert train(tmp_path / "run").steps == 6
        return
    with pytest.raises(TrainingInterrupted) as caught:
        train(tmp_path / "run", epochs=1000, callbacks=[Stop()])
    assert caught.value.result.steps >= 3
