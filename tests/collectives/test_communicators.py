"""Every communicator passes the one conformance suite."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dask_nn.collectives.choose import NAMES
from dask_nn.collectives.make import make_communicator
from dask_nn.collectives.rendezvous import LocalRendezvous, Rendezvous
from dask_nn.errors import ConfigurationError
from dask_nn.testing.communicator_suite import (
    CommunicatorSuite,
    PeerSuite,
    shared_memory_files,
    wait_until_ended,
)
from dask_nn.testing.gangs import Gang, ProcessGang, ThreadGang

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dask_nn.collectives.base import Communicator

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


class KilledPeerSuite:
    """What only real processes can show."""

    error = "CollectiveTimeout"

    def test_a_killed_peer_ends_the_exchange(self, gang: ProcessGang) -> None:
        """Nothing is left in shared memory, and no survivor waits beyond its deadline."""
        files = shared_memory_files()
        outcomes = gang.run(3, wait_until_ended, "collect", "kill", timeout_s=5.0)
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


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_its_communicator(name: str) -> None:
    """None opens a connection before it is opened, so all can be made anywhere."""
    communicator = make(name, 0, 1, LocalRendezvous(), {})
    assert communicator.name == name
    communicator.close()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got 'mpi'"):
        make("mpi", 0, 1, LocalRendezvous(), {})
