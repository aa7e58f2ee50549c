"""Workers that do not reach each other, and workers that may not join."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dask_nn
from dask_nn.controller.admission import Admission
from dask_nn.controller.reachability import (
    Findings,
    ask_for_reach,
    judge,
    largest_reachable,
    unreachable_from,
)
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from distributed import Client

NOBODY = "tcp://127.0.0.1:1"


@pytest.fixture
def workers(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def test_workers_that_reach_each_other(client, workers):
    answers = ask_for_reach(client, workers, 10.0).result(30)
    assert judge(answers) == Findings()


def test_a_worker_that_is_not_there_is_silent_and_one_out_of_reach_is_named(client, workers):
    answers = ask_for_reach(client, [*workers, NOBODY], 1.0).result(30)
    assert judge(answers) == Findings(silent=frozenset({NOBODY}))
    found = client.run(unreachable_from, [*workers, NOBODY], 1.0)
    assert set(map(tuple, found.values())) == {(NOBODY,)}


def test_one_direction_is_enough_to_be_cut_off():
    findings = judge({"a": [], "b": ["a"], "c": TimeoutError()})
    assert findings == Findings(silent=frozenset({"c"}), cut=frozenset({("a", "b")}))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ((), "abcd"),
        ((("a", "b"),), "acd"),  # of two that are equal the later goes
        ((("a", "b"), ("a", "c"), ("a", "d")), "bcd"),  # one against all others goes
        ((("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")), "ab"),  # two halves
        ((("a", "elsewhere"),), "abcd"),
    ],
)
def test_as_many_as_can_stay(cut, expected):
    assert largest_reachable("abcd", cut) == list(expected)


def test_a_worker_that_joins_is_looked_at(client, workers, tmp_path):
    admission = Admission(client, dask_nn.Checkpoint(tmp_path))
    facts = admission.examine(workers[0], workers).result(60)
    assert facts.address == workers[0]
    assert not list(tmp_path.iterdir())


def test_a_worker_that_sees_other_storage_may_not_join(client, workers):
    """It might become rank 0, and write to a place where nobody looks."""
    admission = Admission(client, dask_nn.Checkpoint("memory://dask-nn-test/not-shared"))
    with pytest.raises(CheckpointError, match=f"another place on {workers[0]}"):
        admission.examine(workers[0], workers).result(60)


def test_a_worker_that_does_not_reach_the_gang_may_not_join_yet(client, workers):
    with pytest.raises(ConnectionError, match=f"does not reach {NOBODY}"):
        Admission(client).examine(workers[0], [NOBODY]).result(60)
