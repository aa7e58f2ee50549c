"""The ledger that the fault suite relies on sees what it is there to see."""

from __future__ import annotations

import json

import pytest

from dask_nn.testing.faults import Ledger

# Two steps of two shards.
EXPECTED = {(step, shard): [4 * step + 2 * shard, 4 * step + 2 * shard + 1] for step in (0, 1)
            for shard in (0, 1)}  # fmt: skip


def computed(step, shard, rows=None):
    return ["computed", step, shard, EXPECTED[step, shard] if rows is None else rows]


def entries(rank, *steps):
    return [line for step in steps for line in (computed(step, rank), ["applied", step, rank])]


@pytest.fixture
def check(tmp_path):
    """Give a function that checks what some processes wrote."""

    def run(*processes):
        for number, lines in enumerate(processes):
            path = tmp_path / f"ledger-{number}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Ledger(tmp_path).check(EXPECTED)

    return run


def test_a_run_without_faults(check):
    counts = check(entries(0, 0, 1), entries(1, 0, 1))
    assert counts == {"computed": 4, "repeated": 0, "reapplied": 0}


def test_what_died_may_be_done_again_by_another(check):
    other = [computed(1, 0), ["applied", 1, 0]]
    counts = check(entries(0, 0, 1), [*entries(1, 0), computed(1, 1)], other)
    assert counts == {"computed": 5, "repeated": 1, "reapplied": 1}


def test_a_gap(check):
    with pytest.raises(AssertionError, match=r"\(1, 1\) was never computed"):
        check(entries(0, 0, 1), entries(1, 0))


def test_a_step_that_nobody_completed(check):
    with pytest.raises(AssertionError, match="step 1 was never completed"):
        check([*entries(0, 0), computed(1, 0)], [*entries(1, 0), computed(1, 1)])


def test_other_samples(check):
    with pytest.raises(AssertionError, match="other samples"):
        check(entries(0, 0, 1), [*entries(1, 0, 1), computed(1, 1, [0, 1])])


def test_a_step_that_is_applied_twice(check):
    with pytest.raises(AssertionError, match="step 1 was applied twice by one process"):
        check([*entries(0, 0, 1), ["applied", 1, 0]], entries(1, 0, 1))


def test_a_step_that_nobody_asked_for(check):
    with pytest.raises(AssertionError, match="without being asked"):
        check([*entries(0, 0, 1), ["computed", 2, 0, [8]]], entries(1, 0, 1))
