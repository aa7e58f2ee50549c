"""Which state a run goes on from, and which of the earlier ones are kept."""

from __future__ import annotations

import pytest

from dask_nn.controller.kept_states import KeptStates
from dask_nn.training.outcome import RankOutcome


def outcome(address: str, epoch: int, steps: int, *, has_state: bool = True) -> RankOutcome:
    return RankOutcome(
        rank=0, status="aborted", address=address, epoch=epoch, steps=steps, has_state=has_state
    )


@pytest.fixture
def kept() -> KeptStates:
    """Two ranks stand at step 60, one has lost its state, one its worker."""
    states = KeptStates()
    ends = [
        outcome("a", 2, 60),
        outcome("b", 2, 60),
        outcome("slow", 2, 59),
        outcome("stateless", 2, 61, has_state=False),
        outcome("gone", 2, 61),
    ]
    states.note(ends, generation=3, removed={"gone"})
    return states


def test_the_newest_state_that_is_left_is_the_truth(kept):
    assert kept.newest.position == (2, 60)
    assert kept.newest.generation == 3
    assert {source.address for source in kept.sources()} == {"a", "b"}


def test_of_equal_states_the_last_that_was_left_is_taken(kept):
    """Whoever was asked for the older one in vain would be asked again and again."""
    kept.note([outcome("c", 2, 60)], generation=4, removed=set())
    assert kept.newest.address == "c"
    assert {source.address for source in kept.sources()} == {"a", "b", "c"}
    assert {source.address for source in kept.states()} == {"a", "b", "c", "slow"}


def test_a_state_that_was_passed_over_is_no_source(kept):
    kept.pass_over()
    assert kept.newest is None
    assert not kept.sources()


def test_a_state_goes_with_its_worker(kept):
    kept.note([], generation=4, removed={"a", "b"})
    assert kept.newest.address == "slow"


@pytest.mark.parametrize(
    ("members", "saved", "left"),
    [
        ({"a"}, (0, 0), "b"),
        ({"a", "b"}, (2, 58), "slow"),
        ({"a", "b"}, (2, 59), None),
        ({"a"}, (2, 60), None),
    ],
)
def test_what_is_kept_for_the_loss_of_a_whole_gang(kept, members, saved, left):
    """One state outside of it, the newest, unless a checkpoint is as new."""
    kept.drop_older(members=members, saved=saved)
    assert list(kept.addresses) == ([left] if left else [])
