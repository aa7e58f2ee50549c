"""Workers that join while others die."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dask_nn.controller.admission import REACH_S
from dask_nn.controller.cluster import inspect_workers
from dask_nn.controller.membership import Membership

if TYPE_CHECKING:
    from distributed import Client

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
