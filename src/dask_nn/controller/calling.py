"""From where ``train`` is called: the client to use, and signals that end the process."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from distributed import Client, worker_client
from distributed.client import default_client
from distributed.worker import thread_state

from dask_nn.errors import ClusterError, ConfigurationError
from dask_nn.interrupts import handling, interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cluster_of", "ending_cleanly"]


@contextlib.contextmanager
def cluster_of(client: Client | None) -> Iterator[Client | None]:
    """Give the client to use: the given one, the current one, or None if there is none.

    Inside a Dask task it is the task's own cluster, and the task makes room on its worker for
    what it waits for.

    Parameters
    ----------
    client : Client or None
        What the user gave.

    Raises
    ------
    ConfigurationError
        If it is no client, or an asynchronous one.
    ClusterError
        If it is not connected.
    """
    if hasattr(thread_state, "key"):
        with worker_client() as own:
            yield own if client is None else _checked(client)
        return
    if client is None:
        try:
            client = default_client()
        except ValueError:
            yield None
            return
    yield _checked(client)


def _checked(client: Client) -> Client:
    if not isinstance(client, Client):
        message = f"client must be a distributed.Client or None, got {type(client).__name__}"
        raise ConfigurationError(message)
    if client.asynchronous:
        message = "client is asynchronous; make one with Client(..., asynchronous=False)"
        raise ConfigurationError(message)
    if client.status != "running":
        message = f"client is {client.status}; connect a new one to the cluster"
        raise ClusterError(message)
    return client


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: what is trained is kept, and saved where there are checkpoints.

    Only where the signal would end the process anyway, and only in the main thread, which alone
    may decide about signals.
    """
    with handling(interrupt, "SIGTERM", instead_of=[signal.SIG_DFL]):
        yield
