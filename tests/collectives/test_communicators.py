"""Every communicator passes the one conformance suite."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dask_nn.collectives.choose import NAMES
from dask_nn.collectives.mailbox import LocalMailbox
from dask_nn.collectives.make import make_communicator
from dask_nn.collectives.rendezvous import LocalRendezvous, Rendezvous
from dask_nn.errors import ConfigurationError
from dask_nn.testing.communicator_cases import (
    WAKE_S,
    cross_barriers,
    open_communicator,
    shared_memory_files,
    values,
    wait_until_ended,
)
from dask_nn.testing.communicator_suite import CommunicatorSuite, PeerSuite
from dask_nn.testing.gangs import Factory, Gang, ProcessGang, ThreadGang

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dask_nn.collectives.base import Communicator

# Ranks on each host, by the number of ranks.
HOSTS = {1: (1,), 2: (1, 1), 3: (2, 1), 4: (2, 2), 5: (2, 1, 2)}
OTHER_HOSTS = {1: (1,), 2: (2,), 3: (1, 2), 4: (3, 1), 5: (1, 3, 1)}
WIDE = ((2, 2), (8, 3), (8, 8), (13, 5), (31, 9))


def make(
    name: str, rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Communicator:
    return make_communicator(
        name,
        rank=rank,
        world_size=world_size,
        gang=f"test-{id(rendezvous)}",
        rendezvous=rendezvous,
        **options,
    )


class TestSerial(CommunicatorSuite):
    gangs = ((1, 1), (2, 1), (7, 1), (64, 1))
    large_gang = (5, 1)

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(partial(make, "serial"))


class TestThreads(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), *WIDE)

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(partial(make, "threads"))


class TestSharedMemoryInThreads(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), (8, 2), (7, 3))

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(partial(make, "shared_memory"))


class TestGlooInThreads(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), (8, 2), (7, 3))
    exchanges = 50

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(partial(make, "gloo"))


def make_by_mail(
    rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Communicator:
    mailbox = LocalMailbox(f"test-{id(rendezvous)}")
    return make("dask", rank, world_size, rendezvous, options | {"mailbox": mailbox})


def end_while_a_letter_is_late(communicator: Communicator) -> None:
    """Exchange once, and leave; the letter of rank 2 to rank 0 comes when rank 1 has left."""
    open_communicator(communicator, communicator.world_size, 5)
    communicator.barrier()
    mailbox = communicator._mailbox
    send, late = mailbox.send, []

    def send_later(peer: int, payload: Any) -> None:
        if peer:
            send(peer, payload)
        else:
            late.append(threading.Timer(0.5, send, (peer, payload)))
            late[0].start()

    if communicator.rank == 2:
        mailbox.send = send_later
    communicator.publish()
    communicator.collect()
    for timer in late:
        timer.join()


class TestMailInThreads(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), *WIDE)
    exchanges = 50

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(make_by_mail)

    def test_who_has_been_read_may_leave_while_another_is_waited_for(self, gang: Gang) -> None:
        values(gang.run(3, end_while_a_letter_is_late, timeout_s=30.0))


def make_on_hosts(
    rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Communicator:
    """Make one rank of a gang whose ranks pretend to be on several hosts."""
    options = {"hosts": HOSTS[world_size]} | options
    return make("shared_memory+gloo", rank, world_size, rendezvous, options)


def make_on_hosts_by_mail(
    rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Communicator:
    mailbox = LocalMailbox(f"test-{id(rendezvous)}")
    options = {"hosts": OTHER_HOSTS[world_size], "mailbox": mailbox} | options
    return make("shared_memory+dask", rank, world_size, rendezvous, options)


class TestHostsInThreads(CommunicatorSuite, PeerSuite):
    gangs = ((1, 1), (2, 2), (8, 4), (3, 3), (13, 5))
    exchanges = 50

    @pytest.fixture
    def gang(self) -> Gang:
        return ThreadGang(make_on_hosts_by_mail)


class KilledPeerSuite:
    """What only real processes can show."""

    error = "CollectiveTimeout"

    def test_a_killed_peer_ends_the_exchange(self, gang: ProcessGang) -> None:
        """Nothing is left in shared memory, and no survivor waits beyond its deadline."""
        files = shared_memory_files()
        outcomes = gang.run(3, wait_until_ended, "collect", "kill", timeout_s=2.0)
        assert isinstance(outcomes[0].error, EOFError)
        assert {outcome.value[0] for outcome in outcomes[1:]} <= {self.error, "Aborted"}
        assert self.error in {outcome.value[0] for outcome in outcomes[1:]}
        assert shared_memory_files() <= files


class TestSharedMemory(CommunicatorSuite, PeerSuite, KilledPeerSuite):
    gangs = ((1, 1), (2, 2), (8, 3), (13, 5))

    @pytest.fixture(scope="class")
    @classmethod
    def gang(cls) -> Iterator[ProcessGang]:
        with ProcessGang(partial(make, "shared_memory")) as gang:
            yield gang


class TestGloo(CommunicatorSuite, PeerSuite, KilledPeerSuite):
    gangs = ((2, 2), (8, 3), (7, 4))
    exchanges = 50
    error = "Aborted"

    @pytest.fixture(scope="class")
    @classmethod
    def gang(cls) -> Iterator[ProcessGang]:
        with ProcessGang(partial(make, "gloo")) as gang:
            yield gang


class TestHosts(CommunicatorSuite, PeerSuite, KilledPeerSuite):
    gangs = ((1, 1), (2, 2), (7, 3), (8, 4), (13, 5))
    exchanges = 50

    @pytest.fixture(scope="class")
    @classmethod
    def gang(cls) -> Iterator[ProcessGang]:
        with ProcessGang(make_on_hosts) as gang:
            yield gang

    def test_a_rank_that_leads_no_host_and_dies_ends_the_exchange_of_all_hosts(
        self, gang: ProcessGang
    ) -> None:
        """Its leader waits in vain, and tells the other hosts."""
        victim = 1
        values(gang.run(4, cross_barriers, 1))  # who died before is there again
        arguments = ("collect", "kill", victim)
        outcomes = gang.run(4, wait_until_ended, *arguments, timeout_s=2.0)
        assert isinstance(outcomes[victim].error, EOFError)
        others = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
        assert {outcome.value[0] for outcome in others} <= {"CollectiveTimeout", "Aborted"}

    def test_a_rank_that_leads_no_host_ends_the_exchange_of_all_hosts(
        self, gang: ProcessGang
    ) -> None:
        outcomes = gang.run(5, wait_until_ended, "collect", "abort", 4, timeout_s=30.0)
        ended = outcomes[4].value[1]
        for outcome in outcomes[:4]:
            assert outcome.value[0] == "Aborted"
            assert outcome.value[1] - ended < 1.0


@pytest.mark.parametrize(
    "factory", [partial(make, "shared_memory"), make_by_mail, make_on_hosts_by_mail]
)
def test_what_a_rank_watches_ends_its_wait(factory: Factory) -> None:
    """Whether it waits for its own host or for another one."""
    outcomes = ThreadGang(factory).run(3, wait_until_ended, "collect", "watch", timeout_s=30.0)
    (_, began), (error, ended), _ = values(outcomes)
    assert error == "Aborted"
    assert ended - began < WAKE_S


@pytest.mark.parametrize("hosts", [(4,), (1, 3), (3, 1), (2, 2), (1, 1, 1, 1), (1, 2, 1)])
def test_any_spread_over_hosts_gives_the_bits_of_the_tree(hosts: tuple[int, ...]) -> None:
    """Shards that neither hosts nor ranks divide, and fewer shards than ranks."""
    suite = CommunicatorSuite()
    for shards in (3, 4, 11):
        for above in (0, 1 << 20):
            gang = ThreadGang(make_on_hosts)
            options = {"hosts": hosts, "slice_above_bytes": above}
            suite.check_totals(gang, shards, 4, 131, **options)


def test_hosts_that_do_not_share_all_ranks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"share 4 ranks.*got \(2, 1\)"):
        make("shared_memory+gloo", 0, 4, LocalRendezvous(), {"hosts": (2, 1)})


def test_the_way_over_dask_needs_a_mailbox() -> None:
    with pytest.raises(ConfigurationError, match="'dask' needs the mailbox"):
        make("dask", 0, 1, LocalRendezvous(), {})


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_its_communicator(name: str) -> None:
    """None opens a connection before it is opened, so all can be made anywhere."""
    options = {"hosts": (1,), "mailbox": LocalMailbox("test")}
    communicator = make(name, 0, 1, LocalRendezvous(), options)
    assert communicator.name == name
    communicator.close()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got 'mpi'"):
        make("mpi", 0, 1, LocalRendezvous(), {})
