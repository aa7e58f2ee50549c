"""Workers that join while others die."""

from __future__ import annotations

import threading
import time

import pytest
from distributed import Client, LocalCluster

from dask_nn.controller.admission import REACH_S
from dask_nn.controller.cluster import inspect_workers
from dask_nn.controller.membership import Membership

NOBODY = "tcp://127.0.0.1:1"


def test_who_joins_when_a_peer_dies_need_not_reach_it(client: Client) -> None:
    """It is known long before the attempt to reach the dead one is given up."""
    first, second = inspect_workers(client)
    membership = Membership(client, [first], threading.Event())
    membership.engaged = frozenset({first.address, NOBODY})
    with membership:  # the second one is asked whether it reaches both
        membership.removed.add(NOBODY)
        deadline = time.monotonic() + REACH_S - 2
        while second.address not in membership.known:
            assert time.monotonic() < deadline
            assert not membership.refused()
            membership.catch_up()
            time.sleep(0.05)


@pytest.mark.usefixtures("_quiet_dask")
def test_a_retired_worker_is_known_also_before_its_event_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The list of workers and the events come on ways of their own."""
    with (
        LocalCluster(n_workers=3, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        workers = inspect_workers(client)
        retired, evicted, stays = (worker.address for worker in workers)
        monkeypatch.setattr(client, "subscribe_topic", lambda *_: None)
        with Membership(client, workers, threading.Event()) as membership:
            client.retire_workers([retired])
            membership.evict(evicted, "hangs")
            membership.settle()
            membership.catch_up()
            assert membership.removed == {retired, evicted}
            assert membership.is_retired(retired)
            assert not membership.is_retired(evicted)
            assert not membership.is_retired(stays)
            monkeypatch.undo()
