"""Who trains on which workers: runs that want the same ones take turns.

The scheduler keeps the list, so that a look and a claim are one action there, and a run whose
client is gone holds nothing any more: the scheduler knows its clients.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import SILENT_S, ask_scheduler
from dask_nn.controller.scheduler_side import RanksMayMove
from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distributed import Client

__all__ = ["Leases"]

# Whoever only looks may look again.
LOOK_S = 10.0
# A scheduler that is busy does what it is asked when it comes to it.
RELEASE_S = 2.0
POLL_S = 0.2
# The attributes of the scheduler that hold the list, and the runs that are not over.
ATTRIBUTE = "dask_nn_leases"
RUNS = "dask_nn_runs"


class Leases:
    """The workers that a run has for itself.

    Parameters
    ----------
    client : Client
        Of the cluster.
    run_id : str
        The run.
    """

    def __init__(self, client: Client, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def claim(self, wanted: Iterable[str], *, queue: bool = False) -> set[str]:
        """Claim some workers, if all of them are free and nobody waited for one of them before.

        Workers that this run has are its own whoever waits for them; those that it does not want
        any more are given back with success.

        Parameters
        ----------
        wanted : iterable of str
            The workers.
        queue : bool
            Whether to stand in line for them otherwise.

        Returns
        -------
        set of str
            Those of the wanted workers that others have or wait for; empty with success.

        Raises
        ------
        ClusterError
            If the scheduler does not answer.
        """
        return set(self._ask(_claim, sorted(wanted), queue))

    def taken(self) -> set[str]:
        """Give the workers that other runs have, or waited for before this one did.

        Raises
        ------
        ClusterError
            If the scheduler does not answer.
        """
        return set(self._ask(_taken, timeout_s=LOOK_S))

    def runs(self) -> set[str]:
        """Give the runs of this cluster that are not over, this one included.

        Raises
        ------
        ClusterError
            If the scheduler does not answer.
        """
        return set(self._ask(_runs))

    def wait_for(
        self, wanted: Iterable[str], timeout_s: float, on_wait: Callable[[set[str]], None]
    ) -> None:
        """Claim some workers, in the order of asking.

        Parameters
        ----------
        wanted : iterable of str
            The workers.
        timeout_s : float
            How long to wait for others to end.
        on_wait : callable
            Told once which workers others have.

        Raises
        ------
        ClusterError
            If they are not free by then, or the scheduler does not answer.
        """
        wanted = sorted(wanted)
        began = time.monotonic()
        told = False
        while others := self.claim(wanted, queue=True):
            if not told:
                told = True
                on_wait(others)
            if time.monotonic() - began > timeout_s:
                message = (
                    f"another training still runs on {', '.join(sorted(others))} after "
                    f"{timeout_s:g} s; wait for it, use other workers, or raise "
                    "dask-nn.queue-timeout"
                )
                raise ClusterError(message)
            time.sleep(POLL_S)

    def release(self) -> None:
        """Give everything back, and a place in the queue."""
        with contextlib.suppress(Exception):  # what ended the run says more
            self._ask(_release, timeout_s=RELEASE_S)

    def _ask(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = SILENT_S
    ) -> Any:
        return ask_scheduler(
            self._client, function, self._run_id, self._client.id, *arguments, timeout_s=timeout_s
        )


def _table(scheduler: Any) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, list[str]]]]:
    """Give who has each worker, and who waits for which, without those that are gone."""
    table = getattr(scheduler, ATTRIBUTE, None)
    if table is None:
        table = ({}, {})
        setattr(scheduler, ATTRIBUTE, table)
    held, waiting = table
    for address, (_, client_id) in list(held.items()):
        if client_id not in scheduler.clients or address not in scheduler.workers:
            del held[address]
    for run_id, (client_id, _) in list(waiting.items()):
        if client_id not in scheduler.clients:
            del waiting[run_id]
    return table


def _out_of_reach(
    run_id: str, held: dict[str, tuple[str, str]], waiting: dict[str, tuple[str, list[str]]]
) -> set[str]:
    """Give the workers that others have, or waited for earlier, without those that the run has."""
    others = {address for address, (owner, _) in held.items() if owner != run_id}
    for other, (_, addresses) in waiting.items():
        if other == run_id:
            break
        others |= set(addresses)
    return others - {address for address, (owner, _) in held.items() if owner == run_id}


def _claim(
    run_id: str,
    client_id: str,
    wanted: list[str],
    queue: bool,
    dask_scheduler: Any,
) -> list[str]:
    RanksMayMove.add_to(dask_scheduler)
    held, waiting = _table(dask_scheduler)
    _known_runs(dask_scheduler)[run_id] = client_id
    out_of_reach = _out_of_reach(run_id, held, waiting)
    others = [address for address in wanted if address in out_of_reach]
    if others:
        if queue:
            waiting.setdefault(run_id, (client_id, wanted))
        return others
    waiting.pop(run_id, None)
    _give_back(held, run_id)
    held.update(dict.fromkeys(wanted, (run_id, client_id)))
    return []


def _taken(run_id: str, client_id: str, dask_scheduler: Any) -> list[str]:
    del client_id
    return sorted(_out_of_reach(run_id, *_table(dask_scheduler)))


def _known_runs(scheduler: Any) -> dict[str, str]:
    """Give the runs whose clients live: a run may have no worker at all for a while."""
    runs: dict[str, str] = getattr(scheduler, RUNS, {})
    setattr(scheduler, RUNS, runs)
    for run_id in [
        run_id for run_id, client_id in runs.items() if client_id not in scheduler.clients
    ]:
        del runs[run_id]
    return runs


def _runs(run_id: str, client_id: str, dask_scheduler: Any) -> list[str]:
    del run_id, client_id
    return list(_known_runs(dask_scheduler))


def _release(run_id: str, client_id: str, dask_scheduler: Any) -> None:
    del client_id
    held, waiting = _table(dask_scheduler)
    waiting.pop(run_id, None)
    _known_runs(dask_scheduler).pop(run_id, None)
    _give_back(held, run_id)


def _give_back(held: dict[str, tuple[str, str]], run_id: str) -> None:
    for address in [address for address, (owner, _) in held.items() if owner == run_id]:
        del held[address]
