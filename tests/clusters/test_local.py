from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import dask
import pytest
from distributed import Client

from dask_nn.clusters import default_client, local
from dask_nn.clusters.local import available_cores, local_cluster
from dask_nn.clusters.loop import loop_blind_to_interrupts, start_in, stop
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed.utils import LoopRunner

LOST_AFTER = "distributed.deploy.lost-worker-timeout"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def group_is_gone(pid: int) -> bool:
    """Tell whether no process of the group is left; Python's tracker ends a moment after it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give temporary files a folder of their own, here and in processes that tests start."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def nap(seconds: float) -> None:
    time.sleep(seconds)


def restarted(client: Client) -> int:
    """Kill the only worker; give the process of the one that its nanny starts instead."""
    [before] = client.run(os.getpid).values()
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pids = set(client.run(os.getpid, on_error="ignore").values()) - {before, None}
        if pids:
            return pids.pop()
        time.sleep(0.05)
    raise TimeoutError("no worker came")


def test_available_cores_are_those_of_the_affinity_mask_at_most() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("option", ["workers", "threads_per_worker"])
def test_counts_below_one_are_refused_before_anything_starts(option: str) -> None:
    with (
        pytest.raises(ConfigurationError, match=f"{option} must be at least 1, got 0"),
        local_cluster(**{option: 0}),
    ):
        pass


def test_nothing_is_left_after_the_block_even_of_a_worker_that_hangs(scratch: Path) -> None:
    with local_cluster(2, 2, preload=(), dashboard_address=":0") as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        assert [worker["nthreads"] for worker in workers.values()] == [2, 2]
        pids = list(client.run(os.getpid).values())
        hung = client.submit(nap, 60)
        start = time.monotonic()
    assert time.monotonic() - start < 3
    assert hung.status != "finished"
    assert not any(map(alive, pids))
    assert not list(scratch.iterdir())


def test_a_worker_that_hangs_is_gone_even_if_it_was_started_again() -> None:
    with local_cluster(1, preload=(), dashboard_address=":0") as client:
        pid = restarted(client)
        client.submit(nap, 60)
    assert not alive(pid)


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """Give something to import that takes longer than anyone waits."""
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(60)\n")
    return str(path)


@pytest.mark.parametrize("timeout_s", [0.01, 0.1, 1])
def test_workers_that_are_just_starting_are_gone(timeout_s: float, slow: str) -> None:
    before = multiprocessing.active_children()
    with (
        pytest.raises(ClusterError, match="not there within"),
        local_cluster(2, preload=[slow], dashboard_address=":0", start_timeout_s=timeout_s),
    ):
        pass
    assert set(multiprocessing.active_children()) <= set(before)


def test_a_nanny_that_gave_up_its_worker_leaves_nothing(slow: str) -> None:
    before = multiprocessing.active_children()
    with (
        pytest.raises(ClusterError, match="the local cluster did not start: TimeoutError"),
        local_cluster(1, preload=[slow], dashboard_address=":0", death_timeout=1),
    ):
        pass
    assert set(multiprocessing.active_children()) <= set(before)


class HungCluster:
    """Cannot be closed as long as it has processes."""

    scheduler = None
    workers: ClassVar[dict[int, Any]] = {}

    def __init__(self, runner: LoopRunner) -> None:
        self._runner = runner
        self._killed = threading.Event()
        self.loop_went_on = False

    async def close(self) -> None:
        while not self._killed.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        with contextlib.suppress(TimeoutError):
            start_in(self._runner, asyncio.sleep(0)).result(10)
            self.loop_went_on = True
        self._killed.set()


def test_the_event_loop_goes_on_while_processes_are_killed() -> None:
    runner = loop_blind_to_interrupts()
    hung: Any = HungCluster(runner)
    local._close(runner, [hung], hung, 0.1, None)
    stop(runner, 1)
    assert hung.loop_went_on


def test_what_others_started_meanwhile_outlives_a_cluster() -> None:
    own = multiprocessing.get_context("spawn").Process(target=nap, args=(60,))
    with ExitStack() as first, ExitStack() as second:
        second.callback(own.kill)
        hanging = first.enter_context(local_cluster(1, preload=(), dashboard_address=":0"))
        client = second.enter_context(local_cluster(1, preload=(), dashboard_address=":0"))
        workers = client.run(os.getpid)
        own.start()
        hanging.submit(nap, 60)
        first.close()
        assert own.is_alive()
        assert client.run(os.getpid) == workers


def test_clusters_that_overlap_leave_settings_as_they_were() -> None:
    def settings() -> tuple[Any, ...]:
        level = logging.getLogger("distributed").level
        return level, copy.deepcopy(dask.config.config) | {"scheduler": None}

    def scheduler() -> Any:
        return dask.config.get("scheduler", None)

    options: dict[str, Any] = {"processes": False, "dashboard_address": ":0"}
    before, computed_by = settings(), scheduler()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(local_cluster(1, **options))
        second.enter_context(local_cluster(1, **options))
        assert settings() == before
        first.close()
        assert settings() == before
        assert scheduler() == "dask.distributed"
    assert settings() == before
    assert scheduler() == computed_by


@pytest.fixture
def log() -> Iterator[logging.StreamHandler[io.StringIO]]:
    """Give a handler of Distributed's logger, as Distributed itself makes one."""
    handler = logging.StreamHandler(io.StringIO())
    logging.getLogger("distributed").addHandler(handler)
    yield handler
    logging.getLogger("distributed").removeHandler(handler)


