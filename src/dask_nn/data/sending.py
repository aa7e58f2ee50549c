"""Values sent from the client to the memory of workers, whoever dies meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes
from distributed import wait

from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from distributed import Client, Future

__all__ = ["gather", "send", "send_lost", "wait_while_able"]

PATIENCE_S = 10.0
PAUSE_S = 0.2
LOOK_S = 1.0


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
    ClusterError
        If no worker takes anything for ten seconds, because there is none, or because all are
        paused for want of memory.
    OSError, KeyError
        What Dask raises where a worker dies while it is sent something, if that goes on for ten
        seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.scatter(data, hash=False, timeout=PATIENCE_S, **options)
        except (OSError, KeyError) as error:  # the scheduler looks up a worker that has just left
            if client.status != "running":
                raise
            if time.monotonic() > deadline:
                _explain(client, error)
                raise
            time.sleep(PAUSE_S)


def gather(client: Client, futures: Sequence[Future[Any]]) -> list[Any]:
    """Wait for tasks and give what they return.

    Raises
    ------
    ClusterError
        If no worker takes work for ten seconds: all are paused for want of memory, or gone.
    Exception
        What a task raised.
    """
    wait_while_able(client, futures)
    found: list[Any] = client.gather(list(futures))
    return found


def wait_while_able(client: Client, futures: Sequence[Future[Any]]) -> None:
    """Wait until tasks have ended, well or not, as long as there are workers that take work.

    Raises
    ------
    ClusterError
        If no worker takes work for ten seconds.
    """
    idle_since: float | None = None
    with client.as_current():
        while not _have_ended(futures, LOOK_S):
            able = any(
                worker["status"] == "running"
                for worker in client.scheduler_info(n_workers=-1)["workers"].values()
            )
            now = time.monotonic()
            idle_since = None if able else idle_since or now
            if idle_since is not None and now - idle_since > PATIENCE_S:
                late = TimeoutError("no task was begun")
                _explain(client, late)


def _have_ended(futures: Sequence[Future[Any]], timeout_s: float) -> bool:
    """Wait for tasks for a moment; tell whether all have ended."""
    try:
        wait(list(futures), timeout=timeout_s)
    except TimeoutError:
        return False
    return True


def _explain(client: Client, error: Exception) -> None:
    """Say what is wrong with the workers, if none of them takes work."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if any(worker["status"] == "running" for worker in workers.values()):
        return
    if not workers:
        message = "the cluster has no workers that could hold or read data"
        raise ClusterError(message) from error
    states = ", ".join(
        f"{address} is {worker['status']} with {format_bytes(worker['metrics']['memory'])} of "
        f"{format_bytes(worker['memory_limit'])} in use"
        for address, worker in sorted(workers.items())
    )
    message = (
        f"no worker takes data or work: {states}; give the workers more memory (memory_limit), or "
        "use more of them"
    )
    raise ClusterError(message) from error


def send_lost(client: Client, pieces: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Send those of some arrays that no worker has any more; return their number."""
    if not pieces:
        return 0
    held = client.who_has()
    lost = {key: array for key, array in pieces.items() if not held.get(key)}
    if lost:
        send(client, lost)
    return len(lost)
