from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_nn.data.memory import (
    Needs,
    Room,
    choose_loaders,
    fit_window,
    fits,
    windows_at_a_time,
)
from dask_nn.errors import ConfigurationError

MIB = 1 << 20


def needs(sizes: list[int], **others: int) -> Needs:
    return Needs(rows_bytes=tuple(sizes), **{"block_bytes": max(sizes, default=0), **others})


def test_what_is_held_leaves_less_room():
    room = Room(held_bytes=10, worker_bytes=90)
    assert fits(10, room)
    assert not fits(10, room.without(1))
    assert room.without(99).held_bytes == 0
    assert room.block_bytes == 30
    shared = Room(held_bytes=100, worker_bytes=90, num_workers=4).without(10)
    assert (shared.held_bytes, shared.worker_bytes) == (90, 87)


def test_a_worker_without_a_limit_takes_every_window():
    assert fit_window(needs([MIB] * 5), window=10, shards=8, room_bytes=None) == 10
    assert windows_at_a_time(needs([MIB] * 5), window=10, shards=8, room_bytes=None) == 2


def test_one_window_at_a_time_where_two_are_too_many():
    sizes = needs([MIB] * 20)
    two = sizes.total_bytes(window=10, shards=2, windows=2)
    assert windows_at_a_time(sizes, window=10, shards=2, room_bytes=two) == 2
    assert windows_at_a_time(sizes, window=10, shards=2, room_bytes=two - 1) == 1


def test_every_block_in_memory_is_counted():
    assert needs([4, 3, 2]).total_bytes(window=2, shards=3) == 3 * 7 + 2 * 4
    # float64 blocks for a model of float32: what is read is larger than what is batched.
    assert needs([4, 3, 2], block_bytes=8).total_bytes(window=2, shards=3) == 3 * 7 + 2 * 8
    several = needs([4, 3, 2], loaders=4, other_bytes=100)
    assert several.total_bytes(window=9, shards=1, windows=2) == 2 * 9 + 9 * 4 + 100
    assert needs([], other_bytes=5).total_bytes(window=1, shards=1) == 5


def test_large_blocks_are_not_read_at_the_same_time():
    assert choose_loaders(1, MIB, 1024 * MIB) == 1
    assert choose_loaders(32, MIB, 1024 * MIB) == 4
    assert choose_loaders(32, 20 * MIB, 1024 * MIB) == 2
    assert choose_loaders(32, 200 * MIB, 1024 * MIB) == 1
    assert choose_loaders(32, 200 * MIB, 0) == 4


@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=30),
    window=st.integers(1, 12),
    shards=st.integers(1, 5),
    room=st.integers(0, 5000),
)
def test_the_window_is_the_largest_that_fits(sizes, window, shards, room):
    sizes = sorted(sizes, reverse=True)
    try:
        found = fit_window(needs(sizes), window=window, shards=shards, room_bytes=room)
    except ConfigurationError:
        assert needs(sizes).total_bytes(window=1, shards=shards) > room
        return
    assert needs(sizes).total_bytes(window=found, shards=shards) <= room
    larger = needs(sizes).total_bytes(window=found + 1, shards=shards)
    assert found == window or larger > room


def test_a_block_too_large_for_a_worker_says_what_helps():
    with pytest.raises(ConfigurationError, match="smaller chunks"):
        fit_window(needs([100 * MIB]), window=10, shards=2, room_bytes=100 * MIB)
