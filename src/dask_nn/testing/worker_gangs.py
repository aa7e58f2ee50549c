"""Gangs of ranks for tests that are tasks on real Dask workers, which may be on many hosts."""

from __future__ import annotations

import threading
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from distributed import Client, get_worker, secede

from dask_nn.collectives.make import make_communicator
from dask_nn.controller.mail import WorkerMailbox, open_post_office
from dask_nn.controller.meeting import WorkerRendezvous, open_meeting_point
from dask_nn.testing.gangs import PATIENCE_S, Outcome, RankMain, play

if TYPE_CHECKING:
    from distributed import Worker

    from dask_nn.collectives.base import Communicator
    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["WorkerGang"]

LOOK_S = 0.5


class WorkerGang:
    """Ranks that are tasks, one for each worker; dead workers are replaced by their nannies.

    Parameters
    ----------
    client : Client
        Of a cluster with as many workers as there will be ranks.
    name : str
        Of the communicator.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name

    def run(
        self, world_size: int, rank_main: RankMain, *arguments: Any, **options: Any
    ) -> list[Outcome]:
        """Hand one rank to each worker, in the order of their addresses."""
        self._client.wait_for_workers(world_size, timeout=PATIENCE_S)
        self._client.run(_prepare)
        gang = uuid.uuid4().hex
        addresses = sorted(self._client.scheduler_info(n_workers=-1)["workers"])[:world_size]
        futures = [
            self._client.submit(
                _rank_task,
                partial(rank_main),
                arguments,
                {"name": self._name, "gang": gang} | options,
                rank,
                addresses,
                workers=[address],
                retries=0,
                pure=False,
                key=f"{gang}-{rank}",
            )
            for rank, address in enumerate(addresses)
        ]
        deadline = time.monotonic() + PATIENCE_S
        return [
            self._outcome(future, address, deadline)
            for future, address in zip(futures, addresses, strict=True)
        ]

    def _outcome(self, future: Any, address: str, deadline: float) -> Outcome:
        while True:
            try:
                outcome: Outcome = future.result(timeout=LOOK_S)
            except TimeoutError as error:
                # The task waits for its own worker, which a nanny starts at another address.
                died = address not in self._client.nthreads()
                if not died and time.monotonic() < deadline:
                    continue
                future.cancel(force=True)
                return Outcome(error=EOFError(f"{address} died") if died else error)
            except Exception as error:  # Dask's own, for a worker that died
                return Outcome(error=EOFError(f"{address} died: {error!r}"))
            return outcome


def _prepare(dask_worker: Worker) -> None:
    open_meeting_point(dask_worker)
    open_post_office(dask_worker)


def _rank_task(
    rank_main: RankMain,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    rank: int,
    addresses: list[str],
) -> Outcome:
    worker = get_worker()
    if worker.address != addresses[rank]:
        raise RuntimeError(f"rank {rank} belongs on {addresses[rank]}, not on {worker.address}")
    secede()
    gang = options["gang"]
    rendezvous = WorkerRendezvous(worker, gang, addresses[0], threading.Event())
    return play(make_on_worker, rank, len(addresses), rendezvous, rank_main, arguments, options)


def make_on_worker(
    rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Communicator:
    """Make a rank's communicator, with the mailbox of the worker that runs it."""
    mailbox = WorkerMailbox(get_worker(), options["gang"])
    return make_communicator(
        rank=rank, world_size=world_size, rendezvous=rendezvous, mailbox=mailbox, **options
    )
