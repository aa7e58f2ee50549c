from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

import dask_nn
from dask_nn.clusters import connect as connect_module
from dask_nn.clusters.connect import connect
from dask_nn.errors import SchedulerUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import LocalCluster


# Distributed forgets to close a socket that did not connect in time.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_what_distributed_forgot() -> Iterator[None]:
    yield
    gc.collect()


def test_it_connects_to_a_running_scheduler(threads_cluster2: LocalCluster) -> None:
    with connect(threads_cluster2.scheduler_address) as client:
        assert client.submit(sum, [1, 2]).result() == 3


def test_it_waits_for_a_scheduler_for_as_long_as_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect_module, "CONNECT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    with (
        pytest.raises(SchedulerUnreachable, match=r"within 0\.1 s"),
        dask_nn.cluster("address", address=address),
    ):
        pass
    # Python itself takes longer to start than the default here.
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as scheduler:
        try:
            with dask_nn.cluster("address", address=address, start_timeout_s=60) as client:
                assert client.scheduler_info()["address"] == address
        finally:
            scheduler.terminate()


def test_a_worker_is_told_from_a_scheduler(threads_cluster2: LocalCluster) -> None:
    address = threads_cluster2.workers[0].address
    with pytest.raises(SchedulerUnreachable, match="a Dask worker did"):
        connect(address, timeout_s=5)


@pytest.mark.parametrize("address", ["", "elsewhere", "carrier-pigeon://x"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(SchedulerUnreachable, match="expected the address"):
        connect(address, timeout_s=5)
    assert time.monotonic() - start < 2


def test_a_closed_port_is_reported_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(SchedulerUnreachable, match=address):
        connect(address, timeout_s=1)
    assert time.monotonic() - start < 3


def test_a_listener_that_is_no_scheduler_is_reported_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(SchedulerUnreachable, match=address):
            connect(address, timeout_s=1)
        assert time.monotonic() - start < 4


def test_a_listener_of_another_protocol_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SchedulerUnreachable, match=address):
            connect(address, timeout_s=5)
        thread.join(5)
        assert not thread.is_alive()
