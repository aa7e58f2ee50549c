"""A real sshd on loopback, with keys of its own."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import asyncssh
import dask
import pytest
from distributed import Security

import dask_nn
from dask_nn.clusters import ssh, ssh_hosts
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
    env = {"GREETING": 'it\'s "me" $HOME', "OMP_NUM_THREADS": "3"}
    with dask_nn.cluster("ssh", workers=2, env=env, **options(sshd)) as client:
        result = small_job.train(client)
        assert result.weights_sha256 == small_sha256
        assert result.run.world_size == 2
        for name, value in env.items():
            assert set(client.run(lambda name: os.environ[name], name).values()) == {value}
        # Without their client, scheduler and workers end by themselves.
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.idle_timeout) == 3600
        patience = client.run(lambda dask_worker: dask_worker.death_timeout)
        assert set(patience.values()) == {300}
        client.cluster.scale(3)
        client.wait_for_workers(3, timeout=60)
        started = spec_processes() - before
    assert end_by_themselves(started)


@pytest.mark.slow
def test_with_tls_the_certificates_travel_inside_ssh_and_are_removed(
    sshd, small_job, small_sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    plain = asyncssh.SSHClientConnection.create_process

    async def recorded(self: Any, command: str, *arguments: Any, **options: Any) -> Any:
        commands.append(command)
        return await plain(self, command, *arguments, **options)

    monkeypatch.setattr(asyncssh.SSHClientConnection, "create_process", recorded)
    folders = key_folders()
    with dask_nn.cluster("ssh", workers=1, security=True, **options(sshd)) as client:
        (address,) = client.run(os.getpid)
        assert address.startswith("tls://")
        assert small_job.train(client).weights_sha256 == small_sha256
    # Dask's configuration, in which keys could be, is on the command lines of both processes.
    written = re.findall(r'DASK_INTERNAL_INHERIT_CONFIG="(.*?)"', "\n".join(commands))
    configs = [dask.config.deserialize(text) for text in written]
    keys = [config["distributed"]["comm"]["tls"]["worker"]["key"] for config in configs]
    assert len(keys) == 2
    assert all(key.startswith("/tmp/dask-nn-") for key in keys)  # noqa: S108
    assert "PRIVATE KEY" not in f"{commands} {configs}"
    assert key_folders() == folders


def key_folders() -> set[Path]:
    folders = Path("/tmp").glob("dask-nn-*")  # noqa: S108
    return {folder for folder in folders if len(folder.name) == len("dask-nn-") + 32}


def test_no_keys_are_left_where_a_start_fails_and_else_it_is_told_where(
    sshd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent = []

    async def fails_at_the_last(*arguments: Any) -> None:
        sent.append(await ssh_hosts.send_certificates(*arguments))
        raise ClusterError("node7: No space left on device")

    monkeypatch.setattr(ssh, "send_certificates", fails_at_the_last)
    with (
        pytest.raises(ClusterError, match="node7"),
        dask_nn.cluster("ssh", workers=1, security=True, **options(sshd)),
    ):
        pass
    folder = Path(sent[0]["ca_file"]).parent
    assert not folder.exists()
    assert not caplog.text
    host = ssh_hosts.Host(name="node7", python="python", connect_options={"port": "?"})
    asyncio.run(ssh_hosts.remove_folder([host], str(folder)))
    assert f"node7: the certificates and keys in {folder} could not be removed" in caplog.text


def test_one_machine_of_two_names_gets_its_certificates_once_for_each(sshd, tmp_path: Path) -> None:
    """As do two machines of one name, behind several ports."""
    other = {**sshd.connect_options, "known_hosts": None}
    hosts = [
        ssh_hosts.Host(name="127.0.0.1", python=sys.executable, connect_options=options)
        for options in (sshd.connect_options, other)
    ]
    folder = tmp_path / "keys"

    async def send_and_remove() -> None:
        files = await ssh_hosts.send_certificates(hosts, str(folder), Security.temporary())
        assert len(files) == len(list(folder.iterdir()))
        await ssh_hosts.remove_folder(hosts, str(folder))

    asyncio.run(send_and_remove())
    assert not folder.exists()


def test_more_workers_than_a_host_has_gpus_are_refused(
    sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_hosts, "CARDS", "print('4,5')")
    with (
        pytest.raises(
            ConfigurationError,
            match="login there may use 2; ask",
        ),
        dask_nn.cluster("ssh", workers=3, gpus=1, **options(sshd)),
    ):
        pass


def test_each_worker_of_a_host_gets_one_of_its_gpus() -> None:
    asked = ClusterRequest(kind="ssh", workers=3, gpus=1, options={"hosts": ["a", "b", "c"]})
    hosts = ssh._hosts(asked)
    cards = {host.place: ["4", "5"] for host in hosts}

    async def commands() -> list[str]:
        cluster = ssh._make_cluster(asked, hosts, cards)
        made = [spec["options"]["remote_python"] for spec in cluster.worker_spec.values()]
        await cluster.close()
        return made

    made = asyncio.run(commands())
    assert [command.split()[1] for command in made] == [
        f"CUDA_VISIBLE_DEVICES={card}" for card in (4, 4, 5)
    ]


def test_a_preload_may_be_one_name() -> None:
    options = {"hosts": ["a", "b"], "worker_options": {"preload": "abc"}}
    asked = ClusterRequest(kind="ssh", options=options)
    assert ssh._worker_options(asked)["preload"] == ["abc", "torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hosts": ["127.0.0.1", "127.0.0.2"]},
            "127.0.0.2: SSH does not let us in.*Connect call failed",
        ),
        ({"remote_python": "/nowhere/python"}, "127.0.0.1: /nowhere/python failed.*remote_python="),
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
        ({"hosts": ["a", "b"], "worker_options": {"interface": "e'th"}}, "single quotes"),
        ({"host": ["a", "b"]}, "did you mean 'hosts'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_request(ClusterRequest(kind="ssh", options=options))
