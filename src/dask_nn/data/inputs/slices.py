"""Blocks that are too large for a worker, read in slices of rows where their source can do that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.utils import format_bytes
from distributed import Client
from distributed.client import futures_of

from dask_nn.data.memory import PROCESS_SHARE, Room
from dask_nn.data.recipes import split_source
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["cut_to_fit"]


def cut_to_fit(arrays: dict[str, Any]) -> dict[str, Any]:
    """Cut blocks that are larger than a worker of the current client can work on.

    Parameters
    ----------
    arrays : dict of str to array
        Dask or NumPy arrays of the same rows. Blocks of unknown length stay as they are, and so
        do those that the cluster holds already.

    Returns
    -------
    dict of str to array
        The first Dask array decides how rows are cut.

    Raises
    ------
    DataError
        If a block is too large and its source cannot be read in slices; names it.
    """
    lazy = {name: array for name, array in arrays.items() if isinstance(array, da.Array)}
    if not lazy or any(np.isnan(array.nbytes) for array in lazy.values()):
        return arrays
    name, reference = next(iter(lazy.items()))
    row_bytes = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in lazy.values())
    largest = max(reference.chunks[0], default=0)
    found = _room()
    if found is None:
        return arrays
    limit_bytes, threads = found
    if largest * row_bytes <= limit_bytes or any(futures_of(array) for array in lazy.values()):
        return arrays
    # Every thread of a worker has one, and its allocator may still keep the one before.
    rows = max(1, limit_bytes // (2 * threads * max(1, row_bytes)))
    if (smaller := split_source(reference, rows)) is None:
        message = (
            f"block {reference.chunks[0].index(largest)} of {name} has "
            f"{format_bytes(largest * row_bytes)}, more than a worker can work on "
            f"({format_bytes(limit_bytes)}), and it is computed as a whole: rechunk it where it "
            "is made, or use workers with more memory"
        )
        raise DataError(message)
    return arrays | {name: smaller} | _cut_alike(lazy, name, smaller, rows)


def _cut_alike(
    lazy: Mapping[str, da.Array], name: str, smaller: da.Array, rows: int
) -> dict[str, da.Array]:
    """Read other arrays of the same blocks in slices too, where that can be done."""
    found = {}
    for other, array in lazy.items():
        if other == name or array.chunks[0] != lazy[name].chunks[0]:
            continue
        cut = split_source(array, rows)
        if cut is not None and cut.chunks[0] == smaller.chunks[0]:
            found[other] = cut
    return found


def _room() -> tuple[int, int] | None:
    """Give the largest block that every worker can work on, and the most threads of one."""
    try:
        client = Client.current()
    except ValueError:
        return None
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    # By the limit alone, not by what a process uses now: the same call cuts the same blocks.
    rooms = [
        Room(held_bytes=0, worker_bytes=int(worker["memory_limit"] * PROCESS_SHARE)).block_bytes
        for worker in workers
        if worker["memory_limit"]
    ]
    known = [room for room in rooms if room is not None]
    return (min(known), max(worker["nthreads"] for worker in workers)) if known else None
