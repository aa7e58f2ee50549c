"""The rank tasks of one gang: started, watched, signalled, gathered."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
from concurrent.futures import CancelledError, wait
from typing import TYPE_CHECKING, Any

import cloudpickle
from distributed import KilledWorker

from dask_nn.collectives.choose import RankPlace, choose, host_sizes, possible
from dask_nn.controller.cluster import SILENT_S, answers_late, ask_workers, in_loop, is_busy
from dask_nn.controller.rank_handles import signal_ranks
from dask_nn.controller.scheduler_side import RANK_PREFIX
from dask_nn.controller.worker_side import RankPayload, Seat, is_there, run_rank
from dask_nn.errors import Aborted
from dask_nn.training.outcome import RankOutcome

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence
    from concurrent.futures import Future as LoopFuture

    from distributed import Client, Future

    from dask_nn.controller.keeping import StateSource
    from dask_nn.controller.placement import Seating

__all__ = [
    "NobodyTakes",
    "RankGroup",
    "Unanswered",
    "choose_again",
    "choose_collective",
    "outcome_of_error",
    "rank_places",
]

SIGNAL_S = 1.0
POLL_S = 0.2
# Within this time a worker of the gang must take something: not all are paused, or about to leave.
TAKE_S = 3.0
# Before its gang has begun, a worker may be silent for so many timeouts of a hanging rank.
SILENCES = 3


class Unanswered(OSError):
    """Workers of a gang do not take what they are sent.

    Parameters
    ----------
    addresses : tuple of str
        Those that do not answer at all; perhaps none.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        super().__init__(f"no answer from {', '.join(addresses) or 'some worker'}")
        self.addresses = addresses


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


