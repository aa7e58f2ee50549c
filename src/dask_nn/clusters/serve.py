"""Run any of Dask's clusters for the length of a block: start, wait, keep, and leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distributed.deploy.adaptive import Adaptive

from dask_nn.clusters.dashboard_port import no_warning_of_busy_ports
from dask_nn.clusters.default_client import default_client
from dask_nn.clusters.loop import loop_blind_to_interrupts, run_in, see_through, start_in, stop
from dask_nn.clusters.quiet import quiet, quiet_distributed
from dask_nn.clusters.reason import reason_of
from dask_nn.clusters.replacement import Replacement
from dask_nn.errors import ClusterError, DaskNNError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator

    from distributed import Client
    from distributed.deploy.cluster import Cluster
    from distributed.utils import LoopRunner

    from dask_nn.clusters.request import ClusterRequest

    type Ask = Callable[[Cluster], Awaitable[str]]

__all__ = ["KeptWorkers", "serve"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 15.0
# How often it is looked whether the workers are there.
LOOK_EVERY_S = 0.2
# Whether they can still come is asked of the platform: soon, then twice as late each time.
ASK_FIRST_AFTER_S = 2.0
ASK_EVERY_S_AT_MOST = 30.0


class KeptWorkers(Adaptive):
    """Keep as many workers as were last asked for with ``cluster.scale``.

    Dask's clusters forget a job that ended, ``adapt`` with a minimum brings it back; but a range of
    one number would undo ``cluster.scale``.
    """

    async def target(self) -> int:
        """Give the number of workers that were asked for."""
        return len(self.plan)


@contextmanager
def serve(
    request: ClusterRequest,
    make: Callable[[], Cluster | Awaitable[Cluster]],
    *,
    keep: bool = True,
    explain: Ask | None = None,
    hopeless: Ask | None = None,
    lost: Callable[[Cluster], Awaitable[Collection[Any]]] | None = None,
    close: Callable[[Cluster], Awaitable[None]] | None = None,
    close_timeout_s: float = CLOSE_TIMEOUT_S,
) -> Iterator[Client]:
    """Start a cluster, scale it, wait for its workers, and close it whatever happens.

    Parameters
    ----------
    request : ClusterRequest
        How many workers, and how long to wait for them.
    make : callable
        Makes the cluster with ``asynchronous=True``; called in the thread of an event loop. The
        cluster need not be started, nor have workers: it is awaited and then scaled.
    keep : bool, default True
        Whether a fixed number of workers needs keeping (`KeptWorkers`); not where the platform
        itself restarts what ended.
    explain : callable, optional
        ``await explain(cluster)`` gives what the platform says of a scheduler or workers that did
        not come: the queue, pending jobs, ends of logs.
    hopeless : callable, optional
        ``await hopeless(cluster)`` is asked now and then while the scheduler or the first workers
        are missing; a text that is not empty says why they will not come, and ends the waiting.
    lost : callable, optional
        ``await lost(cluster)`` gives names of workers that have ended, as the platform sees it;
        it is asked now and then while workers to be kept are missing (`Replacement`).
    close : callable, optional
        ``await close(cluster)`` is called after the cluster was closed, even if that failed: to
        end what may be left.
    close_timeout_s : float, default 60
        How long closing may take, and then again what ``close`` does.

    Yields
    ------
    distributed.Client
        With its cluster as ``client.cluster``.

    Raises
    ------
    ClusterError
        If the cluster or its workers did not start.
    """
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(quiet_distributed())
        runner = loop_blind_to_interrupts()
        stack.callback(stop, runner, 1)
        made: list[Cluster] = []
        stack.callback(_close, runner, made, close, close_timeout_s)
        deadline = time.monotonic() + request.timeout_s
        _start_cluster(runner, request, make, made, explain, hopeless)
        cluster = made[0]
        client = stack.enter_context(default_client(cluster))
        _wait(runner, cluster, request, deadline, explain, hopeless)
        if keep or request.adapt:
            start_in(runner, _keep(cluster, request.adapt)).result(10)
        if keep:
            replacing = start_in(runner, Replacement(cluster=cluster, lost=lost).run())
            stack.callback(replacing.cancel)
        with heard():
            yield client


def _start_cluster(
    runner: LoopRunner,
    request: ClusterRequest,
    make: Callable[[], Any],
    made: list[Cluster],
    explain: Ask | None,
    hopeless: Ask | None,
) -> None:
    async def start() -> None:
        try:
            async with asyncio.timeout(request.timeout_s) as limit:
                await _unless_hopeless(_start(request, make, made), made, hopeless)
        except DaskNNError:
            raise
        except Exception as error:
            said = f"the {request.kind} cluster did not start: {reason_of(error)}"
            told = ""
            if isinstance(error, TimeoutError):
                # The library has deadlines of its own, and says which.
                if limit.expired():
                    said = _too_late(request, "it was still starting")
                told = await _told(explain, made[0], errors=False) if made else ""
            raise ClusterError("\n".join(filter(None, (said, told)))) from error

    started = start_in(runner, start())
    try:
        with no_warning_of_busy_ports, quiet("tornado.application"):
            started.result()
    except KeyboardInterrupt:
        # A job that is just being submitted has no number yet by which it could be ended.
        try:
            with contextlib.suppress(Exception):
                see_through(started, SETTLE_TIMEOUT_S)
        finally:
            started.cancel()
        raise


async def _start(request: ClusterRequest, make: Callable[[], Any], made: list[Cluster]) -> None:
    cluster = make()
    if inspect.isawaitable(cluster) and not hasattr(cluster, "scheduler_info"):
        cluster = await cluster
    made.append(cluster)
    # The block closes it; at the end of the process there would be no loop to do so.
    cluster.shutdown_on_close = False
    await cluster
    wanted = _wanted(request, cluster)
    if len(cluster.plan) != wanted:
        scaled = cluster.scale(wanted)
        if inspect.isawaitable(scaled):
            await scaled
        # Raises what is wrong with the workers, where they are submitted one by one.
        await cluster


async def _unless_hopeless(
    waited: Coroutine[Any, Any, None], made: list[Cluster], hopeless: Ask | None
) -> None:
    """Wait for something as long as the platform does not say that it will not come."""
    task = asyncio.ensure_future(waited)
    patience_s = ASK_FIRST_AFTER_S
    try:
        while not (await asyncio.wait({task}, timeout=patience_s))[0]:
            reason = await _told(hopeless, made[0], errors=False) if made else ""
            if reason and not task.done():  # the answer may be older than what it speaks of
                raise ClusterError(reason)
            patience_s = min(2 * patience_s, ASK_EVERY_S_AT_MOST)
        await task
    finally:
        if task.cancel():
            await asyncio.wait({task}, timeout=SETTLE_TIMEOUT_S)


def _wanted(request: ClusterRequest, cluster: Any) -> int:
    """Give the number of workers to start with, at least one."""
    return request.wanted or len(cluster.plan) or 1


async def _keep(cluster: Any, adapt: tuple[int, int] | None) -> None:
    if adapt is None:
        cluster.adapt(Adaptive=KeptWorkers)
    else:
        adapted = cluster.adapt(minimum=adapt[0], maximum=adapt[1])
        if inspect.isawaitable(adapted):
            await adapted


def _wait(
    runner: LoopRunner,
    cluster: Any,
    request: ClusterRequest,
    deadline: float,
    explain: Ask | None,
    hopeless: Ask | None,
) -> None:
    wanted = _wanted(request, cluster)
    came = 0

    async def come() -> None:
        nonlocal came
        while True:
            came = len(cluster.scheduler_info["workers"])
            if came >= wanted:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def wait() -> None:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await _unless_hopeless(come(), [cluster], hopeless)
        except TimeoutError:
            said = _too_late(request, f"{came} of {wanted} workers came")
            told = await _told(explain, cluster)
            raise ClusterError("\n".join(filter(None, (said, told)))) from None

    run_in(runner, wait())


async def _told(ask: Ask | None, cluster: Cluster, *, errors: bool = True) -> str:
    """Ask the platform; that it gives no answer is told, or is nothing."""
    if ask is None:
        return ""
    try:
        async with asyncio.timeout(20):
            return await ask(cluster)
    except Exception as error:
        return reason_of(error) if errors else ""


def _too_late(request: ClusterRequest, what: str) -> str:
    return (
        f"the {request.kind} cluster was not there within {request.timeout_s:g} s: {what}; "
        "wait longer (start_timeout_s=, --start-timeout), or ask for less"
    )


def _close(
    runner: LoopRunner,
    made: list[Cluster],
    end: Callable[[Cluster], Awaitable[None]] | None,
    timeout_s: float,
) -> None:
    for cluster in made:
        closed = start_in(runner, _closed(cluster, end, timeout_s))
        try:
            see_through(closed, 2 * timeout_s + 5)
        except Exception as error:
            logger.warning("the cluster %s was not closed cleanly: %s", cluster, reason_of(error))


async def _closed(
    cluster: Any, end: Callable[[Cluster], Awaitable[None]] | None, timeout_s: float
) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            # An interrupt may have come while it was starting.
            await cluster.close()
            # A cluster that was interrupted while it started leaves its scheduler open.
            if inspect.iscoroutinefunction(
                getattr(getattr(cluster, "scheduler", None), "close", None)
            ):
                await cluster.scheduler.close()
    finally:
        if end is not None:
            async with asyncio.timeout(timeout_s):
                await end(cluster)
