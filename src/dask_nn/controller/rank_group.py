"""The rank tasks of one gang: started, watched, signalled, gathered."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import cloudpickle

from dask_nn.collectives.choose import RankPlace, choose
from dask_nn.controller.worker_side import RankPayload, Seat, run_rank, signal_ranks
from dask_nn.errors import WorkerLost
from dask_nn.training.outcome import RankOutcome

if TYPE_CHECKING:
    import threading

    from distributed import Client, Future

    from dask_nn.controller.placement import Seating

__all__ = ["RankGroup", "choose_collective"]


def choose_collective(seating: Seating, *, device: str) -> str:
    """Name the communicator for a gang on these workers."""
    places = [
        RankPlace(host=worker.host, process=worker.process, machine=worker.machine)
        for worker in seating.workers
    ]
    return choose(places, device=device)


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
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._changed = changed
        workers = seating.workers
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
                shared_process=processes.count(processes[rank]) > 1,
            )
            for rank, worker in enumerate(workers)
        ]
        self._futures: list[Future[Any]] = []

    def start(self, payload: RankPayload) -> None:
        """Send the payload to the gang's workers and start the rank tasks.

        Raises
        ------
        WorkerLost
            If a worker has left the cluster.
        """
        # By value for what has no importable name, such as a module defined in a notebook.
        pickled = cloudpickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL)
        addresses = [seat.address for seat in self.seats]
        try:
            sent = self._client.scatter(pickled, workers=addresses, broadcast=True, hash=False)
        except Exception as error:
            lost = self.lost(self.absent())
            if lost is None:
                raise
            raise lost from error
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

    def lost(self, removed: set[str]) -> WorkerLost | None:
        """Make the error for the first rank whose worker is among the removed ones."""
        for seat in self.seats:
            finished = self._futures and self._futures[seat.rank].status == "finished"
            if seat.address in removed and not finished:
                return WorkerLost(seat.address, seat.rank)
        return None

    def absent(self) -> set[str]:
        """Give the addresses of the gang's workers that the scheduler does not know any more."""
        return {seat.address for seat in self.seats} - set(self._present())

    def is_running(self, removed: set[str]) -> bool:
        """Tell whether ranks are at work on workers other than the removed ones."""
        return any(
            future.status == "pending" and seat.address not in removed
            for seat, future in zip(self.seats, self._futures, strict=False)
        )

    def signal(self, order: str) -> None:
        """Ask all ranks to ``"stop"`` at a step boundary, or to ``"abort"``."""
        self._client.run(
            signal_ranks, self._run_id, order, workers=self._present(), on_error="ignore"
        )

    def release(self) -> None:
        """Let go of the tasks; those that still run are cancelled."""
        for future in self._futures:
            if future.done():
                future.release()
            else:
                future.cancel()
        self._futures = []

    def _present(self) -> list[str]:
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        return [seat.address for seat in self.seats if seat.address in known]

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
            status="failed",
            error=f"{type(error).__name__}: {error}",
            traceback=f"{type(error).__name__}: {error}\n",
        )
