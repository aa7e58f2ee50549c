"""Which workers a run can count on: who joins, who leaves, and who is let go."""

from __future__ import annotations

import contextlib
import inspect
import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

from dask_nn.controller.cluster import ask_workers, check_versions, client_versions, in_loop
from dask_nn.controller.placement import Seating, WorkerFacts, seat_ranks
from dask_nn.controller.worker_side import describe
from dask_nn.errors import ConfigurationError, IncompatibleWorkers

if TYPE_CHECKING:
    import threading
    from collections.abc import Collection, Sequence

    from distributed import Client

__all__ = ["Membership"]

logger = logging.getLogger("dask_nn")

# How long the scheduler may take to list its workers.
LIST_S = 5.0
# A new worker imports torch before it answers.
DESCRIBE_S = 60.0
EVICT_S = 5.0


class Membership:
    """Follows the workers of a cluster for the length of a run.

    Parameters
    ----------
    client : Client
        Of the cluster.
    workers : sequence of WorkerFacts
        Those that are known to fit.
    changed : threading.Event
        Set whenever a worker joins, leaves, or has been looked at.
    """

    def __init__(
        self, client: Client, workers: Sequence[WorkerFacts], changed: threading.Event
    ) -> None:
        self._client = client
        self._facts = {worker.address: worker for worker in workers}
        self._changed = changed
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._excluded: dict[str, str] = {}
        self._evictions: list[Future[Any]] = []
        self._followed: list[str] = []
        self.removed: set[str] = set()

    def __enter__(self) -> Self:
        """Listen, and catch up with what happened before."""
        for address in self._facts:
            self._follow(address)
        self.catch_up()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for address in self._followed if self._client.status == "running" else ():
            with contextlib.suppress(Exception):  # what ended the run says more
                self._client.unsubscribe_topic(address)

    def catch_up(self) -> None:
        """Compare with the scheduler's own list: joined workers are only seen there."""
        scheduler: Any = self._client.scheduler
        listed = in_loop(self._client, scheduler.identity(n_workers=-1))
        try:
            present = set(listed.result(LIST_S)["workers"])
        except (OSError, TimeoutError):
            return  # whoever cares looks at the connection itself
        self.removed |= self._facts.keys() - present
        for address in present - self._facts.keys() - self._asked.keys() - self._excluded.keys():
            self._look_at(address)

    def exclude(self, address: str, reason: str) -> None:
        """Give this worker no rank any more."""
        self._excluded[address] = reason

    def evict(self, address: str, reason: str) -> None:
        """Make the scheduler let go of a worker that hangs.

        What it held is computed again elsewhere. When it wakes up it finds itself removed and
        closes; its nanny, where there is one, starts another worker that may join.
        """
        self.exclude(address, reason)
        self.removed.add(address)
        future = in_loop(
            self._client,
            self._client._run_on_scheduler(_remove, address),  # noqa: SLF001  (the other blocks)
        )
        self._evictions.append(future)

    def settle(self) -> None:
        """Wait until the scheduler has let go of what was evicted; it does so within seconds."""
        for future in self._evictions:
            try:
                future.result(EVICT_S)
            except Exception:
                logger.exception("the scheduler did not let go of a worker")
        self._evictions.clear()

    def refused(self) -> dict[str, str]:
        """Look at the answers of workers that joined; give those that do not fit, with reasons."""
        refused = {}
        for address, future in list(self._asked.items()):
            if not future.done():
                continue
            del self._asked[address]
            try:
                facts = WorkerFacts(**future.result()[address])
                check_versions([facts], client_versions())
            except Exception as error:
                if address not in self.removed:
                    refused[address] = f"{error}" or repr(error)
                    self.exclude(address, refused[address])
            else:
                self._facts[address] = facts
                self._follow(address)
        return refused

    def seating(
        self, *, shards: int, threads_per_rank: int, device: str, taken: Collection[str] = ()
    ) -> Seating | None:
        """Choose the workers of a gang among those that are there; None if none can run a rank."""
        able = [
            facts
            for address, facts in self._facts.items()
            if not (address in self.removed or address in self._excluded or address in taken)
        ]
        if not able:
            return None
        try:
            return seat_ranks(able, shards=shards, threads_per_rank=threads_per_rank, device=device)
        except (ConfigurationError, IncompatibleWorkers):
            return None

    def _follow(self, address: str) -> None:
        """Hear at once when a worker leaves: the scheduler says so on the worker's own topic."""

        def hear(event: tuple[float, Any]) -> None:
            if event[1].get("action") == "remove-worker":
                self.removed.add(address)
                self._changed.set()

        self._followed.append(address)
        self._client.subscribe_topic(address, hear)

    def _look_at(self, address: str) -> None:
        future = ask_workers(self._client, describe, [address], timeout_s=DESCRIBE_S)
        self._asked[address] = future
        future.add_done_callback(lambda _: self._changed.set())


async def _remove(address: str, dask_scheduler: Any) -> None:
    # Its tasks are not to blame; the argument that says so was renamed in distributed 2025.
    names = inspect.signature(dask_scheduler.remove_worker).parameters
    blameless = {name: True for name in ("expected", "safe") if name in names}
    await dask_scheduler.remove_worker(
        address, stimulus_id="dask-nn-evict", close=True, **blameless
    )
