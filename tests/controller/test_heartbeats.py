from __future__ import annotations

import pytest

from dask_nn.controller.heartbeats import Beat, Heartbeats


@pytest.fixture
def pulses() -> Heartbeats:
    found = Heartbeats(hang_timeout_s=10.0, start_timeout_s=100.0)
    found.note_start(2, -1000.0)
    for rank in (0, 1):
        found.note(rank, 0.0)
    return found


def test_a_rank_that_falls_silent(pulses):
    pulses.note(0, 9.0)
    assert pulses.hung([0, 1], 9.9) == {}
    assert pulses.hung([0, 1], 12.0) == {1: 12.0}
    assert pulses.hung([0], 12.0) == {}


def asleep(seconds: float) -> Beat:
    return Beat(idle_s=seconds, unchecked_s=seconds)


def computing(seconds: float) -> Beat:
    return Beat(idle_s=0.0, unchecked_s=seconds)


def waiting(seconds: float) -> Beat:
    return Beat(waiting_s=seconds)


def test_a_rank_that_says_that_it_does_nothing(pulses):
    for now in range(1, 12):
        pulses.note(0, now)
        pulses.note_beat(0, asleep(now))
    assert pulses.hung([0], 11.0) == {0: 11.0}


def test_a_rank_that_uses_its_processor_is_at_work_as_long_as_its_peers_would_wait(pulses):
    """User code need not look at anything for minutes, from its very first shard on."""
    pulses.note(0, 599.0)
    pulses.note_beat(0, computing(599.0))
    assert pulses.hung([0], 599.0) == {}
    pulses.note_beat(0, computing(601.0))
    assert pulses.hung([0], 601.0) == {0: 601.0}


def test_a_rank_that_came_back_from_long_steps_is_given_more(pulses):
    pulses.note_beat(0, asleep(6.0))
    pulses.note_beat(0, asleep(0.0))
    pulses.note(0, 30.0)
    pulses.note_beat(0, asleep(39.0))
    assert pulses.hung([0], 31.0) == {}
    pulses.note_beat(0, asleep(41.0))
    assert pulses.hung([0], 31.0) == {0: 41.0}


@pytest.fixture
def forming() -> Heartbeats:
    return Heartbeats(hang_timeout_s=10.0, start_timeout_s=100.0)


def test_a_rank_that_starts_has_the_time_to_start(forming):
    assert forming.hung([0], 0.0) == {}
    assert forming.hung([0], 99.0) == {}
    assert forming.hung([0], 101.0) == {0: 101.0}


def test_a_rank_that_falls_silent_while_its_gang_forms_is_given_up_like_any_other(forming):
    forming.note(0, 1.0)
    forming.note_beat(0, asleep(0.5))
    assert forming.hung([0], 10.9) == {}
    assert forming.hung([0], 11.5) == {0: 10.5}


def test_a_rank_that_is_heard_may_take_the_time_to_start(forming):
    forming.note(0, 90.0)
    forming.note_beat(0, asleep(90.0))
    assert forming.hung([0], 90.0) == {}
    forming.note_beat(0, asleep(101.0))
    assert forming.hung([0], 91.0) == {0: 101.0}


def test_ranks_that_have_said_nothing_for_too_long_are_suspects(forming):
    assert not forming.unheard([0, 1], 0.0)
    assert not forming.unheard([0, 1], 10.0)
    assert forming.unheard([0, 1], 10.5)
    forming.note(1, 10.5)
    assert forming.unheard([0, 1], 11.0)
    forming.note(0, 11.0)
    assert not forming.unheard([0, 1], 99.0)


def test_ranks_that_all_wait_for_each_other_stand_still(pulses):
    pulses.note_beat(0, waiting(12.0))
    pulses.note_beat(1, waiting(11.0))
    assert pulses.standstill([0, 1]) == 11.0
    assert pulses.standstill([0]) == 0.0
    pulses.note_beat(1, waiting(9.0))
    assert pulses.standstill([0, 1]) == 0.0


@pytest.mark.parametrize("other", [Beat(), computing(12.0), Beat(waiting_s=12.0, unchecked_s=4.0)])
def test_nobody_stands_still_while_one_is_at_work(pulses, other):
    pulses.note_beat(0, waiting(12.0))
    pulses.note_beat(1, other)
    assert pulses.standstill([0, 1]) == 0.0


def test_exchanges_that_took_long_before_may_take_long_again_in_later_gangs_too(pulses):
    for seconds in (4.0, 0.0):
        pulses.note_beat(0, waiting(seconds))
    pulses.clear()
    pulses.note_start(2, 0.0)
    for rank in (0, 1):
        pulses.note_beat(rank, waiting(29.0))
    assert pulses.standstill([0, 1]) == 0.0
    for rank in (0, 1):
        pulses.note_beat(rank, waiting(31.0))
    assert pulses.standstill([0, 1]) == 31.0


def test_who_has_blocks_is_suspected_after_a_while(pulses):
    pulses.note_beat(0, Beat(holders=("tcp://a:1", "tcp://b:1"), holders_s=9.0))
    assert pulses.holders([0, 1]) == set()
    pulses.note_beat(0, Beat(holders=("tcp://a:1", "tcp://b:1"), holders_s=11.0))
    assert pulses.holders([0, 1]) == {"tcp://a:1", "tcp://b:1"}


def test_silence_while_this_process_slept_is_forgiven(pulses):
    pulses.forgive(500.0)
    assert pulses.hung([0, 1], 509.0) == {}
    assert pulses.hung([0, 1], 511.0) == {0: 11.0, 1: 11.0}


def test_an_old_message_does_not_turn_time_back(pulses):
    pulses.note(0, 9.0)
    pulses.note(0, 2.0)
    assert pulses.hung([0], 15.0) == {}


def test_another_gang_begins_anew(pulses):
    pulses.clear()
    assert pulses.hung([0], 1000.0) == {}


@pytest.mark.parametrize("late", [False, True], ids=["before", "arriving late"])
def test_what_a_rank_waited_before_the_start_is_forgiven(pulses, late):
    pulses.clear()
    waited = Beat(idle_s=25.0, unchecked_s=25.0)
    pulses.note(0, 25.0)
    pulses.note_beat(0, waited)
    assert pulses.hung([0], 25.0) == {}
    pulses.note_start(1, 25.5)
    if late:
        pulses.note_beat(0, waited)
    assert pulses.hung([0], 26.0) == {}
    if not late:
        pulses.note(0, 36.0)
        pulses.note_beat(0, Beat(idle_s=10.5, unchecked_s=10.5))
        assert pulses.hung([0], 36.0) == {0: 10.5}
