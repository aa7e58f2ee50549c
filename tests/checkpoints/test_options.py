from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest

from dask_nn.checkpoints.options import Checkpoint
from dask_nn.errors import ConfigurationError


def test_a_path_becomes_absolute_and_a_url_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoint("runs/one").url == str(tmp_path / "runs/one")
    assert Checkpoint(Path("runs")).url == str(tmp_path / "runs")
    assert Checkpoint("s3://bucket/run").url == "s3://bucket/run"


def test_of_takes_what_users_pass():
    given = Checkpoint("somewhere", keep=1)
    assert Checkpoint.of(None) is None
    assert Checkpoint.of(given) is given
    assert Checkpoint.of("/a/b") == Checkpoint("/a/b")


@pytest.mark.parametrize(
    ("every", "due", "not_due"),
    [
        ("epoch", (1, 0.0, True), (10_000, 1e6, False)),
        (50, (50, 0.0, False), (49, 1e6, True)),
        ("10 minutes", (0, 600.0, False), (10_000, 599.0, True)),
        (timedelta(seconds=5), (0, 5.0, False), (9, 4.9, False)),
    ],
)
def test_when_a_checkpoint_is_due(every, due, not_due):
    options = Checkpoint("x", every=every)
    assert options.due(*due)
    assert not options.due(*not_due)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"url": ""}, "checkpoint must be"),
        ({"url": 7}, "checkpoint must be"),
        ({"every": 0}, "every must be"),
        ({"every": True}, "every must be"),
        ({"every": 2.5}, "every must be"),
        ({"every": "10"}, "every must be"),
        ({"every": "sometimes"}, "every must be"),
        ({"every": "-3 s"}, "every must be"),
        ({"every": timedelta(0)}, "every must be"),
        ({"keep": 0}, "keep must be"),
        ({"keep": 1.5}, "keep must be"),
        ({"best": 3}, "best must be"),
        ({"best": "val_loss", "every": 10}, "needs every='epoch'"),
        ({"best_mode": "largest"}, "best_mode must be"),
        ({"before_walltime_s": 0}, "before_walltime_s must be"),
    ],
)
def test_bad_values_are_named(options, named):
    with pytest.raises(ConfigurationError, match=named):
        Checkpoint(**{"url": "x"} | options)


@pytest.mark.parametrize(
    ("best", "mode", "larger_is_better"),
    [
        ("val_loss", "auto", False),
        ("mean_squared_error", "auto", False),
        ("val_mse", "auto", False),
        ("val_mae", "auto", False),
        ("rmse", "auto", False),
        ("r2", "auto", True),
        ("val_accuracy", "auto", True),
        ("val_loss", "max", True),
        ("val_accuracy", "min", False),
    ],
)
def test_which_value_is_better(best, mode, larger_is_better):
    options = Checkpoint("x", best=best, best_mode=mode)
    assert options.is_better(2.0, 1.0) is larger_is_better
    assert not options.is_better(1.0, 1.0)


def test_the_end_of_a_slurm_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert Checkpoint("x", before_walltime_s=60).save_at() is None
    end = int(time.time()) + 600
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert Checkpoint("x", before_walltime_s=60).save_at() == end - 60
    assert Checkpoint("x").save_at() is None
