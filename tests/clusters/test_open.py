from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import dask_nn
from dask_nn.clusters.open import KINDS, check_request
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    from distributed import Client, LocalCluster

THREADS = {"processes": False, "dashboard_address": ":0"}


def opened(kind: str, **options: Any) -> None:
    with dask_nn.cluster(kind, **options):
        pass


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("slrum", "did you mean 'slurm'"), ("mainframe", "known are local, address, ssh")],
)
def test_an_unknown_kind_is_refused_with_those_that_exist(kind: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown kind of cluster '{kind}'; {hint}"):
        opened(kind)


@pytest.mark.parametrize(("kind", "extra"), [("slurm", "jobqueue"), ("ssh", "ssh")])
def test_a_missing_package_is_answered_with_the_line_that_installs_it(
    kind: str, extra: str
) -> None:
    """In an interpreter in which the package cannot be imported."""
    package = {"slurm": "dask_jobqueue", "ssh": "asyncssh"}[kind]
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "import dask_nn\n"
        "try:\n"
        f"    with dask_nn.cluster({kind!r}): pass\n"
        "except dask_nn.errors.ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"pip install 'dask-nn[{extra}]'" in done.stdout


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, dask_nn; dask_nn.cluster; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_every_kind_is_in_the_documentation_of_the_function() -> None:
    assert [kind for kind in KINDS if f'"{kind}"' not in str(dask_nn.cluster.__doc__)] == []


def test_a_local_cluster_scales_and_adapts() -> None:
    with dask_nn.cluster(workers=1, **THREADS) as client:
        client.cluster.scale(2)
        client.wait_for_workers(2, timeout=20)
    with dask_nn.cluster(adapt=(1, 2), **THREADS) as client:
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_processes_ends_the_block_as_ctrl_c_does(number: int) -> None:
    clients = []

    def interrupted() -> None:
        with dask_nn.cluster(workers=1, **THREADS) as client:
            clients.append(client)
            assert callable(signal.getsignal(number))
            signal.raise_signal(number)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt, match="SIG"):
        interrupted()
    assert clients[0].status == "closed"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with dask_nn.cluster(workers=1, **THREADS):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_local_cluster_trains_with_tls(small_job, small_sha256: str) -> None:
    with dask_nn.cluster(workers=2, security=True, dashboard_address=":0") as client:
        assert all(address.startswith("tls://") for address in client.run(os.getpid))
        assert small_job.train(client).weights_sha256 == small_sha256


def test_environment_variables_and_memory_reach_local_workers() -> None:
    options = {"preload": (), "dashboard_address": ":0"}
    with dask_nn.cluster(workers=1, memory="1 GB", env={"GREETING": "hello"}, **options) as client:
        assert set(client.run(lambda: os.environ["GREETING"]).values()) == {"hello"}
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        assert worker["memory_limit"] == 10**9


def test_local_workers_see_one_gpu_each_of_those_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with dask_nn.cluster(gpus=1, preload=(), dashboard_address=":0") as client:
        assert sorted(cards_of(client, 2)) == ["4", "5"]
        with pytest.raises(ConfigurationError, match="workers=3 with a GPU each"):
            client.cluster.scale(3)
        client.cluster.scale(1)
        assert len(cards_of(client, 1)) == 1
        client.cluster.scale(2)
        assert sorted(cards_of(client, 2)) == ["4", "5"]


def cards_of(client: Client, count: int) -> list[str]:
    """Wait until there are so many workers, and say what they see."""
    deadline = time.monotonic() + 30
    while len(client.scheduler_info(n_workers=-1)["workers"]) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return list(client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values())


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ({}, {"dashbord_address": ":0"}, "'dashbord_address'; did you mean 'dashboard_address'"),
        ({}, {"qeue": "debug"}, "no option 'qeue'"),
        ({"env": {"GREETING": "hello"}}, {"processes": False}, "env needs workers in processes"),
        ({"workers": 3, "gpus": 1}, {}, r"may use 2 \(CUDA_VISIBLE_DEVICES=4,5\)"),
        ({"adapt": (1, 3), "gpus": 1}, {}, "may use 2"),
        ({"walltime": "01:00:00"}, {}, "'local' is none; leave it out"),
    ],
)
def test_what_a_local_cluster_cannot_do_is_refused_before_it_starts(
    asked: dict[str, Any],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,-1,6")
    with pytest.raises(ConfigurationError, match=message):
        check_request(ClusterRequest(kind="local", **asked, options=options))
    with pytest.raises(ConfigurationError, match=message):
        opened("local", **asked, **options)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("ssh", "leave it out"), ("kubernetes", "activeDeadlineSeconds"), ("aws", "idle_timeout")],
)
def test_a_walltime_is_refused_where_no_batch_system_is(kind: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{kind}' is none; .*{words}"):
        opened(kind, walltime="01:00:00")


def test_workers_that_are_threads_are_preloaded_too(tmp_path: Path) -> None:
    path = tmp_path / "greeting.py"
    path.write_text("def dask_setup(worker): worker.greeting = 'hello'\n")
    with dask_nn.cluster(workers=1, preload=(str(path),), **THREADS) as client:
        greetings = client.run(lambda dask_worker: dask_worker.greeting)
    assert list(greetings.values()) == ["hello"]


def test_a_local_cluster_that_takes_too_long_is_an_error_and_gone(tmp_path: Path) -> None:
    path = tmp_path / "sleepy.py"
    path.write_text("import time\ntime.sleep(60)\n")
    options = {"preload": (str(path),), "dashboard_address": ":0"}
    start = time.monotonic()
    with pytest.raises(ClusterError, match="was not there within 1 s"):
        opened("local", workers=1, start_timeout_s=1, **options)
    assert time.monotonic() - start < 15


def test_what_keeps_a_local_worker_from_starting_is_told(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise OSError('no licence for this library')\n")
    with pytest.raises(ClusterError, match=r"did not start: .*no licence for this library"):
        opened("local", workers=1, preload=(str(path),), dashboard_address=":0")


def test_a_running_cluster_is_used_by_its_address(threads_cluster2: LocalCluster) -> None:
    address = threads_cluster2.scheduler_address
    with dask_nn.cluster("address", address=address, workers=2) as client:
        assert client.submit(sum, [1, 2]).result() == 3
    with pytest.raises(ClusterError, match="2 of 3 workers were at"):
        opened("address", address=address, workers=3, start_timeout_s=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs address, the one that `dask scheduler` prints"),
        ({"address": "tcp://10.0.0.5:8786", "cores": 2}, "cores would start some"),
        ({"address": "tcp://10.0.0.5:8786", "queue": "gpu"}, "queue would start some"),
        ({"address": "tls://10.0.0.5:8786", "security": True}, "the scheduler has its own"),
    ],
)
def test_a_running_cluster_cannot_be_asked_to_start_workers(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        opened("address", **options)


@pytest.mark.slow
def test_a_scheduler_with_tls_is_reached_with_its_certificates() -> None:
    with dask_nn.cluster(workers=1, security=True, **THREADS) as client:
        address = client.scheduler_info()["address"]
        options = {"address": address, "security": client.cluster.security}
        with dask_nn.cluster("address", **options) as other:
            assert other.submit(sum, [1, 2]).result() == 3
