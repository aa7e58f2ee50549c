"""A real sshd on loopback, with keys of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import dask_nn
from dask_nn.clusters.request import ClusterRequest
from dask_nn.clusters.ssh import check_request
from dask_nn.errors import ClusterError, ConfigurationError

LOCAL = {"host": "127.0.0.1", "dashboard_address": ":0"}


def options(sshd: Any, **others: Any) -> dict[str, Any]:
    return {
        "hosts": ["127.0.0.1", "127.0.0.1"],
        "connect_options": sshd.connect_options,
        "scheduler_options": LOCAL,
        "memory": "2 GB",
        **others,
    }


def spec_processes() -> set[int]:
    """Give the processes that SSHCluster starts, schedulers and nannies."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"distributed.cli.dask_spec" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def end_by_themselves(pids: set[int], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while pids & spec_processes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.usefixtures("soon_replaced")
def test_two_workers_train_with_equal_bits_and_a_third_can_join(
    sshd, small_job, small_sha256: str
) -> None:
    before = spec_processes()
    with dask_nn.cluster("ssh", workers=2, env={"GREETING": "hello"}, **options(sshd)) as client:
        result = small_job.train(client)
        assert result.weights_sha256 == small_sha256
        assert result.run.world_size == 2
        assert set(client.run(lambda: os.environ["GREETING"]).values()) == {"hello"}
        client.cluster.scale(3)
        client.wait_for_workers(3, timeout=60)
        started = spec_processes() - before
    assert end_by_themselves(started)


@pytest.mark.slow
def test_with_tls_the_certificates_travel_inside_ssh_and_are_removed(
    sshd, small_job, small_sha256: str
) -> None:
    folders = set(Path("/tmp").glob("dask-nn-*"))  # noqa: S108
    with dask_nn.cluster("ssh", workers=1, security=True, **options(sshd)) as client:
        (address,) = client.run(os.getpid)
        assert address.startswith("tls://")
        assert small_job.train(client).weights_sha256 == small_sha256
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert b"PRIVATE KEY" not in path.read_bytes()
            except OSError:
                continue
    left = set(Path("/tmp").glob("dask-nn-*")) - folders  # noqa: S108
    assert not [folder for folder in left if len(folder.name) == len("dask-nn-") + 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hosts": ["127.0.0.1", "127.0.0.2"]},
            "127.0.0.2: SSH does not let us in.*Connect call failed",
        ),
        ({"remote_python": "/nowhere/python"}, "127.0.0.1: /nowhere/python cannot run Dask"),
    ],
)
def test_a_host_that_cannot_be_used_is_named(sshd, changes: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ClusterError, match=message),
        dask_nn.cluster("ssh", **options(sshd, **changes)),
    ):
        pass


def test_a_login_that_is_refused_says_so(sshd) -> None:
    stranger = {**sshd.connect_options, "client_keys": [], "username": "nobody"}
    with (
        pytest.raises(ClusterError, match="Permission denied"),
        dask_nn.cluster("ssh", **options(sshd, connect_options=stranger)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs hosts"),
        ({"hosts": ["node1"]}, "needs hosts"),
        ({"hosts": ["a", "b"], "user": "me"}, "no option 'user'"),
        ({"hosts": ["a", "b"], "remote_python": ["python"]}, "a list of 1 and there are 2 hosts"),
        ({"hosts": ["a", "b"], "worker_options": {"n_workers": 2}}, "give workers= instead"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_request(ClusterRequest(kind="ssh", options=options))
