from __future__ import annotations

import pytest

from dask_nn.controller.heartbeats import Heartbeats


@pytest.fixture
def pulses() -> Heartbeats:
    found = Heartbeats(hang_timeout_s=10.0, start_timeout_s=100.0)
    found.note_start(2, 0.0)
    return found


def test_a_rank_that_falls_silent(pulses):
    pulses.note(0, 9.0)
    assert pulses.hung([0, 1], 9.9) == {}
    assert pulses.hung([0, 1], 12.0) == {1: 12.0}
    assert pulses.hung([0], 12.0) == {}


def test_a_rank_that_says_that_it_does_nothing(pulses):
    for now in range(1, 12):
        pulses.note(0, now)
        pulses.note_beat(0, float(now))
    assert pulses.hung([0], 11.0) == {0: 11.0}


def test_a_rank_that_came_back_from_long_steps_is_given_more(pulses):
    pulses.note_beat(0, 6.0)
    pulses.note_beat(0, 0.0)
    pulses.note(0, 30.0)
    pulses.note_beat(0, 39.0)
    assert pulses.hung([0], 31.0) == {}
    pulses.note_beat(0, 41.0)
    assert pulses.hung([0], 31.0) == {0: 41.0}


def test_a_rank_that_starts_has_the_time_to_start():
    found = Heartbeats(hang_timeout_s=10.0, start_timeout_s=100.0)
    assert found.hung([0], 0.0) == {}
    assert found.hung([0], 99.0) == {}
    assert found.hung([0], 101.0) == {0: 101.0}


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
