"""The workers under the graph engine: who is lost, who hangs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from dask_nn.controller import graph_tasks as tasks
from dask_nn.controller.cluster import WorkerList, ask_workers, processes, scheduler_lost
from dask_nn.controller.membership import Membership

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.controller.placement import WorkerFacts

__all__ = ["Loss", "WorkerWatch"]

LOOK_EVERY_S = 1.0
# A task may take so many times longer than the longest before it.
TASK_FACTOR = 5.0
# When a look comes so late, this process slept, or the scheduler; nobody else is to blame.
LATE_S = 5.0


class Loss(NamedTuple):
    """A worker that is gone: how, and why."""

    kind: str
    address: str
    reason: str


class WorkerWatch:
    """Asks every worker once a second for how long its tasks have been at work.

    The scheduler repeats what a worker that died had at work. One that is stopped, or cut off, or
    whose task never ends, it would wait for; here such a worker is given up, as the ranks of the
    other engine are.

    Parameters
    ----------
    client : Client
        Of the cluster.
    workers : sequence of WorkerFacts
        Those that are known to fit.
    run_id : str
        Whose tasks are watched.
    hang_timeout_s : float
        See :class:`~dask_nn.controller.failure_policy.Recovery`.
    start_timeout_s : float
        What a process's first task gets, which imports much.
    on_loss : callable
        Told of every worker that is gone.
    """

    def __init__(
        self,
        client: Client,
        workers: Sequence[WorkerFacts],
        run_id: str,
        *,
        hang_timeout_s: float,
        start_timeout_s: float,
        on_loss: Callable[[Loss], None],
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = max(start_timeout_s, hang_timeout_s)
        self._on_loss = on_loss
        self._membership = Membership(client, workers, threading.Event())
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._present: dict[str, str] = {}
        self._list = WorkerList(client)
        self._looked = 0.0

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._membership.__enter__()
        self._present = processes(self._list.ask() or {})
        self._looked = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._membership.__exit__()

    @property
    def present(self) -> list[str]:
        """The workers that were there at the last look, without those that were given up."""
        return sorted(self._present)

    def is_present(self, address: str) -> bool:
        """Tell whether a worker is one of these."""
        return address in self._present

    def look(self, *, at_once: bool = False) -> None:
        """Look around, once in a while.

        Parameters
        ----------
        at_once : bool, default False
            Whether to look even if the last look was a moment ago.

        Raises
        ------
        ClusterError
            If the scheduler is gone, or does not answer.
        """
        if self._client.status != "running":
            raise scheduler_lost(self._client)
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S and not at_once:
            return
        listed = self._list.ask()
        if listed is None:
            return  # the next look comes late
        present = processes(listed)
        if time.monotonic() - self._looked > LOOK_EVERY_S + min(LATE_S, self._hang_timeout_s / 2):
            self._asked.clear()
        for address, process in self._present.items():
            if present.get(address) != process:
                self._asked.pop(address, None)
                self._on_loss(Loss("lost", address, "left the cluster"))
        self._present = present
        for address in list(present):
            self._judge(address)
        self._looked = time.monotonic()

    def _judge(self, address: str) -> None:
        asked = self._asked.get(address)
        if asked is not None and not asked.done():
            return
        if asked is not None and (reason := self._complaint(asked.result()[address])):
            del self._asked[address], self._present[address]
            self._membership.evict(address, reason)
            self._membership.settle()
            self._on_loss(Loss("hung", address, reason))
            return
        self._asked[address] = ask_workers(
            self._client, tasks.at_work, [address], self._run_id, timeout_s=self._hang_timeout_s
        )

    def _complaint(self, answer: Any) -> str:
        """Say why a worker must be given up; empty if it need not."""
        if isinstance(answer, TimeoutError):
            return f"gave no sign of life for {self._hang_timeout_s:g} s"
        if isinstance(answer, BaseException):
            return ""  # if it is gone, the scheduler will say so
        at_work_s, longest_s = answer
        limit_s = self._hang_timeout_s if longest_s else self._start_timeout_s
        if at_work_s > limit_s + TASK_FACTOR * longest_s:
            return f"a task of its has not ended after {at_work_s:.0f} s"
        return ""