def test_distributed_is_heard_inside_the_block_alone(log) -> None:
    with local_cluster(1, preload=(), dashboard_address=":0") as client:
        assert log.stream.getvalue() == ""
        assert restarted(client)
        assert "Restarting worker" in log.stream.getvalue()
        # What is no warning is kept back, however much Distributed would say.
        assert "killed by signal" not in log.stream.getvalue()
        told = log.stream.getvalue()
    assert log.stream.getvalue() == told


def test_clusters_that_overlap_are_heard_until_their_own_ends(log) -> None:
    options: dict[str, Any] = {"processes": False, "dashboard_address": ":0"}
    log.setLevel(logging.INFO)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(local_cluster(1, **options))
        second.enter_context(local_cluster(1, **options))
        for end in (lambda: None, first.close):
            end()
            logging.getLogger("distributed.scheduler").warning("heard")
            assert log.level == logging.WARNING
    assert log.stream.getvalue() == "heard\nheard\n"
    assert log.level == logging.INFO


def test_a_handler_that_says_less_goes_on_saying_less(log) -> None:
    log.setLevel(logging.ERROR)
    with local_cluster(1, processes=False, dashboard_address=":0"):
        assert log.level == logging.ERROR
    assert log.level == logging.ERROR


def test_a_client_whose_end_takes_long_does_not_replace_the_result(monkeypatch) -> None:
    monkeypatch.setattr(default_client, "CLOSE_TIMEOUT_S", 0.2)
    with local_cluster(1, processes=False, dashboard_address=":0") as client:
        client.loop.add_callback(time.sleep, 1.0)


def test_a_lost_worker_is_left_to_its_nanny() -> None:
    """However short a time the configuration gives it; another cluster keeps that time."""
    with (
        dask.config.set({LOST_AFTER: "1ms"}),
        local_cluster(1, preload=(), dashboard_address=":0") as client,
    ):
        assert restarted(client)
        cluster: Any = client.cluster
        assert list(cluster.workers) == [0]
        assert dask.config.get(LOST_AFTER) == "1ms"


@pytest.mark.parametrize("worker_class", ["no.such", "distributed.NoNanny"])
def test_a_kind_of_worker_that_there_is_not_is_refused(worker_class: str) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"cannot be made: .*(no|NoNanny)'"),
        local_cluster(1, dashboard_address=":0", worker_class=worker_class),
    ):
        pass


def test_workers_can_be_threads() -> None:
    with local_cluster(2, processes=False, dashboard_address=":0") as client:
        assert set(client.run(os.getpid).values()) == {os.getpid()}


def test_an_error_in_the_block_comes_out_of_it() -> None:
    options = {"processes": False, "dashboard_address": ":0"}
    with pytest.raises(ZeroDivisionError), local_cluster(1, **options):
        1 / 0  # noqa: B018


def test_workers_do_not_see_an_interrupt_of_the_process_group(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, time\n"
        "from dask_nn.clusters.local import local_cluster\n"
        "if __name__ == '__main__':\n"
        "    with local_cluster(2, preload=(), dashboard_address=':0') as client:\n"
        "        before = client.run(os.getpid)\n"
        "        try:\n"
        "            os.killpg(0, signal.SIGINT)\n"
        "            time.sleep(30)\n"
        "        except KeyboardInterrupt:\n"
        "            print('the client heard it')\n"
        "        print('equal' if client.run(os.getpid) == before else 'other workers')\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.stdout.split("\n")[:2] == ["the client heard it", "equal"]
    assert done.stderr == ""
    assert done.returncode == 0


def interrupted(folder: Path, before: str = "pass") -> tuple[str, str, int]:
    """Run a job that an interrupt stops at its start; give what it printed, and its group."""
    script = folder / "job.py"
    script.write_text(
        "import threading, os, signal\n"
        "from dask_nn.clusters.local import local_cluster\n"
        "if __name__ == '__main__':\n"
        f"    {before}\n"
        "    try:\n"
        "        with local_cluster(2, dashboard_address=':0'):\n"
        "            print('started')\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return *process.communicate(timeout=60), process.pid


def test_an_interrupt_while_the_workers_start_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    soon = "threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()"
    out, err, group = interrupted(tmp_path, soon)
    assert out == "stopped\n"
    assert err == ""
    assert not list(scratch.iterdir())
    assert group_is_gone(group)


def test_an_interrupt_while_the_scheduler_is_made_leaves_nothing(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop is busy meanwhile, as with the dashboard's modules on a slow machine."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "['slow_pages']")
    (tmp_path / "slow_pages.py").write_text(
        "import os, signal, time\nos.killpg(0, signal.SIGINT)\ntime.sleep(3)\nroutes = []\n"
    )
    out, err, group = interrupted(tmp_path)
    assert out == "stopped\n"
    assert err == ""
    assert not list(scratch.iterdir())
    assert group_is_gone(group)


def test_a_task_that_still_runs_keeps_nobody() -> None:
    task_s = 10.0
    with local_cluster(1, processes=False, dashboard_address=":0") as client:
        task = client.submit(time.sleep, task_s)
        while not any(client.processing().values()):
            time.sleep(0.05)
        began = time.monotonic()
    assert time.monotonic() - began < task_s / 2
    assert task.status != "finished"


def test_a_process_that_ends_before_its_task_says_nothing_of_what_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import time\n"
        "from dask_nn.clusters.local import local_cluster\n"
        "with local_cluster(1, processes=False, dashboard_address=':0') as client:\n"
        "    task = client.submit(time.sleep, 20)\n"
        "    while not any(client.processing().values()):\n"
        "        time.sleep(0.05)\n"
    )
    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_client_is_closed_with_its_cluster() -> None:
    with local_cluster(1, processes=False, dashboard_address=":0") as client:
        assert isinstance(client, Client)
    assert client.status == "closed"
