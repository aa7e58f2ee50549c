"""Where the dashboard listens, if its usual port is busy."""

from __future__ import annotations

import socket
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dask_nn.clusters.shared_setting import SharedSetting

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["free_or_any", "no_warning_of_busy_ports"]


@contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        # A busy dashboard port is no problem: another one is taken, and its address is shown.
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        yield


no_warning_of_busy_ports = SharedSetting(_unwarned)


def free_or_any(address: str | int) -> str:
    """Give an address to listen at, with port 0 for any if its port is busy.

    Dask takes another port by itself, but with a warning, and leaves the first socket open.

    Parameters
    ----------
    address : str or int
        Such as ``"127.0.0.1:8787"``, ``":8787"`` or 8787.
    """
    if isinstance(address, int) or address.isdecimal():
        address = f":{address}"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return address
    try:
        with socket.create_server((host, int(port))):
            return address
    except OSError:
        return f"{host}:0"
