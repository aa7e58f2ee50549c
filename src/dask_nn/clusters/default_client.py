"""The client of a cluster, which is the process's default one while the cluster is there."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client

from dask_nn.clusters.shared_setting import SharedSetting

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["default_client"]

CONNECT_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
SCHEDULER = "scheduler"


@contextmanager
def _same_scheduler_afterwards() -> Iterator[None]:
    before = dask.config.get(SCHEDULER, None)
    try:
        yield
    finally:
        dask.config.config.pop(SCHEDULER, None)
        if before is not None:
            dask.config.set({SCHEDULER: before})


# A default client leaves the setting that it found, and of clients that overlap that is another's.
same_scheduler_afterwards = SharedSetting(_same_scheduler_afterwards)


@contextmanager
def default_client(cluster: Any) -> Iterator[Client]:
    """Connect to a cluster for the length of a ``with`` block."""
    with same_scheduler_afterwards:
        client = Client(cluster, timeout=CONNECT_TIMEOUT_S, set_as_default=True)
        try:
            yield client
        finally:
            # What its end waits for ends with the cluster, and the block's result is not lost.
            with suppress(TimeoutError):
                client.close(timeout=CLOSE_TIMEOUT_S)
