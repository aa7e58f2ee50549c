from __future__ import annotations

import os
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


def write(manager, given):
    manager.save(given)
    return manager.wait(WAIT_S)


def steps_of(name):
    return int(name.rsplit("-", 1)[1])


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
        each.wait(WAIT_S)
        each.close()


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
    assert write(manager, given)
    found, manifest, skipped = manager.load_latest()
    assert not skipped
    assert list(found.tree["weights"]) == ["b.weight", "a.bias"]
    assert torch.equal(found.tree["weights"]["b.weight"], given.tree["weights"]["b.weight"])
    assert torch.equal(found.tree["optimizer"]["state"][0]["m"], torch.full((3,), 0.1))
    assert found.history == given.history
    assert manifest.configuration == {"shards": 4}
    assert "torch" in manifest.packages


def test_the_weights_are_a_file_of_their_own(make, tmp_path):
    write(make(), content())
    (folder,) = (tmp_path / "run").iterdir()
    weights, _ = load_weights(folder / "model.safetensors")
    assert list(weights) == ["b.weight", "a.bias"]


def test_the_newest_stay_and_the_best(make):
    manager = make(keep=2, best="val_loss")
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        write(manager, content(epoch, 10 * epoch, record={"val_loss": loss}))
    assert [name[:10] for name in manager.names()] == ["epoch-0001", "epoch-0003", "epoch-0004"]


def test_a_value_that_is_no_number_is_never_the_best(make):
    manager = make(keep=1, best="val_loss")
    for epoch, loss in enumerate((float("nan"), 0.5, 0.7, 0.9), start=1):
        write(manager, content(epoch=epoch, steps=10 * epoch, record={"val_loss": loss}))
    assert [int(name.split("-")[1]) for name in manager.names()] == [2, 4]


def test_the_newest_is_found_by_number(make):
    manager = make(keep=2)
    for epoch in (9_999, 10_000, 10_001):
        write(manager, content(epoch=epoch, steps=epoch))
    assert [int(name.split("-")[1]) for name in manager.names()] == [10_000, 10_001]
    assert manager.load_latest()[0].epoch == 10_001


def test_all_stay(make):
    manager = make(keep=None)
    for epoch in range(5):
        write(manager, content(epoch, 10 * epoch))
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
    assert manager.wait(WAIT_S)
    assert [name[:10] for name in manager.names()] == ["epoch-0001", "epoch-0003"]
    assert told.names.count("checkpoint-skipped") == 1


def test_a_full_disk(make, told, tiny_disk):
    manager = make(tiny_disk / "run")
    assert write(manager, content(1, 10))
    write(manager, content(2, 20, size=100_000))
    assert told.names == ["checkpoint", "checkpoint-failed"]
    assert "No space left" in told[-1][1]["reason"]
    assert manager.load_latest()[1].steps == 10
    assert len(list((tiny_disk / "run").iterdir())) == 1
    write(manager, content(3, 30))
    assert manager.load_latest()[1].steps == 30


DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.checkpoints.test_manager import content, write
from dask_nn import faults
from dask_nn.checkpoints.manager import CheckpointManager
from dask_nn.checkpoints.options import Checkpoint
manager = CheckpointManager(Checkpoint(sys.argv[1]))
write(manager, content(1, 10))
faults.hook = lambda point, place: os.kill(os.getpid(), signal.SIGKILL)
write(manager, content(2, 20))
"""


def test_a_process_that_dies_while_it_writes(make, tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path / "run"), str(root)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    manager = make()
    assert manager.load_latest()[1].steps == 10
    write(manager, content(2, 20))
    assert manager.load_latest()[1].steps == 20


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "pickle"])
def test_a_damaged_checkpoint_is_passed_over(make, tmp_path, file, harm):
    manager = make()
    for epoch in (1, 2):
        write(manager, content(epoch, 10 * epoch))
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
    write(manager, content())
    path = tmp_path / "run" / manager.names()[-1] / "model.safetensors"
    path.write_bytes(b"")
    write(manager, content())
    assert manager.load_latest()[1].steps == 10


def test_the_same_checkpoint_is_not_written_twice(make, tmp_path):
    manager = make()
    write(manager, content())
    path = tmp_path / "run" / manager.names()[-1] / "manifest.json"
    before = path.stat().st_mtime_ns
    time.sleep(0.01)
    write(manager, content())
    assert path.stat().st_mtime_ns == before


def test_no_valid_one_is_an_error_that_lists_them(make, tmp_path):
    manager = make()
    for epoch in (1, 2):
        write(manager, content(epoch, 10 * epoch))
        (tmp_path / "run" / manager.names()[-1] / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)epoch-0002.*epoch-0001"):
        manager.load_latest()


def test_a_place_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run"), make(tmp_path / "file" / "run").probe():
        pass
    with make().probe() as name:
        assert make().has_probe(name)
    assert not make().has_probe(name)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_kind_of_storage_that_is_not_known(make):
    with pytest.raises(CheckpointError, match="nowhere://"):
        make("nowhere://bucket/run")


def test_what_an_interrupted_write_left_is_removed_once_something_newer_is_whole(make, tmp_path):
    run = tmp_path / "run"
    gone = (
        "epoch-0001-step-000000010",
        ".epoch-0001-step-000000010.own-0.0a1b2c3d",
        ".epoch-0001-step-000000010.other-0.0a1b2c3d",
        ".removed.0a1b2c3d",
    )
    # Somebody may be at work on these.
    stay = (
        ".epoch-0001-step-000000010.new-0.0a1b2c3d",
        ".epoch-0001-step-000000010.own-2.0a1b2c3d",
        ".epoch-0009-step-000000090.own-1.0a1b2c3d",
        "notes",
    )
    for name in (*gone, *stay):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"half")
    hours_ago = time.time() - 2 * 3600
    os.utime(run / ".epoch-0001-step-000000010.other-0.0a1b2c3d", (hours_ago, hours_ago))
    write(make(), content(2, 20, run_id="own", generation=1))
    found = {path.name for path in run.iterdir()}
    assert found == {*stay, "epoch-0002-step-000000020"}


@pytest.mark.parametrize("url", [None, "memory://dask-nn-test/late"])
def test_what_somebody_is_writing_is_never_removed_and_never_becomes_half_a_checkpoint(
    make, hook, told, tmp_path, url
):
    """A writer is at work on an older step while another finishes a newer one, and clears up."""
    entered, go_on, first = threading.Event(), threading.Event(), []

    def wait(point, place):
        if not first:
            first.append(threading.current_thread())
        if threading.current_thread() is first[0] and not go_on.is_set():
            entered.set()
            go_on.wait(WAIT_S)

    hook(wait)
    url = url or tmp_path / "run"
    late, quick = make(url), make(url)
    late.save(content(1, 10, run_id="one"))
    assert entered.wait(WAIT_S)
    write(quick, content(2, 20, run_id="other"))
    go_on.set()
    assert late.wait(WAIT_S)
    assert told.names == ["checkpoint", "checkpoint"]
    assert [steps_of(name) for name in quick.names()] == [10, 20]
    for name in quick.names():
        assert quick._catalog.load(name)


@pytest.mark.parametrize("url", [None, "memory://dask-nn-test/robbed"])
def test_a_checkpoint_whose_files_vanish_while_it_is_written_is_none(
    make, hook, told, tmp_path, url
):
    url = url or tmp_path / "run"
    manager = make(url)
    write(manager, content(1, 10))

    def rob(point, place):
        for folder in manager._storage.folders():
            if "000000020" in folder:
                manager._storage.remove(folder)

    hook(rob)
    write(manager, content(2, 20))
    assert told.names == ["checkpoint", "checkpoint-failed"]
    assert [steps_of(name) for name in manager.names()] == [10]


def test_a_writer_that_fails_leaves_alone_what_another_writes_in_the_same_place(make, hook, told):
    """On an object store both write in place."""
    url = "memory://dask-nn-test/in-place"
    first_in, quick_in, go_on = threading.Event(), threading.Event(), threading.Event()
    threads = []

    def wait(point, place):
        me = threading.current_thread()
        if me not in threads:
            threads.append(me)
            if len(threads) == 1:
                first_in.set()
                quick_in.wait(WAIT_S)
                raise OSError(5, "Input/output error")
            quick_in.set()
            go_on.wait(WAIT_S)

    hook(wait)
    late, quick = make(url), make(url)
    late.save(content(2, 20))
    assert first_in.wait(WAIT_S)
    quick.save(content(2, 20))
    assert late.wait(WAIT_S)
    go_on.set()
    assert quick.wait(WAIT_S)
    assert told.names == ["checkpoint-failed", "checkpoint"]
    assert quick.load_latest()[1].steps == 20


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_damaged_checkpoints_take_no_place_of_new_ones(make, tmp_path, harm):
    """A run goes on from before the damaged ones: what it writes then is kept."""
    before = make(keep=2, best="val_loss")
    for epoch, loss in enumerate((0.1, 0.5, 0.6), start=1):
        write(before, content(epoch, 30 * epoch, record={"val_loss": loss}))
    for name in before.names()[-2:]:
        path = tmp_path / "run" / name / "model.safetensors"
        data = bytearray(path.read_bytes())
        if harm == "truncate":
            del data[-1]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
    manager = make(keep=2, best="val_loss")
    assert manager.load_latest()[1].steps == 30
    manager.claim("next", 0, (1, 30))
    usable = []
    for epoch, steps in ((1, 45), (2, 59), (2, 75), (3, 90), (4, 120)):
        write(manager, content(epoch, steps, run_id="next"))
        usable.append(manager.load_latest()[1].steps)
    assert usable == [45, 59, 75, 90, 120]
    assert [steps_of(name) for name in manager.names()] == [30, 90, 120]


def test_what_was_just_written_stays_whatever_lies_ahead(make):
    """A folder of another, longer run: the newest by number are not the newest of this one."""
    ahead = make(keep=2)
    for epoch in (8, 9):
        write(ahead, content(epoch, 10 * epoch))
    manager = make(keep=2)
    write(manager, content(1, 10))
    assert steps_of(manager.names()[0]) == 10


@pytest.mark.parametrize("same", [True, False])
def test_two_writers_of_one_checkpoint(make, hook, told, same):
    """A rank that was given up wakes up while, or after, its successor wrote the same step."""
    entered, go_on, first = threading.Event(), threading.Event(), []

    def wait(point, place):
        if not first:
            first.append(threading.current_thread())
        if threading.current_thread() is first[0]:
            entered.set()
            go_on.wait(WAIT_S)

    hook(wait)
    late, quick = make(), make()
    late.save(content(2, 20))
    assert entered.wait(WAIT_S)
    assert write(quick, content(2, 20, size=4 if same else 8))
    quick_wrote = quick.load_latest()[0].tree["weights"]["b.weight"].numel()
    assert quick_wrote == (4 if same else 8)
    go_on.set()
    assert late.wait(WAIT_S)
    assert told.names == ["checkpoint", "checkpoint"]
    assert len(quick.names()) == 1
    found, _, skipped = quick.load_latest()
    assert not skipped
    assert found.tree["weights"]["b.weight"].numel() == 4


def test_a_late_writer_that_fails_leaves_what_its_successor_wrote(make, hook, told, tmp_path):
    entered, go_on, first = threading.Event(), threading.Event(), []

    def fail_late(point, place):
        if not first:
            first.append(threading.current_thread())
        if threading.current_thread() is first[0]:
            entered.set()
            go_on.wait(WAIT_S)
            raise OSError(28, "No space left on device")

    hook(fail_late)
    late, quick = make(), make()
    late.save(content(2, 20))
    assert entered.wait(WAIT_S)
    assert write(quick, content(2, 20))
    go_on.set()
    assert late.wait(WAIT_S)
    assert told.names == ["checkpoint", "checkpoint-failed"]
    assert quick.load_latest()[1].steps == 20
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_equal_states_are_equal_bytes(make, tmp_path):
    write(make(tmp_path / "one"), content())
    write(make(tmp_path / "two"), content())
    for file in ("model.safetensors", "state.safetensors"):
        one, two = (next((tmp_path / n).iterdir()) / file for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_an_object_store_keeps_retires_and_survives_a_failure(make, hook, told):
    url = "memory://dask-nn-test/kept"
    manager = make(url, keep=2, best="val_loss")
    for epoch, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
        write(manager, content(epoch, 10 * epoch, record={"val_loss": loss}))
    assert [name[:10] for name in manager.names()] == ["epoch-0002", "epoch-0003", "epoch-0004"]

    def fail(point, place):
        raise OSError(5, "Input/output error")

    hook(fail)
    write(manager, content(5, 50, record={"val_loss": 0.2}))
    assert told.names[-1] == "checkpoint-failed"
    assert manager.load_latest()[1].steps == 40
    hook(None)
    write(manager, content(4, 40, size=9, record={"val_loss": 0.3}))  # in place of what was there
    assert manager.load_latest()[0].tree["weights"]["b.weight"].numel() == 9
