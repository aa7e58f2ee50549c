from __future__ import annotations

import pytest

from dask_nn.controller.failure_policy import FailureCount, Recovery, Situation, decide
from dask_nn.errors import ConfigurationError

CAUSES = ("lost", "hung", "broken", "refused", "resize")


def situation(**given):
    values = {
        "cause": "lost",
        "failures": 1,
        "same_step": 1,
        "ranks": 4,
        "able": 3,
        "waited_s": 0.0,
    }
    return Situation(**values | given)


@pytest.mark.parametrize(
    ("given", "recovery", "expected"),
    [
        ({}, {}, "go_on"),
        ({"able": 0}, {}, "wait"),
        ({"able": 0, "waited_s": 121.0}, {}, "give_up"),
        ({"able": 1}, {"min_workers": 2}, "wait"),
        ({"able": 2}, {"min_workers": 2}, "go_on"),
        ({}, {"replacement_timeout_s": 5}, "wait"),
        ({"waited_s": 5.0}, {"replacement_timeout_s": 5}, "go_on"),
        ({"able": 4}, {"replacement_timeout_s": 5}, "go_on"),
        ({"failures": 4}, {"max_failures": 3}, "give_up"),
        ({"failures": 3}, {"max_failures": 3}, "go_on"),
        ({}, {"max_failures": 0}, "give_up"),
        ({"failures": 10_000}, {"max_failures": None}, "go_on"),
        ({"same_step": 10}, {"max_failures": None}, "give_up"),
        ({"cause": "resize", "failures": 9, "same_step": 99}, {"max_failures": 3}, "go_on"),
        ({"able": 0, "waited_s": 121.0}, {"replacement_timeout_s": 200}, "wait"),
    ],
)
def test_decisions(given, recovery, expected):
    action = decide(situation(**given), Recovery(**recovery))
    assert action.name == expected
    assert bool(action.reason) is (expected == "give_up")


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("able", [0, 1, 2, 4])
@pytest.mark.parametrize("min_workers", [1, 2, 5])
def test_nothing_waits_for_ever(cause, able, min_workers):
    recovery = Recovery(min_workers=min_workers, replacement_timeout_s=7, workers_timeout_s=30)
    late = decide(situation(cause=cause, able=able, waited_s=31.0), recovery)
    assert late.name == ("go_on" if able >= min_workers else "give_up")


def test_failures_in_a_row_at_one_step():
    """Also those of gangs that never come to a step, such as hosts that cannot connect."""
    count = FailureCount()
    for _ in range(3):
        count.note("broken", 40)
    assert (count.failures, count.same_step) == (3, 3)
    count.note("lost", 41)
    assert (count.failures, count.same_step) == (4, 1)
    count.note("lost", 40)
    assert (count.failures, count.same_step) == (5, 1)


def test_a_resize_is_no_failure_and_a_refusal_none_of_the_step():
    count = FailureCount()
    count.note("lost", 40)
    count.note("refused", 40)
    assert (count.failures, count.same_step) == (2, 1)
    count.note("resize", 40)
    assert (count.failures, count.same_step) == (2, 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_failures", -1),
        ("max_failures", "many"),
        ("min_workers", 0),
        ("hang_timeout_s", 1),
        ("hang_timeout_s", None),
        ("replacement_timeout_s", -1),
        ("workers_timeout_s", True),
    ],
)
def test_bad_values_are_named(option, value):
    with pytest.raises(ConfigurationError, match=option):
        Recovery(**{option: value})
