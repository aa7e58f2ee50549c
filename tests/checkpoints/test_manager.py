from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dask_nn import faults
from dask_nn.checkpoints.manager import CheckpointContent, CheckpointManager
from dask_nn.checkpoints.options import Checkpoint
from dask_nn.checkpoints.serialization import load_weights
from dask_nn.errors import CheckpointError

WAIT_S = 20.0


def content(epoch=1, steps=10, size=4, **given):
    weights = {"b.weight": torch.arange(float(size)) + steps, "a.bias": torch.ones(2)}
    tree = {"weights": weights, "optimizer": {"state": {0: {"m": torch.full((3,), 0.1)}}}}
    return CheckpointContent(tree=tree, epoch=epoch, step=0, steps=steps, **given)


class Told(list):
    def __call__(self, name, details):
        self.append((name, details))

    @property
    def names(self):
        return [name for name, _ in self]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def make(tmp_path, told):
    made = []

    def manager(url=tmp_path / "run", **options):
        made.append(CheckpointManager(Checkpoint(url, **options), on_event=told))
        return made[-1]

    yield manager
    for each in made:
        each.close(WAIT_S)


@pytest.fixture
def hook(monkeypatch):
    def set_hook(function):
        monkeypatch.setattr(faults, "hook", function)

    return set_hook


@pytest.mark.parametrize("url", [None, "memory://dask-nn-test/run"])
def test_what_is_saved_is_found_again(make, tmp_path, url):
    manager = make(url or tmp_path / "run")
    given = content(history=[{"epoch": 0.0, "loss": 1.5}], configuration={"shards": 4})
    assert manager.load_latest() is None
    assert manager.flush_now(given, WAIT_S)
    found, manifest, skipped = manager.load_latest()
    assert not skipped
    assert list(found.tree["weights"]) == ["b.weight", "a.bias"]
    assert torch.equal(found.tree["weights"]["b.weight"], given.tree["weights"]["b.weight"])
    assert torch.equal(found.tree["optimizer"]["state"][0]["m"], torch.full((3,), 0.1))
    assert found.history == given.history
    assert manifest.configuration == {"shards": 4}
    assert "torch" in manifest.packages


def test_the_weights_are_a_file_of_their_own(make, tmp_path):
    make().flush_now(content(), WAIT_S)
    (folder,) = (tmp_path / "run").iterdir()
    weights, _ = load_weights(folder / "model.safetensors")
    assert list(weights) == ["b.weight", "a.bias"]


def test_the_newest_stay_and_the_best(make):
    manager = make(keep=2, best="val_loss")
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        manager.flush_now(content(epoch, 10 * epoch, record={"val_loss": loss}), WAIT_S)
    assert [name[:10] for name in manager.names()] == ["epoch-0001", "epoch-0003", "epoch-0004"]


def test_a_value_that_is_no_number_is_never_the_best(make):
    manager = make(keep=1, best="val_loss")
    for epoch, loss in enumerate((float("nan"), 0.5, 0.7, 0.9), start=1):
        manager.flush_now(content(epoch=epoch, steps=10 * epoch, record={"val_loss": loss}), WAIT_S)
    assert [int(name.split("-")[1]) for name in manager.names()] == [2, 4]


def test_the_newest_is_found_by_number(make):
    manager = make(keep=2)
    for epoch in (9_999, 10_000, 10_001):
        manager.flush_now(content(epoch=epoch, steps=epoch), WAIT_S)
    assert [int(name.split("-")[1]) for name in manager.names()] == [10_000, 10_001]
    assert manager.load_latest()[0].epoch == 10_001


def test_all_stay(make):
    manager = make(keep=None)
    for epoch in range(5):
        manager.flush_now(content(epoch, 10 * epoch), WAIT_S)
    assert len(manager.names()) == 5


