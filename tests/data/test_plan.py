"""The plan: every sample once per epoch, in an order that depends on the data's shape alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_nn.collectives.tree import shard_range
from dask_nn.data.plan import Piece, Plan, key64, permutation
from dask_nn.errors import ConfigurationError, DataError


@st.composite
def plans(draw: st.DrawFn, **fixed: Any) -> Plan:
    lengths = draw(
        st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(0, 40)), min_size=1, max_size=30)
        .map(tuple)
        .filter(sum)
    )
    shards = draw(st.integers(1, min(9, sum(lengths))))
    options = {
        "batch_size": shards * draw(st.integers(1, 20)),
        "window": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 2**63)),
        "epoch": draw(st.integers(0, 1000)),
        "shuffle": draw(st.sampled_from(["blocks", "within", "none"])),
    }
    return Plan(block_lengths=lengths, shards=shards, **options | fixed)


@given(plan=plans())
def test_what_is_open_grows_from_nothing_to_everything(plan):
    found = [plan.opened(t) for t in range(plan.num_steps + 1)]
    assert found[0] == (0, 0)
    assert found == sorted(found)
    assert found[-1][1] == plan.num_samples
    for t, (_, rows) in enumerate(found):
        assert rows >= sum(plan.step_count(step) for step in range(t))


def cuts(plan: Plan) -> int:
    pieces = Counter(p.block for v in range(plan.shards) for w in plan.windows(v) for p in w.pieces)
    return sum(n - 1 for n in pieces.values())


def slow_permutation(length: int, *key: object) -> list[int]:
    """Sort by splitmix64 in plain integers."""
    state = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    keys = []
    for _ in range(length):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        keys.append(z ^ (z >> 31))
    return sorted(range(length), key=keys.__getitem__)


def slow_batches(plan: Plan) -> list[list[int]]:
    """Lay out the whole epoch row by row, with no arithmetic shared with the plan."""
    lengths, seed, epoch = plan.block_lengths, plan.seed, plan.epoch
    order = slow_permutation(len(lengths), seed, epoch, "blocks")
    tape = [(b, sum(lengths[:b]) + row) for b in order for row in range(lengths[b])]
    n, size = len(tape), plan.batch_size // plan.shards
    sequences = []
    for v in range(plan.shards):
        pieces: dict[int, list[int]] = {}
        for block, row in tape[n * v // plan.shards : n * (v + 1) // plan.shards]:
            pieces.setdefault(block, []).append(row)
        waiting = list(pieces.values())
        sequence: list[int] = []
        take, j = 1 + v * plan.window // plan.shards, 0
        while waiting:
            rows = [row for piece in waiting[:take] for row in piece]
            sequence += [rows[i] for i in slow_permutation(len(rows), seed, epoch, v, j)]
            waiting = waiting[take:]
            take, j = plan.window, j + 1
        sequences.append(sequence)
    steps = -(-max(map(len, sequences)) // size)
    return [s[t * size : (t + 1) * size] for t in range(steps) for s in sequences]


@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 50))
def test_permutation_sorts_splitmix64(length: int, seed: int, epoch: int) -> None:
    order = permutation(length, seed, epoch, "blocks")
    assert order.dtype == np.int64
    assert order.tolist() == slow_permutation(length, seed, epoch, "blocks")


def test_the_order_of_samples_never_changes_between_versions() -> None:
    """A checkpoint of an older version resumes in the order in which it was trained."""
    assert key64(0, 0, "blocks") == 7025231392978745220
    assert permutation(10, 0, 0, "blocks").tolist() == [4, 5, 1, 8, 3, 9, 7, 0, 2, 6]
    assert permutation(10, 7, 3, 1, 2).tolist() == [2, 7, 1, 5, 0, 8, 6, 4, 9, 3]
    plan = Plan(block_lengths=(5, 0, 7, 1, 4), shards=2, batch_size=6, window=2, seed=1, epoch=2)
    assert [plan.sample_ids(t, v).tolist() for t in range(3) for v in range(2)] == [
        [0, 3, 1],
        [16, 12, 9],
        [4, 2, 13],
        [7, 10, 6],
        [15, 14],
        [8, 11, 5],
    ]


@given(plans(shuffle="blocks"))
def test_batches_are_those_of_the_definition(plan: Plan) -> None:
    steps, shards = range(plan.num_steps), range(plan.shards)
    assert [plan.sample_ids(t, v).tolist() for t in steps for v in shards] == slow_batches(plan)


def test_seeds_and_epochs_are_not_added_up() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


@given(plans())
def test_every_sample_comes_exactly_once_per_epoch(plan: Plan) -> None:
    ids = [plan.sample_ids(t, v) for t in range(plan.num_steps) for v in range(plan.shards)]
    assert sorted(np.concatenate(ids)) == list(range(plan.num_samples))


@given(plans())
def test_counts_add_up(plan: Plan) -> None:
    counts = np.array(
        [[plan.count(t, v) for v in range(plan.shards)] for t in range(plan.num_steps)]
    )
    assert counts.sum(axis=1).tolist() == [plan.step_count(t) for t in range(plan.num_steps)]
    assert counts.sum(axis=0).tolist() == [plan.shard_length(v) for v in range(plan.shards)]
    assert counts.sum() == plan.num_samples
    assert (counts.sum(axis=1) > 0).all()
    assert (counts[:-1] >= plan.shard_batch_size - 1).all()
    assert counts.max() <= plan.shard_batch_size


@given(plans())
def test_segments_are_the_batch(plan: Plan) -> None:
    for v in range(plan.shards):
        for t in range(plan.num_steps):
            segments = plan.segments(t, v)
            assert sum(hi - lo for _, lo, hi in segments) == plan.count(t, v)
            assert len(plan.sample_ids(t, v)) == plan.count(t, v)
            assert all(0 <= lo < hi <= plan.windows(v)[j].length for j, lo, hi in segments)


@given(plans())
def test_shards_differ_by_at_most_one_row(plan: Plan) -> None:
    lengths = [plan.shard_length(v) for v in range(plan.shards)]
    assert max(lengths) - min(lengths) <= 1
    assert sum(lengths) == plan.num_samples


@given(plans())
def test_at_most_one_block_is_cut_for_each_border_between_shards(plan: Plan) -> None:
    assert cuts(plan) <= plan.shards - 1


@given(plans())
def test_windows_tile_the_shard_and_begin_staggered(plan: Plan) -> None:
    for v in range(plan.shards):
        windows = plan.windows(v)
        assert windows[0].start == 0
        assert windows[-1].stop == plan.shard_length(v)
        assert all(a.stop == b.start for a, b in pairwise(windows))
        assert all(w.length == sum(p.stop - p.start for p in w.pieces) > 0 for w in windows)
        assert all(p.stop > p.start for w in windows for p in w.pieces)
        sizes = [len(w.pieces) for w in windows]
        first = 1 + v * plan.window // plan.shards
        assert sizes[0] == min(first, sum(sizes))
        assert all(size == plan.window for size in sizes[1:-1])
        assert sizes[-1] <= (plan.window if len(sizes) > 1 else first)


@given(plans())
def test_resuming_at_a_step_opens_no_window_that_ended_before_it(plan: Plan) -> None:
    resumed = pickle.loads(pickle.dumps(plan))
    for v in range(plan.shards):
        for t in range(plan.num_steps):
            position = t * plan.shard_batch_size
            assert all(plan.windows(v)[j].stop > position for j, _, _ in resumed.segments(t, v))
            assert (resumed.sample_ids(t, v) == plan.sample_ids(t, v)).all()


@given(plans(), st.integers(1, 12))
def test_any_number_of_ranks_reads_the_same_batches(plan: Plan, world_size: int) -> None:
    """A plan takes no number of workers: ranks only divide the shards among themselves."""
    ranges = [shard_range(rank, world_size, plan.shards) for rank in range(world_size)]
    for t in {0, plan.num_steps - 1}:
        by_rank = [plan.sample_ids(t, v) for lo, hi in ranges for v in range(lo, hi)]
        whole = [plan.sample_ids(t, v) for v in range(plan.shards)]
        assert np.concatenate(by_rank).tolist() == np.concatenate(whole).tolist()


def test_epochs_differ_in_blocks_and_rows() -> None:
    plan = Plan(block_lengths=(50,) * 40, shards=4, batch_size=64, seed=3)
    later = replace(plan, epoch=1)
    assert plan.windows(0)[1].pieces != later.windows(0)[1].pieces
    assert plan.window_order(0, 0).tolist() != later.window_order(0, 0).tolist()


def test_within_keeps_blocks_with_their_shard_in_all_epochs() -> None:
    plan = Plan(block_lengths=(50,) * 40, shards=4, batch_size=64, seed=3, shuffle="within")
    later = replace(plan, epoch=1)
    assert [plan.windows(v) for v in range(4)] == [later.windows(v) for v in range(4)]
    assert plan.window_order(0, 1).tolist() != later.window_order(0, 1).tolist()
    assert plan.windows(0)[0].pieces != (Piece(0, 0, 50),)


def test_none_keeps_the_order_of_the_data() -> None:
    plan = Plan(block_lengths=(3, 0, 4, 1), shards=2, batch_size=4, shuffle="none", seed=9)
    assert [plan.sample_ids(t, v).tolist() for t in range(2) for v in range(2)] == [
        [0, 1],
        [4, 5],
        [2, 3],
        [6, 7],
    ]


def test_shards_differ_in_the_order_of_their_rows() -> None:
    plan = Plan(block_lengths=(64,) * 2, shards=2, batch_size=4)
    assert plan.window_order(0, 0).tolist() != plan.window_order(1, 0).tolist()


def test_numpy_integers_give_the_same_plan() -> None:
    plain = Plan(block_lengths=(6, 6), shards=2, batch_size=4, seed=5, epoch=1)
    other = Plan(
        block_lengths=tuple(np.array([6, 6])),
        shards=np.int64(2),
        batch_size=np.int32(4),
        seed=np.uint8(5),
        epoch=np.int64(1),
    )
    assert other == plain
    assert other.sample_ids(0, 0).tolist() == plain.sample_ids(0, 0).tolist()
    assert other.window_order(np.int64(1), np.int64(0)).tolist() == (
        plain.window_order(1, 0).tolist()
    )


def test_a_used_plan_pickles_without_what_it_has_derived() -> None:
    plan = Plan(block_lengths=(9,) * 1000, shards=2, batch_size=8)
    fresh = len(pickle.dumps(plan))
    plan.sample_ids(0, 0)
    assert len(pickle.dumps(plan)) == fresh
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_windows_of_one_shard_are_cut_without_those_of_the_others() -> None:
    plan = Plan(block_lengths=(9,) * 1000, shards=4, batch_size=8)
    plan.segments(0, 2)
    assert set(plan._windows) == {2}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 0}, ConfigurationError, "batch_size must be positive, got 0"),
        ({"batch_size": -1}, ConfigurationError, "batch_size must be positive, got -1"),
        ({"batch_size": 2.5}, ConfigurationError, "batch_size must be an integer, got 2.5"),
        ({"batch_size": 7}, ConfigurationError, "batch_size=6 or 8 would do"),
        ({"batch_size": 1}, ConfigurationError, "batch_size=2 would do"),
        ({"shards": 0}, ConfigurationError, "shards must be positive, got 0"),
        ({"shards": 10, "batch_size": 10}, ConfigurationError, "shards=10 and 9 samples"),
        ({"window": 0}, ConfigurationError, "window must be positive, got 0"),
        ({"shuffle": "rows"}, ConfigurationError, "got 'rows'"),
        ({"block_lengths": ()}, DataError, "at least one sample"),
        ({"block_lengths": (0, 0)}, DataError, "2 empty blocks"),
        ({"block_lengths": (3, -1)}, DataError, "must not be negative, got -1"),
        ({"block_lengths": (3, float("nan"))}, DataError, "must be integers"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    valid: dict[str, Any] = {"block_lengths": (4, 5), "shards": 2, "batch_size": 4}
    with pytest.raises(error, match=text):
        Plan(**valid | options)


def test_steps_and_shards_that_do_not_exist_are_refused() -> None:
    plan = Plan(block_lengths=(4, 5), shards=2, batch_size=4)
    assert plan.num_steps == 3
    for t, v in [(3, 0), (-1, 0), (0, 2), (0, -1)]:
        with pytest.raises(IndexError, match="must be in"):
            plan.count(t, v)
    for t in (3, -1):
        with pytest.raises(IndexError, match="step"):
            plan.step_count(t)


def test_the_plan_imports_no_torch() -> None:
    code = "import sys, dask_nn.data.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
