from __future__ import annotations

import socket

import pytest

from dask_nn.clusters.dashboard_port import free_or_any


def test_a_busy_port_becomes_any() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert free_or_any(address) == "127.0.0.1:0"
    assert free_or_any(address) == address


@pytest.mark.parametrize("address", [":0", "localhost", "https://elsewhere/dashboard"])
def test_what_names_no_port_of_this_host_stays(address: str) -> None:
    assert free_or_any(address) == address
