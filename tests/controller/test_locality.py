from __future__ import annotations

from functools import partial

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import futures_of, wait
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.controller.locality import held_rows, seat_near_data, seat_where_data_lies
from dask_nn.controller.placement import Seating, WorkerFacts
from dask_nn.data.plan import Plan

WIDTH = 5_000
PLAN = Plan(block_lengths=(10,) * 8, shards=4, batch_size=8, shuffle="none")


def seating(*hosts: str) -> Seating:
    workers = tuple(
        WorkerFacts(
            address=f"w{number}", host=host, process=number, machine="", cores=9, threads=1,
            memory_bytes=0,
        )
        for number, host in enumerate(hosts)
    )  # fmt: skip
    return Seating(workers=workers, threads_per_rank=1)


def test_rows_are_counted_by_rank_and_worker():
    places = [{"w1"}] * 4 + [{"w0"}] * 3 + [{"w0", "w1"}]
    assert held_rows(seating("a", "a"), PLAN, places).tolist() == [[0, 40], [40, 10]]


def test_ranks_go_where_their_rows_are():
    places = [{"w2"}, {"w2"}, {"w0"}, {"w0"}, {"w3"}, {"w3"}, {"w1"}, {"w1"}]
    before = seating("a", "a", "a", "a")
    found = seat_near_data(before, held_rows(before, PLAN, places))
    assert found.addresses == ["w2", "w0", "w3", "w1"]


def test_ranks_of_a_host_stay_there():
    places = [{"w3"}, {"w3"}, {"w2"}, {"w2"}, {"w1"}, {"w1"}, {"w0"}, {"w0"}]
    before = seating("a", "a", "b", "b")
    found = seat_near_data(before, held_rows(before, PLAN, places))
    assert [worker.host for worker in found.workers] == ["a", "a", "b", "b"]
    assert sorted(found.addresses) == ["w0", "w1", "w2", "w3"]


def test_nothing_changes_where_blocks_are_dealt_anew(client):
    plan = Plan(block_lengths=(10,) * 8, shards=4, batch_size=8, shuffle="blocks")
    before = seating("a", "a")
    assert seat_where_data_lies(before, plan, [], client) is before


@pytest.mark.parametrize("turned", [False, True])
def test_a_run_whose_blocks_lie_apart_fetches_none(client, turned):
    first, second = sorted(client.scheduler_info()["workers"])
    if turned:
        first, second = second, first
    rows = np.ones((40, WIDTH), dtype="f4")
    with dask.annotate(workers=lambda key: [first if key[1] < 2 else second]):
        X = da.map_blocks(np.add, da.from_array(rows, chunks=(10, WIDTH)), 0, dtype="f4")
        X = client.persist(X, optimize_graph=False)
    wait(X)
    places = client.who_has(futures_of(X))
    assert sorted(places.values()) == sorted([(first,)] * 2 + [(second,)] * 2)
    before = sent_bytes(client)
    dask_nn.train(
        partial(nn.Linear, WIDTH, 1),
        X,
        X[:, :1].persist(),
        loss=nn.MSELoss(),
        optimizer=partial(SGD, lr=0.0),
        epochs=3,
        batch_size=4,
        shuffle=False,
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
    )
    # The client looks at a few rows; a block is far more.
    assert sent_bytes(client) - before < 10 * WIDTH * 4


def sent_bytes(client) -> int:
    """Count the bytes that workers sent to each other."""
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())
