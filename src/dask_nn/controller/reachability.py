"""Which workers reach each other: a network may be cut between two that the scheduler reaches."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from distributed import Client, Worker

__all__ = ["Findings", "ask_for_reach", "judge", "largest_reachable", "unreachable_from"]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an inquiry found.

    Parameters
    ----------
    silent : frozenset of str
        Workers that do not answer.
    cut : frozenset of (str, str)
        Pairs of the others of which one does not reach the other.
    """

    silent: frozenset[str] = frozenset()
    cut: frozenset[tuple[str, str]] = frozenset()


async def unreachable_from(
    addresses: Collection[str], timeout_s: float, dask_worker: Worker
) -> list[str]:
    """Tell which other workers a worker does not reach, over the connections that Dask uses."""

    async def fails(address: str) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await dask_worker.rpc(address).identity()
        except OSError:
            return True
        return False

    others = [address for address in addresses if address != dask_worker.address]
    failed = await asyncio.gather(*map(fails, others))
    return [address for address, failure in zip(others, failed, strict=True) if failure]


def ask_for_reach(
    client: Client, addresses: Iterable[str], timeout_s: float
) -> Future[dict[str, Any]]:
    """Let some workers try to reach each other; the answers are for `judge`."""
    wanted = sorted(addresses)
    # Who answers needs the timeout itself where it finds somebody out of reach.
    return ask_workers(client, unreachable_from, wanted, wanted, timeout_s, timeout_s=2 * timeout_s)


def judge(answers: Mapping[str, Any]) -> Findings:
    """Tell from the workers' answers who is silent, and who is cut off from whom.

    Parameters
    ----------
    answers : mapping
        From address to the addresses that it does not reach, or to an exception.
    """
    silent = {address for address, answer in answers.items() if isinstance(answer, Exception)}
    cut = {
        (min(address, other), max(address, other))
        for address, answer in answers.items()
        if address not in silent
        for other in answer
        if other not in silent
    }
    return Findings(silent=frozenset(silent), cut=frozenset(cut))


def largest_reachable(addresses: Sequence[str], cut: Collection[tuple[str, str]]) -> list[str]:
    """Leave out workers until all that are left reach each other; few, and late ones, if it can be.

    Parameters
    ----------
    addresses : sequence of str
        The workers, those that should stay first.
    cut : collection of (str, str)
        Pairs that do not reach each other.

    Returns
    -------
    list of str
        Those that stay, in their order.
    """
    left = list(addresses)
    while True:
        times = Counter(address for pair in cut if set(pair) <= set(left) for address in pair)
        if not times:
            return left
        most = max(times.values())
        left.remove(next(address for address in reversed(left) if times[address] == most))
