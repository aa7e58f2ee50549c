"""When the graph engine starts again, and what it tells of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dask_nn.controller.failure_policy import FailureCount, Situation, decide
from dask_nn.errors import WorkerLost
from dask_nn.events import Event

if TYPE_CHECKING:
    from distributed import Client

    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.graph_watch import Loss, WorkerWatch
    from dask_nn.controller.listening import Listener

__all__ = ["Healing"]

LOOK_S = 0.2


class Healing:
    """Counts what went wrong in a run, and tells how it went on.

    Parameters
    ----------
    client : Client
        Of the cluster.
    recovery : Recovery
        How often to start again.
    listener : Listener
        Told of workers that were lost, and of how the run went on.

    Attributes
    ----------
    steps : int
        Steps completed by now.
    """

    def __init__(self, client: Client, recovery: Recovery, listener: Listener) -> None:
        self._client = client
        self._recovery = recovery
        self._listener = listener
        self._lost: list[str] = []
        self._broken_at: float | None = None
        self._reason = ""
        self._count = FailureCount()
        self.steps = 0

    @property
    def failures(self) -> int:
        """What the scheduler could not heal, so far."""
        return self._count.failures

    def note(self, loss: Loss) -> None:
        """Tell that a worker is gone."""
        if self._broken_at is None:
            self._broken_at = time.monotonic()
        self._lost.append(loss.address)
        self._reason = self._reason or loss.reason
        # No worker has a rank here: any may do the tasks of all shards.
        self._tell(
            f"worker-{loss.kind}",
            address=loss.address,
            rank=-1,
            step=self.steps,
            reason=loss.reason,
        )

    def count(self, error: BaseException) -> None:
        """Count a failure that the scheduler could not heal."""
        if self._broken_at is None:
            self._broken_at = time.monotonic()
        self._reason = f"{error}" or repr(error)
        self._count.note("lost", self.steps)

    def wait_until_able(self, watch: WorkerWatch) -> None:
        """Wait until there are workers to go on with.

        Raises
        ------
        WorkerLost
            If the run shall not go on.
        """
        began = time.monotonic()
        # Who was lost is told before the run is given up for it.
        watch.look(at_once=True)
        while True:
            watch.look()
            able = len(watch.present)
            action = decide(
                Situation(
                    cause="lost",
                    failures=self.failures,
                    same_step=self._count.same_step,
                    ranks=able,
                    able=able,
                    waited_s=time.monotonic() - began,
                ),
                self._recovery,
            )
            if action.name == "go_on":
                return
            if action.name == "give_up":
                address = self._lost[0] if self._lost else ""
                raise WorkerLost(address, -1, f"{action.reason}; the last was: {self._reason}")
            time.sleep(LOOK_S)

    def tell(self, able: int) -> None:
        """Tell that the run goes on, if something had happened."""
        if self._broken_at is None:
            return
        self._tell(
            "recovered",
            lost=self._lost,
            ranks=able,
            step=self.steps,
            seconds=time.monotonic() - self._broken_at,
            reason=self._reason,
        )
        self._lost, self._broken_at, self._reason = [], None, ""

    def _tell(self, name: str, **details: Any) -> None:
        self._listener.on_event(Event(name=name, time_s=time.time(), details=details))
