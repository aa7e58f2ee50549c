"""The workers of a cluster as the client sees them, and whether they can train together."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import platform
import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from dask_nn.controller import scheduler_side
from dask_nn.controller.placement import WorkerFacts
from dask_nn.controller.worker_side import describe
from dask_nn.errors import ClusterError, IncompatibleWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.controller.scheduler_side import Listed

__all__ = [
    "WorkerList",
    "ask_scheduler",
    "ask_workers",
    "check_versions",
    "client_versions",
    "in_loop",
    "inspect_workers",
    "list_workers",
    "processes",
    "retired_among",
    "scheduler_address",
    "scheduler_lost",
]

LISTED = 5
# How long the scheduler may take to list its workers, and a worker, which imports torch, to answer.
LIST_S = 10.0
# Ranks and tasks go on without the scheduler: one that is busy for so long is waited for.
SILENT_S = 30.0
# A scheduler that takes so long for an answer has had no time for others either.
BUSY_S = 0.5
DESCRIBE_S = 60.0
POLL_S = 0.5


def inspect_workers(client: Client) -> list[WorkerFacts]:
    """Ask every worker to describe itself.

    Raises
    ------
    ClusterError
        If there are no workers, or the scheduler does not answer.
    IncompatibleWorkers
        If a worker lacks dask-nn or torch, or has other versions than this client.
    """
    listed = list_workers(client)
    staying = sorted(address for address, worker in listed.items() if not worker.is_closing)
    answers = ask_workers(client, describe, staying, timeout_s=DESCRIBE_S).result(2 * DESCRIBE_S)
    # A worker that leaves at this moment, or does not answer, is none to count on.
    answers = {
        address: answer
        for address, answer in answers.items()
        if not isinstance(answer, OSError | KeyError)
    }
    if not answers:
        closing = len(listed) - len(staying)
        message = (
            f"the cluster at {scheduler_address(client)} has no workers"
            f"{f' but {closing} that are closing' if closing else ''}; scale it up, or wait for "
            "its workers with client.wait_for_workers(1)"
        )
        raise ClusterError(message)
    broken = {
        address: answer for address, answer in answers.items() if isinstance(answer, BaseException)
    }
    if broken:
        reasons = [f"{address}: {error!r}" for address, error in broken.items()]
        message = (
            f"{len(broken)} of {len(answers)} workers cannot run dask-nn ({_some(reasons)}); "
            "install the same dask-nn and torch on the workers as on the client"
        )
        raise IncompatibleWorkers(message)
    workers = [WorkerFacts(**answer) for answer in answers.values()]
    check_versions(workers, client_versions())
    return workers


def list_workers(client: Client) -> dict[str, Listed]:
    """Give the scheduler's workers by address.

    Raises
    ------
    ClusterError
        If the scheduler is gone, or does not answer.
    """
    found: dict[str, Listed] = ask_scheduler(client, scheduler_side.list_workers, timeout_s=LIST_S)
    return found


def processes(listed: Mapping[str, Listed]) -> dict[str, str]:
    """Give what tells the process at each address from the next one there."""
    return {address: worker.process for address, worker in listed.items()}


def retired_among(client: Client, addresses: Collection[str]) -> Collection[str]:
    """Give those of some workers that are gone because they were asked to leave, as far as known.

    Raises
    ------
    ClusterError
        If the scheduler is gone.
    """
    try:
        found: Collection[str] = ask_scheduler(
            client, scheduler_side.retired_among, addresses, timeout_s=LIST_S
        )
    except ClusterError:
        if client.status != "running":
            raise
        return ()
    return found


def ask_scheduler(
    client: Client, function: Callable[..., Any], *arguments: Any, timeout_s: float
) -> Any:
    """Call a function on the scheduler, as ``Client.run_on_scheduler`` does without a deadline.

    Raises
    ------
    ClusterError
        If the scheduler is gone, or does not answer in time.
    """
    question: Any = client._run_on_scheduler(function, *arguments)  # noqa: SLF001
    answer = in_loop(client, question)
    deadline = time.monotonic() + timeout_s
    # Dask would try to reach a scheduler that is gone for as long as a connection may take.
    while not wait([answer], min(POLL_S, timeout_s)).done:
        if client.status != "running" or time.monotonic() > deadline:
            break
    try:
        return answer.result(0)
    except TimeoutError as error:
        if client.status != "running":
            raise scheduler_lost(client) from error
        message = f"the scheduler did not answer within {timeout_s:g} s"
        raise ClusterError(message) from error
    except OSError as error:
        raise scheduler_lost(client) from error
    finally:
        answer.cancel()


def is_busy(client: Client) -> bool:
    """Tell as `answers_late` does, to another thread than the client's event loop."""
    return in_loop(client, answers_late(client)).result(2 * SILENT_S)


