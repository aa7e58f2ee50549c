"""Gangs that were given up write nothing, on shared folders as on object stores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from tests.checkpoints.test_manager import WAIT_S, Told, content, steps_of, write

from dask_nn import faults
from dask_nn.checkpoints import fence as fence_module
from dask_nn.checkpoints.awake import SLEPT_S, SleepWatch
from dask_nn.checkpoints.fence import CLAIM, Claim, Fence
from dask_nn.checkpoints.manager import CheckpointManager
from dask_nn.checkpoints.options import Checkpoint
from dask_nn.checkpoints.storage import Storage

START = (0, 0)


@pytest.fixture
def told():
    return Told()


@pytest.fixture(params=["folder", "object store"])
def url(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "run")
    return f"memory://dask-nn-test/{uuid.uuid4().hex}"


@pytest.fixture
def gang(url, told):
    """Give a function that makes the manager of some gang's rank 0."""
    with contextlib.ExitStack() as stack:

        def make(generation, run_id="run", **options):
            manager = CheckpointManager(Checkpoint(url, **options), on_event=told)
            stack.callback(manager.close)
            manager.claim(run_id, generation, START)
            wait_for_claim(url, run_id, generation)
            return manager

        yield make


def wait_for_claim(url, run_id, generation):
    storage, deadline = Storage(url), time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = Claim.of(storage.read("", CLAIM))
            if (found.run_id, found.generation) >= (run_id, generation):
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def of(generation, epoch, steps, run_id="run", **given):
    return content(epoch, steps, run_id=run_id, generation=generation, **given)


def test_an_older_gang_writes_and_removes_nothing(gang, told):
    old = gang(0, keep=1)
    new = gang(1, keep=None)
    for epoch in (1, 2):
        write(new, of(1, epoch, 10 * epoch))
    told.clear()
    write(old, of(0, 3, 30))
    ((name, details),) = told
    assert name == "checkpoint-skipped"
    assert "gang 1 of this run writes there now" in details["reason"]
    assert [steps_of(name) for name in new.names()] == [10, 20]


def test_a_run_that_was_taken_up_elsewhere_is_told(gang, told):
    old = gang(5, run_id="a")
    new = gang(0, run_id="b")
    write(old, of(5, 3, 30, run_id="a"))
    ((name, details),) = told
    assert name == "checkpoint-failed"
    assert "another run (b)" in details["reason"]
    write(new, of(0, 1, 10, run_id="b"))
    assert [steps_of(name) for name in new.names()] == [10]


@pytest.mark.parametrize("newer", [False, True])
def test_what_was_begun_before_counts_unless_something_newer_is_there(
    gang, told, monkeypatch, newer
):
    """The thread of a rank that ended in order goes on writing while the next gang begins."""
    entered, go_on, first = threading.Event(), threading.Event(), []

    def wait(point, place):
        first.append(threading.current_thread())
        if threading.current_thread() is first[0] and not go_on.is_set():
            entered.set()
            go_on.wait(WAIT_S)

    monkeypatch.setattr(faults, "hook", wait)
    old = gang(0)
    old.save(of(0, 1, 10))
    assert entered.wait(WAIT_S)
    new = gang(1)
    if newer:
        write(new, of(1, 2, 20))
    go_on.set()
    assert old.wait(WAIT_S)
    assert told.names[-1] == ("checkpoint-skipped" if newer else "checkpoint")
    assert [steps_of(name) for name in new.names()] == ([20] if newer else [10])
    assert new.load_latest()


def test_what_a_newer_gang_wrote_is_never_replaced(url, told):
    """Even by one that looked before its successor left its name."""
    new, old = (CheckpointManager(Checkpoint(url), on_event=told) for _ in range(2))
    write(new, of(1, 2, 20, size=8))
    write(old, of(0, 2, 20, size=4))
    assert told.names == ["checkpoint", "checkpoint-skipped"]
    assert new.load_latest()[0].tree["weights"]["b.weight"].numel() == 8
    for manager in (new, old):
        manager.close()


