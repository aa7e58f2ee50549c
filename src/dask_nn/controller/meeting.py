"""Where the ranks of a gang meet: on the leader's worker, over Dask's own connections."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from distributed.utils import sync

from dask_nn.collectives.rendezvous import Rendezvous, not_found
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    import threading

    from distributed import Worker

__all__ = ["WorkerRendezvous", "open_meeting_point"]

OPERATION = "dask_nn_rendezvous"
# An answer of the leader that takes longer than this is asked for again.
CALL_S = 5.0


def open_meeting_point(worker: Worker) -> None:
    """Make a worker a possible meeting point; done once for each worker."""
    worker.handlers.setdefault(OPERATION, _MeetingPoint().handle)


class WorkerRendezvous(Rendezvous):
    """Meets on the leader's worker, over Dask's own connections (encrypted where those are).

    Parameters
    ----------
    worker : Worker
        This rank's.
    gang : str
        Name of the gang.
    leader : str
        Address of the leader's worker.
    abort : threading.Event
        Ends a wait.
    """

    def __init__(self, worker: Worker, gang: str, leader: str, abort: threading.Event) -> None:
        self._worker = worker
        self._gang = gang
        self._leader = leader
        self._abort = abort

    def set(self, key: str, value: bytes) -> None:
        """Store a value at the leader."""
        self._call(action="set", key=key, value=value)

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a key at the leader."""
        deadline = time.monotonic() + timeout_s
        while not self._abort.is_set():
            found: bytes | None = self._call(action="get", key=key, value=b"")
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                break
        raise not_found(key, timeout_s)

    def _call(self, **message: Any) -> Any:
        async def call() -> Any:
            leader = self._worker.rpc(self._leader)
            async with asyncio.timeout(CALL_S):
                return await getattr(leader, OPERATION)(gang=self._gang, **message)

        try:
            return sync(self._worker.loop, call)
        except (OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and message["action"] == "get":
                return None
            reason = f"{self._leader}, where the gang was to meet, does not answer: {error!r}"
            raise Aborted(reason) from error


class _MeetingPoint:
    """The leader's side of :class:`WorkerRendezvous`, on the worker's event loop."""

    WAIT_S = 1.0
    # Of a gang from which nothing was heard for so long, no rank is still on its way.
    KEPT_S = 3600.0

    def __init__(self) -> None:
        self._gangs: dict[str, dict[str, bytes]] = {}
        self._heard_of: dict[str, float] = {}
        self._changed = asyncio.Condition()

    async def handle(self, gang: str, action: str, key: str, value: bytes) -> bytes | None:
        async with self._changed:
            now = self._heard_of[gang] = time.monotonic()
            for name in [name for name, at in self._heard_of.items() if now - at > self.KEPT_S]:
                del self._heard_of[name], self._gangs[name]
            values = self._gangs.setdefault(gang, {})
            if action == "set":
                values[key] = value
                self._changed.notify_all()
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.WAIT_S):
                    await self._changed.wait_for(lambda: key in values)
            return values.get(key)
