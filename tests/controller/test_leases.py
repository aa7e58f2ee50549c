"""Who trains on which workers, asked of a real scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from distributed import Client

from dask_nn.controller.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def workers(threads_client: Client) -> list[str]:
    return sorted(threads_client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def runs(threads_client: Client) -> Iterator[list[Leases]]:
    found = [Leases(threads_client, name) for name in ("first", "second", "third")]
    yield found
    for run in found:
        run.release()


def test_a_run_keeps_its_workers_whoever_waits_for_them(workers, runs):
    """It asks again for what it has whenever its gang changes."""
    first, second, _ = runs
    assert not first.claim(workers)
    assert second.claim(workers, queue=True) == set(workers)
    assert not first.claim(workers)
    assert not first.claim(workers[:1])
    assert first.taken() == {workers[1]}


def test_what_others_wait_for_is_not_taken_from_under_them(workers, runs):
    first, second, third = runs
    first.claim(workers[:1])
    second.claim(workers, queue=True)
    assert third.taken() == set(workers)
    assert third.claim(workers[1:]) == {workers[1]}
    first.release()
    assert third.claim(workers[1:]) == {workers[1]}
    assert not second.claim(workers, queue=True)


def test_runs_are_known_until_they_are_over(workers, runs, threads_client):
    first, second, _ = runs
    first.claim(workers)
    second.claim(workers, queue=True)
    assert first.runs() == {"first", "second"}
    with Client(threads_client.scheduler.address, set_as_default=False) as other:
        Leases(other, "of a client that goes").claim(workers, queue=True)
        assert "of a client that goes" in first.runs()
    second.release()
    assert first.runs() == {"first"}
