"""How a rank gets hold of blocks that other workers have."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
from distributed.utils import sync
from distributed.utils_comm import gather_from_workers

from dask_nn.data.memory import PROCESS_SHARE, choose_loaders
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from distributed import Worker

    from dask_nn.data.reader import BlockReader
    from dask_nn.data.stream import Stream

    type BlockSource = tuple[tuple[Any, ...], ...] | Stream

__all__ = [
    "CACHE_SHARE",
    "BlockSource",
    "FetchWait",
    "make_reader",
    "room_bytes",
    "used_bytes",
]

# Fetched blocks are kept up to this share of a worker's memory limit.
CACHE_SHARE = 0.15
CACHE_WITHOUT_LIMIT_BYTES = 1 << 30
# Blocks of a lost worker are sent again by the client, or computed again by Dask. They are looked
# for as long as Dask works on them, and so long where nobody does.
FETCH_S = 30.0
UNDER_WAY = frozenset({"waiting", "queued", "processing"})
ASK_S = 10.0
LOOK_S = 1.0
PAUSE_S = 0.2
POLL_S = 0.1


class FetchWait:
    """Whom the fetches of a rank wait for, as its watchman reports it."""

    def __init__(self) -> None:
        self._waits: dict[object, tuple[frozenset[str], float]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def for_holders(self, holders: frozenset[str]) -> Iterator[None]:
        """Note that a fetch waits for some workers, for the length of a block."""
        token = object()
        with self._lock:
            self._waits[token] = (holders, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._waits[token]

    @property
    def under_way(self) -> tuple[frozenset[str], float]:
        """The workers that the longest of the fetches waits for, and since when."""
        with self._lock:
            nobody: tuple[frozenset[str], float] = (frozenset(), time.monotonic())
            return min(self._waits.values(), key=lambda wait: wait[1], default=nobody)


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
    lengths: tuple[int, ...],
    names: tuple[str, ...],
    size_bytes: int,
    uses: float,
    abort: threading.Event,
    wait: FetchWait | None = None,
) -> BlockReader:
    """Make the reader of some blocks.

    Parameters
    ----------
    worker : Worker
        Whose memory is looked at first.
    data : tuple of tuple, or Stream
        For each block the Dask key of each field, or how blocks are computed.
    lengths : tuple of int
        Rows of each block.
    names : tuple of str
        Of the fields.
    size_bytes : int
        Stored size of all of them.
    uses : float
        How often this rank will read each of them.
    abort : threading.Event
        Ends a fetch that is under way.
    wait : FetchWait, optional
        Told whom a fetch waits for.
    """
    from dask_nn.data.reader import ClusterReader, StreamReader
    from dask_nn.data.stream import Stream

    told = FetchWait() if wait is None else wait

    def fetch(wanted: list[Any]) -> list[Any]:
        found: list[Any] = sync(worker.loop, _gather, worker, wanted, abort, told)
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
        lengths=lengths,
        names=names,
        own=worker.data,
        fetch=fetch,
        cache_bytes=cache_bytes,
        fetch_whole=uses >= 1 and size_bytes <= cache_bytes,
    )


def _check(abort: threading.Event) -> None:
    if abort.is_set():
        message = "told to end while computing blocks"
        raise Aborted(message)


async def _gather(
    worker: Worker, wanted: list[Any], abort: threading.Event, wait: FetchWait
) -> list[Any]:
    found: dict[Any, Any] = {}
    missing = list(dict.fromkeys(wanted))
    lost_s = 0.0
    while True:
        began = time.monotonic()
        who_has = await _unless(abort, worker.scheduler.who_has(keys=missing), timeout_s=ASK_S)
        holders = {key: tuple(who) for key, who in (who_has or {}).items() if who}
        if holders:
            # For as long as it takes: the client is told, and gives up a holder that hangs.
            with wait.for_holders(frozenset().union(*holders.values())):
                found |= await _attempt(worker, holders, abort)
            began = time.monotonic()
        missing = [key for key in missing if key not in found]
        if not missing:
            return [found[key] for key in wanted]
        asked = worker.scheduler.get_task_status(keys=missing)
        states = await _unless(abort, asked, timeout_s=ASK_S) or {}
        await asyncio.sleep(PAUSE_S)
        under_way = any(states.get(key) in UNDER_WAY for key in missing)
        lost_s = 0.0 if under_way else lost_s + time.monotonic() - began
        if lost_s > FETCH_S:
            erred = [key for key in missing if states.get(key) == "erred"]
            what = "could not be computed again" if erred else "are on no worker any more"
            message = f"blocks {erred or missing} {what}; was their future cancelled?"
            raise Aborted(message)


async def _attempt(
    worker: Worker, holders: dict[Any, tuple[str, ...]], abort: threading.Event
) -> dict[Any, Any]:
    """Ask those who have the blocks, once; give up a peer that the scheduler has given up."""

    async def until_gone() -> None:
        held = True
        while held:
            await asyncio.sleep(LOOK_S)
            still = await worker.scheduler.who_has(keys=list(holders))
            held = all(set(still[key]) & set(who) for key, who in holders.items())

    gather = asyncio.ensure_future(gather_from_workers(holders, rpc=worker.rpc))
    look = asyncio.ensure_future(until_gone())
    try:
        await _unless(abort, asyncio.wait({gather, look}, return_when=asyncio.FIRST_COMPLETED))
    finally:
        gather.cancel()
        look.cancel()
        results = await asyncio.gather(gather, look, return_exceptions=True)
    return {} if isinstance(results[0], BaseException) else dict(results[0][0])


async def _unless[T](
    abort: threading.Event, answer: Awaitable[T], *, timeout_s: float | None = None
) -> T | None:
    """Wait for an answer; None if there is none, or not in time.

    Raises
    ------
    Aborted
        Once the flag is set.
    """
    task = asyncio.ensure_future(answer)
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    try:
        while not task.done() and time.monotonic() < deadline:
            await asyncio.wait([task], timeout=POLL_S)
            if abort.is_set():
                message = "told to end while fetching blocks"
                raise Aborted(message)
    finally:
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(result, OSError | asyncio.CancelledError):
        return None
    if isinstance(result, BaseException):
        raise result
    return result