class NobodyTakes(OSError):
    """No worker of a gang takes anything: all are paused for want of memory, or about to leave."""


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
    hang_timeout_s : float
        A worker that does not answer for so long is given up.
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
        hang_timeout_s: float = 10.0,
    ) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._client = client
        self._run_id = run_id
        self.generation = generation
        self._changed = changed
        workers = seating.workers
        hosts = host_sizes(rank_places(seating))
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
                source=source,
                canary=canary,
            )
            for rank, worker in enumerate(workers)
        ]
        self._futures: list[Future[Any]] = []
        self._outcomes: dict[int, RankOutcome] = {}
        self._fetches: dict[int, LoopFuture[RankOutcome]] = {}
        # Ranks that have ended, but whose worker does not say how.
        self.unheard: set[int] = set()
        # Ranks of whose end Dask says something, and not they themselves.
        self._untold: set[int] = set()

    def send(self, payload: RankPayload, removed: set[str]) -> Future[Any]:
        """Send the payload to the gang's workers.

        Parameters
        ----------
        payload : RankPayload
            What the ranks are sent.
        removed : set of str
            Workers that are gone; looked at again and again.

        Returns
        -------
        Future
            For `start`.

        Raises
        ------
        Unanswered
            If they do not take it within the deadline.
        NobodyTakes
            If they have no memory for it, or are about to leave.
        Exception
            Whatever Dask raises if a worker has left the cluster meanwhile.
        """
        # By value for what has no importable name, such as a module defined in a notebook.
        pickled = cloudpickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL)
        return self._send(pickled, payload.settings.start_timeout_s, removed)

    def start(self, sent: Future[Any]) -> None:
        """Start the rank tasks; does not block.

        Parameters
        ----------
        sent : Future
            What `send` has given.
        """
        for seat in self.seats:
            future = self._client.submit(
                run_rank,
                sent,
                seat,
                key=f"{RANK_PREFIX}{seat.gang}-{seat.rank}",
                workers=[seat.address],
                allow_other_workers=False,
                retries=0,
                pure=False,
                priority=10,
            )
            future.add_done_callback(lambda _: self._changed.set())
            self._futures.append(future)

    def outcomes(self) -> list[RankOutcome]:
        """Give the outcomes that are known by now, by rank; each is fetched once."""
        for seat, future in zip(self.seats, self._futures, strict=False):
            if future.status == "pending" or seat.rank in self._outcomes | self._fetches.keys():
                continue
            fetch = in_loop(self._client, self._fetch_outcome(seat, future))
            self._fetches[seat.rank] = fetch
            fetch.add_done_callback(lambda _: self._changed.set())
        for rank, fetch in list(self._fetches.items()):
            if fetch.done():
                try:
                    self._outcomes[rank] = fetch.result()
                except Exception:
                    self.unheard.add(rank)
                    continue
                self._fetches.pop(rank)
        return [self._outcomes[rank] for rank in sorted(self._outcomes)]

    def lost(self, removed: set[str]) -> list[Seat]:
        """Give the seats of ranks whose end cannot be known: their worker is gone, or hangs."""
        told = self._outcomes.keys() - self._untold
        return [
            seat
            for seat in self.seats
            if seat.rank not in told and (seat.address in removed or seat.rank in self.unheard)
        ]

    def running(self, removed: set[str]) -> list[Seat]:
        """Give the seats of ranks that are at work on workers other than the removed ones."""
        return [
            seat
            for seat, future in zip(self.seats, self._futures, strict=False)
            if future.status == "pending" and seat.address not in removed
        ]

    def unknown(self, removed: set[str]) -> list[Seat]:
        """Give the seats of ranks that are at work, or whose outcome is on its way."""
        lost = {seat.rank for seat in self.lost(removed)}
        return [
            seat
            for seat in self.seats[: len(self._futures)]
            if seat.rank not in self._outcomes and seat.rank not in lost
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
        for fetch in self._fetches.values():
            fetch.cancel()
        for future in self._futures:
            if future.done() or self._client.status != "running":
                future.release()
            else:
                future.cancel()
        self._futures = []

    def _send(self, payload: bytes, timeout_s: float, removed: set[str]) -> Future[Any]:
        """Put the payload into the memory of one worker, from which the others fetch it.

        Dask's own broadcast would wait until no worker of the cluster is being retired.
        """
        addresses = [seat.address for seat in self.seats]
        scatter: Any = self._client._scatter  # noqa: SLF001  (the other has no deadline)
        sending = in_loop(
            self._client,
            scatter(payload, workers=addresses, hash=False, timeout=TAKE_S),
        )
        try:
            # The task of a worker that is stopped would be waited for as long as a start may take.
            silent = self._silent(addresses, removed)
            if silent:
                raise Unanswered(() if is_busy(self._client) else tuple(sorted(silent)))
            sent: Future[Any] = sending.result(timeout_s)
        except TimeoutError as error:
            raise (NobodyTakes() if sending.done() else Unanswered(())) from error
        finally:
            sending.cancel()
        return sent

    def _silent(self, addresses: Sequence[str], removed: set[str]) -> set[str]:
        """Give the workers that do not answer; one that imports much may take its time."""
        patience_s = SILENCES * self._hang_timeout_s
        asked = ask_workers(self._client, is_there, addresses, timeout_s=patience_s)
        # Dask would try to reach a worker that has left meanwhile for as long as it may take.
        while not wait([asked], POLL_S).done:
            if gone := removed & set(addresses):
                asked.cancel()
                raise KeyError(*gone)
        silent = set()
        for address, answer in asked.result(0).items():
            if isinstance(answer, TimeoutError):
                silent.add(address)
            elif isinstance(answer, OSError | KeyError):  # it has left meanwhile
                raise answer
        return silent

    async def _fetch_outcome(self, seat: Seat, future: Future[Any]) -> RankOutcome:
        if future.status in {"error", "cancelled"}:
            self._untold.add(seat.rank)
            error = await future._exception() if future.status == "error" else None  # noqa: SLF001
            return outcome_of_error(seat, error)
        outcome = await self._gather(future, seat.address)
        if not isinstance(outcome, RankOutcome):
            message = f"rank {seat.rank} ended with {outcome!r}"
            raise TypeError(message)
        return outcome

    async def _gather(self, future: Future[Any], address: str) -> Any:
        """Fetch a result, with a deadline that holds for its worker, not for anybody else.

        What the client fetches at the same time is one request: whoever is silent holds up all.
        """
        fetch = asyncio.ensure_future(self._client._gather([future]))  # noqa: SLF001  (no deadline)
        fetch.add_done_callback(lambda fetch: fetch.cancelled() or fetch.exception())
        began = time.monotonic()
        while True:
            await asyncio.wait({fetch}, timeout=self._hang_timeout_s)
            if fetch.done():
                (result,) = fetch.result()
                return result
            late = time.monotonic() > began + SILENT_S + self._hang_timeout_s
            if late or not await self._is_held_up(address):
                raise TimeoutError

    async def _is_held_up(self, address: str) -> bool:
        """Tell whether it is not this worker for which something does not come."""
        if await answers_late(self._client):
            return True
        asked = ask_workers(self._client, is_there, [address], timeout_s=self._hang_timeout_s)
        answers = await asyncio.wrap_future(asked)
        return not isinstance(answers[address], Exception)


def outcome_of_error(seat: Seat, error: BaseException | None) -> RankOutcome:
    """Say how a rank ended whose task failed; None where it was cancelled.

    What ranks raise themselves is in their outcomes; here it is Dask that failed, or a rank that
    was not to start.
    """
    error = error or CancelledError("the rank's task was cancelled")
    blameless = isinstance(error, KilledWorker | CancelledError | OSError | Aborted)
    text = f"{type(error).__name__}: {error}"
    return RankOutcome(
        rank=seat.rank,
        address=seat.address,
        status="aborted" if blameless else "failed",
        has_state=False,
        error=text,
        traceback=f"{text}\n",
    )
