"""Which workers a run can count on: who joins, who leaves, and who is let go."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dask_nn.controller.admission import Admission
from dask_nn.controller.cluster import WorkerList, in_loop, processes, retired_among
from dask_nn.controller.placement import Seating, WorkerFacts, seat_ranks
from dask_nn.controller.rank_handles import LEAVE_S
from dask_nn.controller.scheduler_side import REMOVAL, remove_worker
from dask_nn.errors import ConfigurationError, IncompatibleWorkers

if TYPE_CHECKING:
    import threading
    from collections.abc import Collection, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["Membership"]

logger = logging.getLogger("dask_nn")

EVICT_S = 5.0
# The ranks of a worker that was retired get so long to come to a step boundary.
RETIRE_S = LEAVE_S + 2.0
# A worker that joins and does not reach its peers is asked again so much later.
ASK_AGAIN_S = 10.0


@dataclass(frozen=True)
class _Examination:
    future: Future[WorkerFacts]
    peers: frozenset[str]


class Membership:
    """Follows the workers of a cluster for the length of a run.

    A worker is a process, not an address: where ports are fixed, a nanny's replacement has the
    address of what it replaces.

    Parameters
    ----------
    client : Client
        Of the cluster.
    workers : sequence of WorkerFacts
        Those that are known to fit.
    changed : threading.Event
        Set whenever a worker joins, leaves, or has been looked at.
    checkpoint : Checkpoint, optional
        What workers that join must see, too.

    Attributes
    ----------
    removed : set of str
        Addresses whose worker is gone.
    closing : set of str
        Addresses whose worker is about to be gone, unless Dask thinks better of it.
    paused : set of str
        Addresses whose worker starts no tasks for want of memory.
    engaged : collection of str
        Addresses that the present gang relies on: who comes back there meanwhile is another.
    """

    def __init__(
        self,
        client: Client,
        workers: Sequence[WorkerFacts],
        changed: threading.Event,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._client = client
        self._facts = {worker.address: worker for worker in workers}
        self._changed = changed
        self._list = WorkerList(client)
        self._admission = Admission(client, checkpoint)
        self._asked: dict[str, _Examination] = {}
        self._excluded: dict[str, str] = {}
        self._processes: dict[str, str] = {}
        self._evicted: set[str] = set()
        self._evictions: list[Future[Any]] = []
        self._followed: set[str] = set()
        self._ask_again: dict[str, float] = {}
        self._retired: dict[str, float] = {}
        self.removed: set[str] = set()
        self.closing: set[str] = set()
        self.paused: set[str] = set()
        self.engaged: Collection[str] = ()

    def __enter__(self) -> Self:
        """Listen, and catch up with what happened before."""
        for address in self._facts:
            self._follow(address)
        self.catch_up()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for examination in self._asked.values():
            examination.future.cancel()
        for address in self._followed if self._client.status == "running" else ():
            with contextlib.suppress(Exception):  # what ended the run says more
                self._client.unsubscribe_topic(address)

    @property
    def present(self) -> list[str]:
        """The workers that may be asked something."""
        return sorted(self._processes.keys() - self.removed)

    @property
    def known(self) -> Collection[str]:
        """The workers that were looked at and fit, with those that are gone since."""
        return self._facts.keys()

    def catch_up(self) -> None:
        """Compare with the scheduler's own list: joined workers are only seen there.

        Raises
        ------
        ClusterError
            If the scheduler is gone, or has been silent for too long.
        """
        gone = set(self.removed)
        listed = self._list.ask()
        if listed is None:
            return
        self.closing = {address for address, worker in listed.items() if worker.is_closing}
        self.paused = {address for address, worker in listed.items() if worker.is_paused}
        present = processes(listed)
        replaced = {
            address
            for address, process in present.items()
            if self._processes.get(address, process) != process
        }
        self._remove((self._facts.keys() - present.keys()) | (replaced & set(self.engaged)))
        replaced -= set(self.engaged)
        # News of a worker that left may come when another is already at its address.
        late = (gone & present.keys()) - self._evicted - set(self.engaged)
        self._forget(replaced, late)
        # Who joins when others die would try in vain to reach those, and be refused for it.
        for address, examination in list(self._asked.items()):
            if examination.peers & self.removed and not examination.future.done():
                del self._asked[address]
                examination.future.cancel()
        for address, process in present.items():
            if address not in self.engaged:
                self._processes[address] = process
            self._processes.setdefault(address, process)
        unknown = present.keys() - self._facts.keys() - self._asked.keys()
        for address in unknown - self._excluded.keys() - self.closing:
            if time.monotonic() >= self._ask_again.get(address, 0.0):
                self._look_at(address)

    def _remove(self, addresses: set[str]) -> None:
        """Know that these workers are gone, also where the list says so before the event does."""
        news = addresses - self.removed
        if news:
            for address in retired_among(self._client, news):
                self._retired[address] = time.monotonic()
        self.removed |= news

    def _forget(self, replaced: set[str], late: set[str]) -> None:
        """Know that others are at these addresses; of the late ones only that they are there."""
        self.removed -= replaced | late
        self._evicted -= replaced
        for address in replaced | late:
            self._retired.pop(address, None)
        for address in replaced:
            self._facts.pop(address, None)
            self._excluded.pop(address, None)
            if address in self._asked:
                self._asked.pop(address).future.cancel()

    def exclude(self, address: str, reason: str) -> None:
        """Give this worker no rank any more."""
        self._excluded[address] = reason

    def evict(self, address: str, reason: str) -> None:
        """Make the scheduler let go of a worker that hangs.

        What it held is computed again elsewhere. It closes, as soon as it answers again; its nanny,
        where there is one, starts another worker that may join.
        """
        self.exclude(address, reason)
        self.removed.add(address)
        self._evicted.add(address)
        future = in_loop(
            self._client,
            self._client._run_on_scheduler(remove_worker, address),  # noqa: SLF001  (the other blocks)
        )
        self._evictions.append(future)

    def is_retired(self, address: str) -> bool:
        """Tell whether a removed worker was just retired, and may still be at work.

        Then its ranks come to a step boundary. Dask lets go of such a worker before it closes.
        """
        retired_at = self._retired.get(address)
        return retired_at is not None and time.monotonic() < retired_at + RETIRE_S

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
        for address, examination in list(self._asked.items()):
            if not examination.future.done():
                continue
            del self._asked[address]
            try:
                facts = examination.future.result()
            except ConnectionError as error:
                if examination.peers & self.removed:
                    continue  # asked once more, about those that are left
                # Perhaps because a peer is about to be lost.
                if address not in self._ask_again:
                    refused[address] = f"{error}"
                self._ask_again[address] = time.monotonic() + ASK_AGAIN_S
            except (OSError, KeyError):
                pass  # it is gone again, or too slow; if it is there still, it is asked once more
            except Exception as error:
                refused[address] = f"{error}" or repr(error)
                self.exclude(address, refused[address])
            else:
                self._facts[address] = facts
                self._follow(address)
        return refused

    def starts_tasks(self, address: str) -> bool:
        """Tell whether a worker is there, stays, and has memory, as far as is known."""
        return not any(address in out for out in (self.removed, self.closing, self.paused))

    def seating(
        self, *, shards: int, threads_per_rank: int, device: str, taken: Collection[str] = ()
    ) -> Seating | None:
        """Choose the workers of a gang among those that are there; None if none can run a rank."""
        out = self._excluded.keys() | set(taken)
        able = [
            facts
            for address, facts in self._facts.items()
            if self.starts_tasks(address) and address not in out
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
            if event[1].get("action") == REMOVAL:
                if event[1].get("expected") and address not in self._evicted:
                    self._retired[address] = time.monotonic()
                self.removed.add(address)
                self._changed.set()

        self._followed.add(address)
        self._client.subscribe_topic(address, hear)

    def _look_at(self, address: str) -> None:
        peers = frozenset(self.engaged) - self.removed
        future = self._admission.examine(address, sorted(peers))
        self._asked[address] = _Examination(future, peers)
        future.add_done_callback(lambda _: self._changed.set())
