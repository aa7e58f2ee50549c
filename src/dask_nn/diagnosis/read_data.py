"""How a data set is cut and where its blocks lie; nothing of it is computed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.core import flatten
from distributed.client import futures_of

from dask_nn.config import settings
from dask_nn.data.inputs.read import read_inputs
from dask_nn.diagnosis.facts import DataFacts
from dask_nn.errors import DaskNNError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["read_data", "with_places"]


def read_data(X: Any, y: Any = None, client: Client | None = None) -> DataFacts:
    """Describe data of any kind that ``train`` takes."""
    try:
        inputs = read_inputs(X, y, client=client, needs_target=False)
    except DaskNNError as error:
        return DataFacts(problem=str(error))
    fields = {name: _kind(array) for name, array in inputs.items()}
    row_bytes = sum(
        array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in inputs.values()
    )
    first = next((array for array in inputs.values() if isinstance(array, da.Array)), None)
    if first is None:
        array = next(iter(inputs.values()))
        size = max(1, settings().block_size_bytes // max(1, array.nbytes // max(1, len(array))))
        lengths = [min(size, len(array) - start) for start in range(0, len(array), size)]
        return DataFacts(
            lengths=tuple(lengths), num_blocks=len(lengths), fields=fields, row_bytes=row_bytes
        )
    lengths = [] if np.isnan(first.shape[0]) else list(map(int, first.chunks[0]))
    return DataFacts(
        lengths=tuple(lengths), num_blocks=first.numblocks[0], fields=fields, row_bytes=row_bytes
    )


async def with_places(data: DataFacts, X: Any, client: Client, timeout_s: float) -> DataFacts:
    """Add which worker holds how many rows, for a collection that is persisted.

    Where the scheduler does not tell in time, the reason is added instead.
    """
    if isinstance(X, dict):
        X = next(iter(X.values()), None)
    futures = futures_of(X)
    if not futures or client.scheduler is None:
        return data
    keys = [future.key for future in futures]
    try:
        async with asyncio.timeout(timeout_s):
            found = await client.scheduler.who_has(keys=keys)
    except TimeoutError:
        return replace(data, places_problem=f"no answer of the scheduler within {timeout_s:g} s")
    rows = dict.fromkeys(keys, 1) if not data.lengths else {}
    for key in flatten(X.__dask_keys__()):
        # Of several chunks across the columns, the first stands for its block.
        if data.lengths and isinstance(key, tuple) and not any(key[2:]):
            rows[key] = data.lengths[key[1]]
    held: dict[str, int] = {}
    for key, number in rows.items():
        for address in found.get(key, ()):
            held[address] = held.get(address, 0) + number
    return replace(data, rows_held=held)


def _kind(array: Any) -> str:
    shape = tuple(array.shape[1:])
    return f"{array.dtype}{list(shape) if shape else ''}"