def test_the_name_of_an_older_gang_that_came_late_is_replaced(url):
    storage = Storage(url)
    new = Fence(storage, "run", 1)
    new.claim()
    late = Claim(run_id="run", generation=0, term=1)
    storage.write("", CLAIM, f'{{"run_id": "run", "generation": 0, "term": {late.term}}}'.encode())
    new.enter()
    assert Claim.of(storage.read("", CLAIM)).generation == 1
    storage.remove("", CLAIM)  # somebody emptied the folder
    new.enter()
    assert new.holds()


def test_a_storage_that_fails_at_first_is_claimed_before_anything_is_written(
    url, told, monkeypatch
):
    old = CheckpointManager(Checkpoint(url), on_event=told)
    old.claim("run", 0, START)
    wait_for_claim(url, "run", 0)
    new = CheckpointManager(Checkpoint(url), on_event=told)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(new._storage, "write", fail)
        new.claim("run", 1, START)
        write(new, of(1, 1, 10))
    write(new, of(1, 2, 20))
    write(old, of(0, 3, 30))
    assert told.names == ["checkpoint-failed", "checkpoint", "checkpoint-skipped"]
    for manager in (new, old):
        manager.close()


SLEEPER = """
import sys, time
from dask_nn.checkpoints.awake import SleepWatch
watch = SleepWatch()
watch.start()
print("awake", watch.awake_s(), flush=True)
sys.stdin.readline()
print("awake", watch.awake_s(), flush=True)
watch.stay_awake(1.0)
print("awake", watch.awake_s(), flush=True)
"""


def test_a_process_that_was_stopped_knows_it_at_once():
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "awake inf\n"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            time.sleep(SLEPT_S + 0.5)  # what is measured is time
            process.stdin.write("\n")
            process.stdin.flush()
            process.send_signal(signal.SIGCONT)
            assert float(process.stdout.readline().split()[1]) < SLEPT_S
            assert float(process.stdout.readline().split()[1]) >= 1.0
        finally:
            process.kill()


def test_a_process_that_works_hard_is_awake():
    watch = SleepWatch()
    watch.start()
    end = time.monotonic() + 2 * SLEPT_S
    while time.monotonic() < end:
        sum(range(10_000))
    assert watch.awake_s() == float("inf")
    watch.close()


def test_a_process_that_never_stays_awake_does_not_wait_for_ever(monkeypatch):
    watch = SleepWatch()
    monkeypatch.setattr(watch, "awake_s", lambda: 0.0)
    began = time.monotonic()
    watch.stay_awake(0.1)
    assert time.monotonic() - began >= 0.3


STOPPED = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.checkpoints.test_fence import START, of, wait_for_claim
from dask_nn.checkpoints.manager import CheckpointManager
from dask_nn.checkpoints.options import Checkpoint
manager = CheckpointManager(
    Checkpoint(sys.argv[1], keep=1), on_event=lambda name, _: print(name, flush=True)
)
manager.claim("run", 0, START)
wait_for_claim(sys.argv[1], "run", 0)
print("claimed", flush=True)
sys.stdin.readline()
manager.save(of(0, 3, 30))
manager.wait(60)
"""


def test_a_stopped_process_that_wakes_up_before_its_successor_has_left_its_name(
    tmp_path, monkeypatch
):
    """It waits a while: its successor may only be starting."""
    root, run = Path(__file__).resolve().parents[2], tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(run), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "claimed\n"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            time.sleep(SLEPT_S + 0.5)  # what is measured is time
            process.stdin.write("\n")
            process.stdin.flush()
            process.send_signal(signal.SIGCONT)
            new = CheckpointManager(Checkpoint(run))
            time.sleep(fence_module.AWAKE_S / 5)  # a successor that takes its time
            new.claim("run", 1, START)
            assert process.stdout.readline() == "checkpoint-skipped\n"
            new.close()
        finally:
            process.kill()
    assert not list(run.glob("epoch-*"))
