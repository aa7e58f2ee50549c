"""Letters over Dask's own connections, with TLS, pass the conformance suite of communicators."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from distributed import Client, LocalCluster, Security, get_worker

from dask_nn.controller.mail import WorkerMailbox, open_post_office
from dask_nn.testing.communicator_cases import (
    exchange_leaves,
    open_communicator,
    values,
    wait_until_ended,
)
from dask_nn.testing.communicator_suite import CommunicatorSuite, PeerSuite
from dask_nn.testing.worker_gangs import WorkerGang

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dask_nn.collectives.base import Communicator


@pytest.fixture(scope="module")
def tls_client(_quiet_dask: None) -> Iterator[Client]:
    """Start four worker processes that talk over TLS alone."""
    with (
        LocalCluster(
            n_workers=4,
            threads_per_worker=1,
            security=Security.temporary(),
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


class TestMail(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), (2, 2), (8, 3), (7, 4))
    exchanges = 30

    @pytest.fixture
    def gang(self, tls_client: Client) -> WorkerGang:
        assert all(address.startswith("tls://") for address in tls_client.nthreads())
        return WorkerGang(tls_client, "dask")


class TestMailBetweenHosts:
    """Shared memory inside pretended hosts, TLS between them."""

    def test_totals_have_the_bits_of_the_tree(self, tls_client: Client) -> None:
        gang = WorkerGang(tls_client, "shared_memory+dask")
        for hosts in ((2, 2), (1, 3)):
            for above in (0, 1 << 20):
                CommunicatorSuite().check_totals(
                    gang, 7, 4, 1003, hosts=hosts, slice_above_bytes=above
                )


def test_a_leaf_that_is_no_float_buffer_of_dask_travels_too(tls_client: Client) -> None:
    """More than Dask's own threshold for another thread: letters still come in order."""
    gang = WorkerGang(tls_client, "dask")
    digests = values(gang.run(2, exchange_leaves, 2, 3_000_001, 3, "float64"))
    assert digests[0] == digests[1]


def test_letters_take_none_of_the_connections_that_the_worker_has_for_all_else(
    tls_client: Client,
) -> None:
    """There are 512 of those, for any number of peers."""

    def pooled(communicator: Communicator) -> int:
        open_communicator(communicator, 3, 10)
        communicator.barrier()
        own = get_worker()
        peers = own.rpc.occupied.keys() - {own.scheduler.address}
        found = sum(len(own.rpc.occupied[peer]) for peer in peers)
        communicator.barrier()
        return found

    assert values(WorkerGang(tls_client, "dask").run(3, pooled)) == [0, 0, 0]


def test_a_worker_that_is_closed_is_lost_although_its_process_goes_on() -> None:
    with LocalCluster(
        n_workers=2, processes=False, dashboard_address=":0", silence_logs=logging.CRITICAL
    ) as cluster:
        workers = list(cluster.workers.values())
        boxes = [WorkerMailbox(worker, "gang") for worker in workers]
        for worker in workers:
            open_post_office(worker)
        addresses = [box.register(member) for member, box in enumerate(boxes)]
        boxes[1].connect(0, addresses[0])
        assert boxes[0].await_peers([1], timeout_s=20)
        cluster.sync(workers[1].close)
        with pytest.raises(ConnectionError):
            boxes[0].receive(1, timeout_s=20)
        for box in boxes:
            box.close()


def test_a_killed_worker_ends_the_exchange_at_once(tls_client: Client) -> None:
    """The last test: nobody has to wait for the worker that comes in its place."""
    gang = WorkerGang(tls_client, "dask")
    outcomes = gang.run(3, wait_until_ended, "collect", "kill", timeout_s=60.0)
    assert isinstance(outcomes[0].error, EOFError)
    assert [outcome.value[0] for outcome in outcomes[1:]] == ["Aborted"] * 2
