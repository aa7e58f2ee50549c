from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dask_nn.checkpoints.options import Checkpoint
from dask_nn.training.checkpointing import Checkpointer, LastSave
from dask_nn.training.snapshot import Snapshot


@dataclass
class Run:
    epoch: int
    steps: int
    step: int = 0

    def snapshot(self):
        return Snapshot(
            weights={"w": torch.ones(2)},
            optimizer={"state": {}},
            epoch=self.epoch,
            step=self.step,
            steps=self.steps,
            history=tuple({"epoch": float(n), "loss": 1.0 / (n + 1)} for n in range(self.epoch)),
        )


@pytest.fixture
def saves(tmp_path):
    """Give a function that begins a gang and tells the steps that it saves at once."""

    def begin(run, last, **options):
        told = []
        checkpointer = Checkpointer(
            Checkpoint(tmp_path / "run", **options),
            configuration={},
            on_event=lambda name, details: told.append((name, details["steps"])),
            last=last,
        )
        checkpointer.begin(run)
        checkpointer.finish(lambda: None)
        checkpointer.close()
        return [steps for name, steps in told if name == "checkpoint"]

    return begin


def test_the_first_gang_saves_nothing_at_its_start(saves):
    assert saves(Run(2, 60), None) == []
    assert saves(Run(2, 60), None, every=10) == []


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (LastSave(epoch=1, steps=30), [60]),
        (LastSave(epoch=2, steps=60), []),
    ],
)
def test_an_epoch_that_was_not_saved_is_saved_by_the_next_gang(saves, last, found):
    assert saves(Run(2, 60), last) == found


def test_also_from_the_middle_of_the_epoch_after(saves):
    assert saves(Run(2, 64, step=4), LastSave(epoch=1, steps=30)) == [64]
    assert saves(Run(2, 64, step=4), LastSave(epoch=2, steps=60)) == []


@pytest.mark.parametrize(
    ("every", "last", "found"),
    [
        (20, LastSave(epoch=1, steps=45), []),
        (20, LastSave(epoch=1, steps=40), [60]),
        ("1 minute", LastSave(epoch=1, steps=30, age_s=59), []),
        ("1 minute", LastSave(epoch=1, steps=30, age_s=61), [60]),
    ],
)
def test_steps_and_seconds_count_from_the_last_checkpoint_of_the_run(saves, every, last, found):
    assert saves(Run(2, 60), last, every=every) == found


def test_the_epochs_record_is_saved_with_it(saves, tmp_path):
    saves(Run(2, 60), LastSave(epoch=1, steps=30), best="loss")
    manifest = next((tmp_path / "run").glob("epoch-*/manifest.json")).read_text()
    assert '"loss": 0.5' in manifest
