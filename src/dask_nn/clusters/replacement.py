"""Workers that will never come make room for others."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_timedelta
from distributed.core import Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

__all__ = ["Replacement"]

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# Platforms do not like to be asked often, and a bad node would end job after job.
ASK_EVERY_S = 15.0
ASK_EVERY_S_AT_MOST = 300.0


@dataclass(kw_only=True)
class Replacement:
    """Frees the seats of a cluster's workers that will never come, so that Dask fills them again.

    Dask itself frees the seat of a worker that was there and left. One that is lost before it was
    there, such as a job that is cancelled while it waits, would have its seat for ever.

    Parameters
    ----------
    cluster : distributed.SpecCluster
        The cluster. Something must keep its number of workers, such as `KeptWorkers`.
    lost : callable, optional
        ``await lost(cluster)`` gives names of workers that have ended, as the platform sees it. Of
        workers that failed to be started the cluster itself knows.
    """

    cluster: Any
    lost: Callable[[Any], Awaitable[Collection[Any]]] | None = None
    _absent_since: dict[Any, tuple[Any, float]] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Look after the seats until it is cancelled."""
        wait_s, asked = ASK_EVERY_S, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            absent = self.absent()
            if not self._absent_since:
                wait_s = ASK_EVERY_S
            if not absent or time.monotonic() - asked < wait_s:
                continue
            asked = time.monotonic()
            if await self.free(absent):
                wait_s = min(2 * wait_s, ASK_EVERY_S_AT_MOST)

    def absent(self) -> set[Any]:
        """Give the seats whose worker has been missing for longer than Dask waits for one."""
        now = time.monotonic()
        infos = self.cluster.scheduler_info["workers"].values()
        here = {str(info["name"]) for info in infos}
        seen, self._absent_since = self._absent_since, {}
        for name, process in self.cluster.workers.items():
            if here.isdisjoint(_worker_names(name, self.cluster.worker_spec.get(name, {}))):
                before, since = seen.get(name, (process, now))
                # Another process may have got the seat meanwhile.
                self._absent_since[name] = (process, since if before is process else now)
        # Until then Dask itself may be about to free the seat.
        patience_s = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        return {
            name
            for name, (_, since) in self._absent_since.items()
            if now - since > patience_s + LOOK_EVERY_S
        }

    async def free(self, absent: Collection[Any]) -> set[Any]:
        """Free those of some seats whose worker will never come; gives their names."""
        workers = self.cluster.workers
        never = {name for name in absent if name in workers and _failed(workers[name])}
        if self.lost is not None:
            try:
                async with asyncio.timeout(ASK_EVERY_S):
                    never |= set(await self.lost(self.cluster)) & set(absent)
            except Exception as error:
                logger.debug("it is not known what became of the workers %s: %s", absent, error)
        for name in never:
            # Gone meanwhile if the cluster was scaled down.
            if (process := workers.pop(name, None)) is not None:
                logger.info("worker %s will never come, another is started", name)
                try:
                    await process.close()
                except Exception:
                    # Of a machine that was never made there is none to end.
                    process.status = Status.failed
        return never


def _worker_names(name: Any, spec: dict[str, Any]) -> set[str]:
    """Give the names of the workers of one seat; a job may have several."""
    return {f"{name}{suffix}" for suffix in spec.get("group", [""])}


def _failed(process: Any) -> bool:
    """Tell whether the start of a process ended with an error."""
    return bool(process.status != Status.running)
