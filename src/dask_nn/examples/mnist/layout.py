"""Lay arrays out over the workers of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from distributed import wait

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["to_cluster"]

_ROWS_PER_BLOCK = 2_000


# Where all workers have just been lost, others come within this time, or none do.
_WORKERS_S = 60


def to_cluster(client: Client, values: np.ndarray, rows: int = _ROWS_PER_BLOCK) -> da.Array:
    """Lay an array out over the workers, block by block in turns.

    Parameters
    ----------
    client : distributed.Client
        A client of the cluster.
    values : numpy.ndarray
        Of any shape with at least one axis.
    rows : int, default 2,000
        Rows of a block.

    Returns
    -------
    dask.array.Array
        Persisted; block i of any two arrays of the same length is on the same worker.
    """
    client.wait_for_workers(1, timeout=_WORKERS_S)
    addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
    blocks = [values[start : start + rows] for start in range(0, len(values), rows)]
    # As tasks, not as scattered data: the scheduler can make the blocks of a lost worker again.
    futures: list[Any] = [
        client.submit(
            np.asarray,
            block,
            workers=[addresses[number % len(addresses)]],
            allow_other_workers=True,
            pure=False,
        )
        for number, block in enumerate(blocks)
    ]
    array = da.concatenate(
        [
            da.from_delayed(delayed(future), shape=block.shape, dtype=block.dtype)
            for future, block in zip(futures, blocks, strict=True)
        ]
    )
    persisted: da.Array = client.persist(array)
    wait(persisted)
    return persisted
