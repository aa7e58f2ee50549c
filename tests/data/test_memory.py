from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_nn.data.memory import Room, fit_window, fits, needed_bytes, windows_at_a_time
from dask_nn.errors import ConfigurationError

MIB = 1 << 20


def test_what_is_held_leaves_less_room():
    room = Room(held_bytes=10, worker_bytes=90)
    assert fits(10, room)
    assert not fits(10, room.without(1))
    assert room.without(99).held_bytes == 0
    assert room.block_bytes == 30


def test_a_worker_without_a_limit_takes_every_window():
    assert fit_window([MIB] * 5, window=10, shards=8, room_bytes=None) == 10
    assert windows_at_a_time([MIB] * 5, window=10, shards=8, room_bytes=None) == 2


def test_one_window_at_a_time_where_two_are_too_many():
    sizes = [MIB] * 20
    two = needed_bytes(sizes, window=10, shards=2, windows=2)
    assert windows_at_a_time(sizes, window=10, shards=2, room_bytes=two) == 2
    assert windows_at_a_time(sizes, window=10, shards=2, room_bytes=two - 1) == 1


@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=30),
    window=st.integers(1, 12),
    shards=st.integers(1, 5),
    room=st.integers(0, 5000),
)
def test_the_window_is_the_largest_that_fits(sizes, window, shards, room):
    sizes = sorted(sizes, reverse=True)
    try:
        found = fit_window(sizes, window=window, shards=shards, room_bytes=room)
    except ConfigurationError:
        assert needed_bytes(sizes, window=1, shards=shards) > room
        return
    assert needed_bytes(sizes, window=found, shards=shards) <= room
    assert found == window or needed_bytes(sizes, window=found + 1, shards=shards) > room


def test_a_block_too_large_for_a_worker_says_what_helps():
    with pytest.raises(ConfigurationError, match="smaller chunks"):
        fit_window([100 * MIB], window=10, shards=2, room_bytes=100 * MIB)
