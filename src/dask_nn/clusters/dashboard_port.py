"""Where the dashboard listens, if its usual port is busy."""

from __future__ import annotations

import socket

__all__ = ["free_or_any"]


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