def test_training_does_not_wait_for_the_disk(make, told, hook):
    entered, go_on = threading.Event(), threading.Event()

    def wait(point, place):
        entered.set()
        go_on.wait(WAIT_S)

    hook(wait)
    manager = make()
    manager.save(content(1, 10))
    assert entered.wait(WAIT_S)
    manager.save(content(2, 20))
    manager.save(content(3, 30))
    assert manager.names() == []
    go_on.set()
    assert manager.close(WAIT_S)
    assert [name[:10] for name in manager.names()] == ["epoch-0001", "epoch-0003"]
    assert told.names.count("checkpoint-skipped") == 1


def test_a_full_disk(make, told, tiny_disk):
    manager = make(tiny_disk / "run")
    assert manager.flush_now(content(1, 10), WAIT_S)
    manager.flush_now(content(2, 20, size=100_000), WAIT_S)
    assert told.names == ["checkpoint", "checkpoint-failed"]
    assert "No space left" in told[-1][1]["reason"]
    assert manager.load_latest()[1].steps == 10
    assert len(list((tiny_disk / "run").iterdir())) == 1
    manager.flush_now(content(3, 30), WAIT_S)
    assert manager.load_latest()[1].steps == 30


DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.checkpoints.test_manager import content
from dask_nn import faults
from dask_nn.checkpoints.manager import CheckpointManager
from dask_nn.checkpoints.options import Checkpoint
manager = CheckpointManager(Checkpoint(sys.argv[1]))
manager.flush_now(content(1, 10), 20)
faults.hook = lambda point, place: os.kill(os.getpid(), signal.SIGKILL)
manager.flush_now(content(2, 20), 20)
"""


def test_a_process_that_dies_while_it_writes(make, tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path / "run"), str(root)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    manager = make()
    assert manager.load_latest()[1].steps == 10
    manager.flush_now(content(2, 20), WAIT_S)
    assert manager.load_latest()[1].steps == 20


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "pickle"])
def test_a_damaged_checkpoint_is_passed_over(make, tmp_path, file, harm):
    manager = make()
    for epoch in (1, 2):
        manager.flush_now(content(epoch, 10 * epoch), WAIT_S)
    path = tmp_path / "run" / manager.names()[-1] / file
    data = bytearray(path.read_bytes())
    match harm:
        case "truncate":
            path.write_bytes(data[:-1])
        case "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "remove":
            path.unlink()
        case "pickle":
            path.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    found, manifest, skipped = manager.load_latest()
    assert manifest.steps == 10
    assert found.steps == 10
    # Without a manifest it counts as none, so there is nothing to pass over.
    assert len(skipped) == (0 if (file, harm) == ("manifest.json", "remove") else 1)
    assert not (tmp_path / "ran").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_damaged_checkpoint_is_written_again(make, tmp_path):
    manager = make()
    manager.flush_now(content(), WAIT_S)
    path = tmp_path / "run" / manager.names()[-1] / "model.safetensors"
    path.write_bytes(b"")
    manager.flush_now(content(), WAIT_S)
    assert manager.load_latest()[1].steps == 10


def test_the_same_checkpoint_is_not_written_twice(make, tmp_path):
    manager = make()
    manager.flush_now(content(), WAIT_S)
    path = tmp_path / "run" / manager.names()[-1] / "manifest.json"
    before = path.stat().st_mtime_ns
    time.sleep(0.01)
    manager.flush_now(content(), WAIT_S)
    assert path.stat().st_mtime_ns == before


def test_no_valid_one_is_an_error_that_lists_them(make, tmp_path):
    manager = make()
    for epoch in (1, 2):
        manager.flush_now(content(epoch, 10 * epoch), WAIT_S)
        (tmp_path / "run" / manager.names()[-1] / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)epoch-0002.*epoch-0001"):
        manager.load_latest()


def test_a_place_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run"):
        make(tmp_path / "file" / "run").check_writable()
    make().check_writable()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_kind_of_storage_that_is_not_known(make):
    with pytest.raises(CheckpointError, match="nowhere://"):
        make("nowhere://bucket/run")
