"""Which connections of a cluster are tried: all of a small one, a few of each worker of a large."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dask_nn.diagnosis.facts import ProcessFacts

__all__ = ["pairs_to_measure", "targets_of"]

ALL_UP_TO = 16
MEASURED = 8


def targets_of(addresses: Sequence[str]) -> dict[str, list[str]]:
    """Give the workers that each worker tries to reach.

    All others in clusters of up to 16 workers; else those 1, 2, 4, ... places further in a ring,
    so that every worker is tried from several others, and far ones from each other.
    """
    count = len(addresses)
    if count <= ALL_UP_TO:
        return {source: [a for a in addresses if a != source] for source in addresses}
    steps = [1 << power for power in range(count.bit_length()) if 1 << power < count]
    return {
        source: [addresses[(place + step) % count] for step in steps]
        for place, source in enumerate(addresses)
    }


def pairs_to_measure(
    workers: Sequence[ProcessFacts], working: Collection[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Choose a few working pairs, those of different hosts first, spread over the cluster."""
    place = {worker.address: (worker.machine, worker.network) for worker in workers}
    pairs = [pair for pair in working if pair[0] in place and pair[1] in place]
    far = sorted(pair for pair in pairs if place[pair[0]] != place[pair[1]])
    near = sorted(pair for pair in pairs if place[pair[0]] == place[pair[1]])
    return [*_spread(far, MEASURED), *near][:MEASURED] if far else _spread(near, MEASURED)


def _spread(pairs: list[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    if len(pairs) <= number:
        return pairs
    return [pairs[len(pairs) * place // number] for place in range(number)]
