"""Values sent from the client to the memory of workers, whoever dies meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from distributed import Client

__all__ = ["send", "send_lost"]

PATIENCE_S = 10.0
PAUSE_S = 0.2


def send(client: Client, data: Any, **options: Any) -> Any:
    """Send something to workers' memory, and give the futures that keep it there.

    Parameters
    ----------
    client : Client
        Of the cluster.
    data, **options
        As for ``Client.scatter``: a dict from key to value, for example.

    Raises
    ------
    OSError, KeyError
        What Dask raises where there is no worker, or one dies while it is sent something, if that
        goes on for ten seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.scatter(data, hash=False, **options)
        except (OSError, KeyError):  # the scheduler looks up a worker that has just left
            if client.status != "running" or time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)


def send_lost(client: Client, pieces: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Send those of some arrays that no worker has any more; return their number."""
    if not pieces:
        return 0
    held = client.who_has()
    lost = {key: array for key, array in pieces.items() if not held.get(key)}
    if lost:
        send(client, lost)
    return len(lost)
