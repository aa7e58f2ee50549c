"""The rank tasks of one gang: started, watched, signalled, gathered."""

from __future__ import annotations

import contextlib
import pickle
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import cloudpickle
from distributed import KilledWorker

from dask_nn.collectives.choose import RankPlace, choose, host_sizes, possible
from dask_nn.controller.cluster import ask_workers
from dask_nn.controller.rank_handles import signal_ranks
from dask_nn.controller.worker_side import RankPayload, Seat, run_rank
from dask_nn.training.outcome import RankOutcome

if TYPE_CHECKING:
    import threading

    from distributed import Client, Future

    from dask_nn.controller.keeping import StateSource
    from dask_nn.controller.placement import Seating

__all__ = ["RankGroup", "choose_again", "choose_collective", "rank_places"]

SIGNAL_S = 1.0
START_S = 30.0


def choose_collective(seating: Seating, *, device: str, wanted: str | None = None) -> str:
    """Name the communicator for a gang on these workers.

    Raises
    ------
    ConfigurationError
        If the one that the user asked for cannot connect them.
    """
    return choose(rank_places(seating), device=device, wanted=wanted)


def choose_again(seating: Seating, *, device: str, wanted: str | None = None) -> str:
    """Name the communicator for a later gang: the best, where the wanted one fits no more."""
    places = rank_places(seating)
    fits = wanted is not None and not possible(places, device=device).get(wanted)
    return choose(places, device=device, wanted=wanted if fits else None)


def rank_places(seating: Seating) -> list[RankPlace]:
    """Tell where the ranks of a gang are, in the order of ranks."""
    return [
        RankPlace(
            host=worker.host,
            process=worker.process,
            machine=worker.machine,
            encrypted=worker.encrypted,
        )
        for worker in seating.workers
    ]


class RankGroup:
    """One gang on a cluster.

    Parameters
    ----------
    client : Client
        Of the cluster.
    run_id : str
        The run.
    generation : int
        The n-th gang of the run.
    seating : Seating
        Which worker runs which rank.
    collective : str
        Name of the communicator.
    changed : threading.Event
        Set whenever a rank ends.
    source : StateSource, optional
        Where the run's state is.
    canary : bytes
        The fingerprint of the run's first gang.
    """

    def __init__(
        self,
        client: Client,
        *,
        run_id: str,
        generation: int,
        seating: Seating,
        collective: str,
        changed: threading.Event,
        source: StateSource | None = None,
        canary: bytes = b"",
    ) -> None:
        self._client = client
        self._run_id = run_id
        self.generation = generation
        self._changed = changed
        workers = seating.workers
        hosts = host_sizes(rank_places(seating))
        processes = [(worker.host, worker.process) for worker in workers]
        self.seats = [
            Seat(
                run_id=run_id,
                generation=generation,
                rank=rank,
                world_size=len(workers),
                address=worker.address,
                leader=workers[0].address,
                collective=collective,
                hosts=hosts,
                shared_process=processes.count(processes[rank]) > 1,
                source=source,
                canary=canary,
            )
            for rank, worker in enumerate(workers)
        ]
        self._futures: list[Future[Any]] = []

    def start(self, payload: RankPayload) -> None:
        """Send the payload to the gang's workers and start the rank tasks.

        Raises
        ------
        Exception
            Whatever Dask raises if a worker has left the cluster meanwhile.
        """
        # By value for what has no importable name, such as a module defined in a notebook.
        pickled = cloudpickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL)
        addresses = [seat.address for seat in self.seats]
        sent = self._client.scatter(
            pickled, workers=addresses, broadcast=True, hash=False, timeout=START_S
        )
        for seat in self.seats:
            future = self._client.submit(
                run_rank,
                sent,
                seat,
                key=f"dask-nn-rank-{seat.gang}-{seat.rank}",
                workers=[seat.address],
                allow_other_workers=False,
                retries=0,
                pure=False,
                priority=10,
            )
            future.add_done_callback(lambda _: self._changed.set())
            self._futures.append(future)

    def outcomes(self) -> list[RankOutcome | None]:
        """Give the outcomes of the ranks that have ended, None for the others."""
        return [
            self._outcome(seat, future)
            for seat, future in zip(self.seats, self._futures, strict=True)
        ]

    def lost(self, removed: set[str]) -> list[Seat]:
        """Give the seats whose worker is among the removed ones, and whose end is not known."""
        return [
            seat
            for seat in self.seats
            if seat.address in removed
            and not (self._futures and self._futures[seat.rank].status == "finished")
        ]

    def running(self, removed: set[str]) -> list[Seat]:
        """Give the seats of ranks that are at work on workers other than the removed ones."""
        return [
            seat
            for seat, future in zip(self.seats, self._futures, strict=False)
            if future.status == "pending" and seat.address not in removed
        ]

    def signal(self, order: str, removed: set[str]) -> None:
        """Ask the ranks at work to ``"stop"`` at a step boundary, or to ``"abort"``.

        Returns once all have heard it, or after a moment.
        """
        addresses = [seat.address for seat in self.running(removed)]
        asked = ask_workers(
            self._client,
            signal_ranks,
            addresses,
            self._run_id,
            self.generation,
            order,
            timeout_s=SIGNAL_S,
        )
        with contextlib.suppress(Exception):  # what ended the run says more
            asked.result(2 * SIGNAL_S)

    def release(self) -> None:
        """Let go of the tasks; those that still run are cancelled."""
        for future in self._futures:
            if future.done() or self._client.status != "running":
                future.release()
            else:
                future.cancel()
        self._futures = []

    def _outcome(self, seat: Seat, future: Future[Any]) -> RankOutcome | None:
        if future.status == "pending":
            return None
        if future.status == "finished":
            outcome: Any = future.result()
            return outcome if isinstance(outcome, RankOutcome) else None
        error: BaseException = (
            future.exception()
            if future.status == "error"
            else RuntimeError("the rank's task was cancelled")
        )
        return RankOutcome(
            rank=seat.rank,
            address=seat.address,
            status="failed" if future.status == "error" and not _is_loss(error) else "aborted",
            has_state=False,
            error=f"{type(error).__name__}: {error}",
            traceback=f"{type(error).__name__}: {error}\n",
        )


def _is_loss(error: BaseException) -> bool:
    """Tell whether a task failed because of its worker, not because of what it did."""
    return isinstance(error, KilledWorker | CancelledError | OSError)
