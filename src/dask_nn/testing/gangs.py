"""Gangs of ranks for tests: threads of this process, or processes that outlive many tests."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from distributed.utils import get_mp_context

from dask_nn.collectives.rendezvous import FileRendezvous, LocalRendezvous, Rendezvous

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from dask_nn.collectives.base import Communicator

__all__ = ["Gang", "Outcome", "ProcessGang", "ThreadGang"]

PATIENCE_S = 60.0

Factory = Callable[..., "Communicator"]
RankMain = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank returned, or the error that ended it; ``EOFError`` if its process died."""

    value: Any = None
    error: BaseException | None = None


class Gang(Protocol):
    """Something that runs a function in several ranks at once."""

    def run(
        self, world_size: int, rank_main: RankMain, *arguments: Any, **options: Any
    ) -> list[Outcome]:
        """Call ``rank_main(communicator, *arguments)`` in every rank.

        Parameters
        ----------
        world_size : int
            Number of ranks.
        rank_main : callable
            A function of a module, so that it reaches other processes.
        *arguments : object
            What it gets after the communicator.
        **options : object
            Options of the communicator.

        Returns
        -------
        list of Outcome
            One for each rank.
        """


def play(
    factory: Factory,
    rank: int,
    world_size: int,
    rendezvous: Rendezvous,
    rank_main: RankMain,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Outcome:
    """Run one rank with a communicator of its own, and close that."""
    try:
        communicator = factory(rank, world_size, rendezvous, options)
        try:
            return Outcome(value=rank_main(communicator, *arguments))
        finally:
            communicator.close()
    except Exception as error:
        return Outcome(error=error.with_traceback(None))


class ThreadGang:
    """Ranks that are threads of this process.

    Parameters
    ----------
    factory : callable
        ``factory(rank, world_size, rendezvous, options)`` makes a communicator.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory

    def run(
        self, world_size: int, rank_main: RankMain, *arguments: Any, **options: Any
    ) -> list[Outcome]:
        """Run one thread for each rank."""
        rendezvous = LocalRendezvous()
        outcomes: list[Outcome] = [Outcome(error=TimeoutError("still running"))] * world_size

        def rank_thread(rank: int) -> None:
            outcomes[rank] = play(
                self._factory, rank, world_size, rendezvous, rank_main, arguments, options
            )

        threads = [
            threading.Thread(target=rank_thread, args=(rank,), daemon=True)
            for rank in range(world_size)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE_S
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return outcomes


class ProcessGang:
    """Ranks that are processes; they stay for the next run, and the dead are replaced.

    They are started as Dask's nannies start workers
    (``distributed.worker.multiprocessing-method``).

    Parameters
    ----------
    factory : callable
        ``factory(rank, world_size, rendezvous, options)`` makes a communicator; a function of a
        module.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._members:
            self._end(*self._members.pop())

    def run(
        self, world_size: int, rank_main: RankMain, *arguments: Any, **options: Any
    ) -> list[Outcome]:
        """Hand one rank to each process."""
        while len(self._members) < world_size:
            self._members.append(_start())
        folder = tempfile.mkdtemp(prefix="dask-nn-gang-")
        try:
            rendezvous = FileRendezvous(folder)
            for rank, (_, pipe) in enumerate(self._members[:world_size]):
                pipe.send(
                    (self._factory, rank, world_size, rendezvous, rank_main, arguments, options)
                )
            deadline = time.monotonic() + PATIENCE_S
            return [self._outcome(rank, deadline) for rank in range(world_size)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _outcome(self, rank: int, deadline: float) -> Outcome:
        process, pipe = self._members[rank]
        try:
            if pipe.poll(max(deadline - time.monotonic(), 0)):
                outcome: Outcome = pipe.recv()
                return outcome
            error: Exception = TimeoutError(f"rank {rank} did not end within {PATIENCE_S:g} s")
        except (EOFError, ConnectionError):
            error = EOFError(f"the process of rank {rank} died")
        self._end(process, pipe)
        self._members[rank] = _start()
        return Outcome(error=error)

    def _end(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        pipe.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = get_mp_context()
    here, there = context.Pipe()
    process = context.Process(target=_member_main, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def _member_main(pipe: Connection) -> None:
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(play(*job))
