"""Which worker takes which rank, by the rows that it already holds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dask_nn.collectives.tree import shard_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distributed import Client
    from numpy.typing import NDArray

    from dask_nn.controller.placement import Seating
    from dask_nn.data.plan import Plan

__all__ = ["held_rows", "seat_near_data", "seat_where_data_lies"]


def seat_where_data_lies(
    seating: Seating, plan: Plan, keys: Sequence[tuple[Any, ...]], client: Client
) -> Seating:
    """Give ranks to workers so that as many rows as possible are read where they lie.

    It pays where blocks stay with their shards: where they are dealt anew in every epoch, every
    worker holds as much of what any rank will need.

    Parameters
    ----------
    seating : Seating
        The gang's workers.
    plan : Plan
        Of any epoch.
    keys : sequence of tuple
        For each block the Dask key of each field.
    client : Client
        Knows which worker has which key.
    """
    if plan.shuffle == "blocks" or len(seating.workers) < 2:
        return seating
    holders: Mapping[Any, Sequence[str]] = client.who_has()
    places = [set(holders.get(key_of[0], ())) for key_of in keys]
    return seat_near_data(seating, held_rows(seating, plan, places))


def held_rows(seating: Seating, plan: Plan, places: Sequence[set[str]]) -> NDArray[np.int64]:
    """Count the rows of each rank's shards that each worker holds.

    Parameters
    ----------
    seating : Seating
        The gang's workers.
    plan : Plan
        Of any epoch.
    places : sequence of set of str
        For each block the addresses of the workers that have it.

    Returns
    -------
    ndarray of int64, shape (ranks, workers)
    """
    number = len(seating.workers)
    rows = np.zeros((number, number), np.int64)
    for rank in range(number):
        for shard in range(*shard_range(rank, number, plan.shards)):
            for window in plan.windows(shard):
                for piece in window.pieces:
                    for place, address in enumerate(seating.addresses):
                        if address in places[piece.block]:
                            rows[rank, place] += piece.stop - piece.start
    return rows


def seat_near_data(seating: Seating, rows: NDArray[np.int64]) -> Seating:
    """Reorder the workers of each host: ranks of one host follow each other, and stay there.

    Parameters
    ----------
    seating : Seating
        The gang's workers.
    rows : ndarray of int64, shape (ranks, workers)
        Rows of each rank that each worker holds.
    """
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, worker in enumerate(seating.workers):
        hosts[worker.host].append(rank)
    chosen = list(seating.workers)
    for ranks in hosts.values():
        found, workers = linear_sum_assignment(rows[np.ix_(ranks, ranks)], maximize=True)
        for rank, worker in zip(found, workers, strict=True):
            chosen[ranks[rank]] = seating.workers[ranks[worker]]
    return replace(seating, workers=tuple(chosen))