async def answers_late(client: Client) -> bool:
    """Tell, within `SILENT_S`, whether the scheduler takes long: workers are not to blame then."""
    question: Any = client._run_on_scheduler(scheduler_side.list_workers)  # noqa: SLF001
    asked_at = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SILENT_S):
            await question
    return time.monotonic() - asked_at > BUSY_S


class WorkerList:
    """The scheduler's list of workers, asked for again and again.

    Parameters
    ----------
    client : Client
        Of the cluster.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._unanswered_since: float | None = None

    def ask(self) -> dict[str, Listed] | None:
        """Give the workers as `list_workers` does; None if the scheduler may answer yet.

        Raises
        ------
        ClusterError
            If the scheduler is gone, or has not answered for `SILENT_S`.
        """
        asked_at = time.monotonic()
        try:
            found = list_workers(self._client)
        except ClusterError:
            if self._unanswered_since is None:
                self._unanswered_since = asked_at
            silent_s = time.monotonic() - self._unanswered_since
            if self._client.status != "running" or silent_s > SILENT_S:
                raise
            return None
        self._unanswered_since = None
        return found


def scheduler_lost(client: Client) -> ClusterError:
    """Make the error for a scheduler that is gone."""
    return ClusterError(
        f"the connection to the scheduler is {client.status}; without it nobody can say what "
        "became of the workers. checkpoint= and resume=True go on elsewhere"
    )


def in_loop[T](client: Client, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in a client's event loop; its future has a deadline where Dask has none."""
    loop: Any = client.loop
    return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)


def ask_workers(
    client: Client,
    function: Callable[..., Any],
    addresses: Sequence[str],
    *arguments: Any,
    timeout_s: float,
) -> Future[dict[str, Any]]:
    """Call a function on some workers at once, without waiting for those that hang.

    Parameters
    ----------
    client : Client
        Of the cluster.
    function : callable
        As for ``Client.run``.
    addresses : sequence of str
        The workers.
    *arguments
        Of the function.
    timeout_s : float
        What has not answered by then counts as a TimeoutError.

    Returns
    -------
    concurrent.futures.Future
        From address to answer, or to the exception in its place.
    """

    async def ask(address: str) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                answers = await client._run(  # noqa: SLF001  (Client.run waits for all, for ever)
                    function, *arguments, workers=[address], on_error="return"
                )
            return answers.get(address, KeyError(address))
        except Exception as error:
            return error

    async def ask_all() -> dict[str, Any]:
        answers = await asyncio.gather(*map(ask, addresses))
        return dict(zip(addresses, answers, strict=True))

    return in_loop(client, ask_all())


def scheduler_address(client: Client) -> str:
    """Give the address of the scheduler that a client is connected to."""
    return str(client.scheduler.address) if client.scheduler is not None else "?"


def client_versions() -> dict[str, str]:
    """Give the versions of this process that workers must share."""
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch").split("+")[0],
        "dask-nn": importlib.metadata.version("dask-nn"),
    }


def check_versions(workers: Sequence[WorkerFacts], wanted: dict[str, str]) -> None:
    """Refuse workers whose versions differ from the client's.

    Of Python the minor version counts, of the others the whole one.

    Raises
    ------
    IncompatibleWorkers
        Names the workers, what they have and what the client has.
    """
    for name, version in wanted.items():
        different = []
        for worker in workers:
            found = worker.versions.get(name, "")
            same = (
                found.split(".")[:2] == version.split(".")[:2]
                if name == "python"
                else found == version
            )
            if not same:
                different.append(f"{worker.address} has {found or 'none'}")
        if different:
            problems = {w.versions["problem"] for w in workers if "problem" in w.versions}
            why = f" ({'; '.join(sorted(problems))})" if problems else ""
            message = (
                f"the client has {name} {version}, but {_some(different)}{why}; install the same "
                f"version of {name} everywhere, or leave these workers out"
            )
            raise IncompatibleWorkers(message)


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(texts[:LISTED])
    return shown if len(texts) <= LISTED else f"{shown} and {len(texts) - LISTED} more"
