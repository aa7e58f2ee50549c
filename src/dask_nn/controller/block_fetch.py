"""How a rank gets hold of blocks that other workers have."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
from distributed.utils import sync
from distributed.utils_comm import gather_from_workers

from dask_nn.data.memory import PROCESS_SHARE, choose_loaders
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import threading

    from distributed import Worker

    from dask_nn.data.reader import BlockReader
    from dask_nn.data.stream import Stream

    type BlockSource = tuple[tuple[Any, ...], ...] | Stream

__all__ = ["CACHE_SHARE", "BlockSource", "make_reader", "room_bytes", "used_bytes"]

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


def used_bytes(worker: Worker) -> int:
    """Tell what a worker's process takes, besides the data that Dask holds there."""
    fast: Any = getattr(worker.data, "fast", None)
    held = int(getattr(fast, "total_weight", 0))
    return max(0, int(psutil.Process().memory_info().rss) - held)


def room_bytes(worker: Worker) -> int | None:
    """Tell what data may still take in a worker's process; None without a limit."""
    limit = worker.memory_manager.memory_limit
    if not limit:
        return None
    return max(0, int(limit * PROCESS_SHARE) - int(psutil.Process().memory_info().rss))


def make_reader(
    worker: Worker,
    data: BlockSource,
    *,
    size_bytes: int,
    uses: float,
    abort: threading.Event,
) -> BlockReader:
    """Make the reader of some blocks.

    Parameters
    ----------
    worker : Worker
        Whose memory is looked at first.
    data : tuple of tuple, or Stream
        For each block the Dask key of each field, or how blocks are computed.
    size_bytes : int
        Stored size of all of them.
    uses : float
        How often this rank will read each of them.
    abort : threading.Event
        Ends a fetch that is under way.
    """
    from dask_nn.data.reader import ClusterReader, StreamReader
    from dask_nn.data.stream import Stream

    def fetch(wanted: list[Any]) -> list[Any]:
        found: list[Any] = sync(worker.loop, _gather, worker, wanted, abort)
        return found

    if isinstance(data, Stream):
        return StreamReader(
            data,
            fetch_shared=fetch,
            place=worker.address,
            threads=choose_loaders(
                worker.state.nthreads,
                size_bytes * max(data.lengths, default=0) // max(1, sum(data.lengths)),
                int(worker.memory_manager.memory_limit or 0),
            ),
            check=partial(_check, abort),
        )
    limit = worker.memory_manager.memory_limit
    cache_bytes = int(limit * CACHE_SHARE) if limit else CACHE_WITHOUT_LIMIT_BYTES
    return ClusterReader(
        data,
        own=worker.data,
        fetch=fetch,
        cache_bytes=cache_bytes,
        fetch_whole=uses >= 1 and size_bytes <= cache_bytes,
    )


def _check(abort: threading.Event) -> None:
    if abort.is_set():
        message = "told to end while computing blocks"
        raise Aborted(message)


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
