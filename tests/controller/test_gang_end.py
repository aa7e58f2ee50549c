"""What became of a gang, from what is known of its ranks."""

from __future__ import annotations

import pytest

from dask_nn.controller.gang_end import GangEnd, Loss
from dask_nn.errors import IncompatibleWorkers
from dask_nn.training.outcome import RankOutcome


def loss(address: str, cause: str = "lost", reason: str = "left the cluster") -> Loss:
    return Loss(address=address, rank=0, cause=cause, reason=reason)


def outcome(status: str, rank: int = 0, **more: object) -> RankOutcome:
    return RankOutcome(rank=rank, status=status, **more)


def test_a_worker_that_was_lost_stays_lost_when_others_hang_later():
    end = GangEnd()
    end.lose([loss("a")])
    broken_at = end.broken_at
    end.lose([loss("a", "hung", "gave no sign"), loss("b", "hung", "gave no sign")])
    assert [(found.address, found.cause) for found in end.losses] == [("a", "lost"), ("b", "hung")]
    assert (end.cause, end.reason, end.broken_at) == ("lost", "left the cluster", broken_at)


def test_a_loss_that_is_heard_of_later_is_why_the_gang_broke():
    end = GangEnd()
    end.break_off("broken")
    end.lose([loss("a")])
    assert end.cause == "lost"


@pytest.mark.parametrize(("interrupted", "cause"), [(False, "refused"), (True, None)])
def test_a_gang_that_is_refused_after_ctrl_c_ends_the_run(interrupted, cause):
    end = GangEnd(interrupted=interrupted)
    end.outcomes = [outcome("failed", exception=IncompatibleWorkers("other bits"))]
    end.judge(1)
    assert end.cause == cause


def test_a_gang_that_breaks_while_it_is_asked_to_stop_is_broken():
    end = GangEnd()
    end.break_off("resize")
    assert not end.is_broken
    end.lose([loss("a", "hung")])
    assert end.cause == "hung"


@pytest.mark.parametrize(
    ("statuses", "cause", "interrupted", "expected"),
    [
        (("finished", "finished"), None, False, None),
        (("finished", "finished"), "resize", False, None),
        (("stopped", "stopped"), "resize", False, "resize"),
        (("stopped", "stopped"), None, False, "resize"),
        (("stopped", "stopped"), None, True, None),
        (("aborted", "aborted"), "lost", True, None),
        (("aborted", "finished"), None, False, "broken"),
        (("aborted", "failed"), "lost", False, None),
        (("non_finite", "non_finite"), None, False, None),
        ((), "lost", False, "lost"),
        ((), None, False, "broken"),
    ],
)
def test_judgements(statuses, cause, interrupted, expected):
    outcomes = [outcome(status, rank) for rank, status in enumerate(statuses)]
    end = GangEnd(outcomes=outcomes, cause=cause, interrupted=interrupted)
    end.judge(0)
    assert end.cause == expected


def test_without_rank_0_nobody_says_that_the_last_checkpoint_is_whole():
    """Its worker was retired when the others had ended."""
    end = GangEnd(outcomes=[outcome("finished", rank) for rank in (1, 2)], cause="resize")
    end.judge(0)
    assert end.cause == "resize"


def test_a_later_gang_refuses_who_computes_other_bits():
    error = IncompatibleWorkers("other bits", ("b",))
    end = GangEnd(outcomes=[outcome("failed", exception=error)])
    end.judge(1)
    assert end.cause == "refused"
    assert [found.address for found in end.losses] == ["b"]
    first = GangEnd(outcomes=[outcome("failed", exception=error)])
    first.judge(0)
    assert first.cause is None
