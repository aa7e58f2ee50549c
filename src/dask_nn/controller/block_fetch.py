"""How a rank gets hold of blocks that other workers have."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from distributed.utils import sync
from distributed.utils_comm import gather_from_workers

from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import threading

    from distributed import Worker

    from dask_nn.data.reader import ClusterReader

__all__ = ["make_reader"]

# Fetched blocks are kept up to this share of a worker's memory limit.
CACHE_SHARE = 0.15
CACHE_WITHOUT_LIMIT_BYTES = 1 << 30
# Blocks of a lost worker are computed again, or sent again by the client; for so long are they
# looked for, and one attempt may take so long before other holders are asked.
FETCH_S = 120.0
ATTEMPT_S = 60.0
LOOK_S = 1.0
PAUSE_S = 0.2
POLL_S = 0.1


def make_reader(
    worker: Worker,
    keys: tuple[tuple[Any, ...], ...],
    *,
    size_bytes: int,
    uses: float,
    abort: threading.Event,
) -> ClusterReader:
    """Make the reader of some blocks.

    Parameters
    ----------
    worker : Worker
        Whose memory is looked at first.
    keys : tuple of tuple
        For each block the Dask key of each field.
    size_bytes : int
        Stored size of all of them.
    uses : float
        How often this rank will read each of them.
    abort : threading.Event
        Ends a fetch that is under way.
    """
    from dask_nn.data.reader import ClusterReader

    limit = worker.memory_manager.memory_limit
    cache_bytes = int(limit * CACHE_SHARE) if limit else CACHE_WITHOUT_LIMIT_BYTES
    return ClusterReader(
        keys,
        own=worker.data,
        fetch=lambda wanted: sync(worker.loop, _gather, worker, wanted, abort),
        cache_bytes=cache_bytes,
        fetch_whole=uses >= 1 and size_bytes <= cache_bytes,
    )


async def _gather(worker: Worker, wanted: list[Any], abort: threading.Event) -> list[Any]:
    found: dict[Any, Any] = {}
    deadline = time.monotonic() + FETCH_S
    while True:
        missing = [key for key in wanted if key not in found]
        found |= await _attempt(worker, missing, abort)
        if len(found) == len(set(wanted)):
            return [found[key] for key in wanted]
        if time.monotonic() > deadline:
            lacking = [key for key in wanted if key not in found]
            message = f"blocks {lacking} are on no worker any more; was their future cancelled?"
            raise RuntimeError(message)
        await asyncio.sleep(PAUSE_S)


async def _attempt(worker: Worker, wanted: list[Any], abort: threading.Event) -> dict[Any, Any]:
    """Ask those who have the blocks, once; give up a peer that the scheduler has given up."""
    who_has = await worker.scheduler.who_has(keys=wanted)
    present = {key: addresses for key, addresses in who_has.items() if addresses}
    task = asyncio.ensure_future(gather_from_workers(present, rpc=worker.rpc))
    now = time.monotonic()
    deadline, look = now + ATTEMPT_S, now + LOOK_S
    while not task.done():
        await asyncio.wait([task], timeout=POLL_S)
        now = time.monotonic()
        gone = False
        if now > look and not task.done():
            look = now + LOOK_S
            still = await worker.scheduler.who_has(keys=list(present))
            gone = any(not set(still[key]) & set(holders) for key, holders in present.items())
        if abort.is_set() or gone or now > deadline:
            task.cancel()
            await asyncio.wait([task])
            break
    if abort.is_set():
        message = "told to end while fetching blocks"
        raise Aborted(message)
    if task.cancelled() or task.exception() is not None:
        return {}
    return dict(task.result()[0])
