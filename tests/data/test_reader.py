from __future__ import annotations

import numpy as np
import pytest

from dask_nn.data.reader import BlockReader, ClusterReader, MemoryReader
from dask_nn.errors import DataError


def array(value: int, rows: int = 4) -> np.ndarray:
    return np.full(rows, value, np.int64)


class Peers:
    """Other workers' memory, which notes what is asked of it."""

    def __init__(self, **values: np.ndarray) -> None:
        self.values = values
        self.asked: list[list[str]] = []

    def fetch(self, keys: list[str]) -> list[np.ndarray]:
        self.asked.append(list(keys))
        return [self.values[key] for key in keys]


def reader(keys, own, peers, cache_bytes: int = 1 << 20) -> ClusterReader:
    return ClusterReader(
        keys,
        lengths=[len(next(iter((own | peers.values).values()))) for _ in keys],
        names=[f"field {place}" for place, _ in enumerate(keys[0])],
        own=own,
        fetch=peers.fetch,
        cache_bytes=cache_bytes,
    )


def test_memory_gives_the_arrays_themselves():
    arrays = [(array(0), array(1))]
    assert MemoryReader(arrays).read(0) is arrays[0]


def test_the_workers_own_blocks_are_used_where_they_lie():
    own = {"a": array(1)}
    peers = Peers()
    assert reader([("a",)], own, peers).read(0)[0] is own["a"]
    assert peers.asked == []


def test_what_lies_elsewhere_is_fetched_once_and_together():
    peers = Peers(a=array(1), c=array(3))
    found = reader([("a", "b", "c")], {"b": array(2)}, peers)
    for _ in range(3):
        assert [block[0] for block in found.read(0)] == [1, 2, 3]
    assert peers.asked == [["a", "c"]]


def test_the_cache_keeps_what_was_used_last_within_its_budget():
    peers = Peers(a=array(1), b=array(2), c=array(3))
    found = reader([("a",), ("b",), ("c",)], {}, peers, cache_bytes=2 * array(0).nbytes)
    for block in (0, 1, 0, 2, 0, 1):
        found.read(block)
    assert peers.asked == [["a"], ["b"], ["c"], ["b"]]
    assert found._cached_bytes <= 2 * array(0).nbytes
    assert found._cached_bytes == sum(value.nbytes for value in found._cached.values())


def test_blocks_above_the_budget_are_not_kept():
    peers = Peers(a=array(1, rows=1000))
    found = reader([("a",)], {}, peers, cache_bytes=100)
    found.read(0)
    found.read(0)
    assert peers.asked == [["a"], ["a"]]
    assert found._cached_bytes == 0


def test_a_block_that_comes_to_the_worker_later_is_used_there():
    own: dict[str, np.ndarray] = {}
    peers = Peers(a=array(1))
    found = reader([("a",)], own, peers)
    found.read(0)
    own["a"] = array(1)
    assert found.read(0)[0] is own["a"]


def test_one_key_may_stand_for_two_inputs():
    peers = Peers(a=array(1))
    first, second = reader([("a", "a")], {}, peers).read(0)
    assert first is second
    assert peers.asked == [["a"]]


@pytest.mark.parametrize("kind", ["own", "fetched", "memory"])
@pytest.mark.parametrize("rows", [3, 5])
def test_a_block_of_another_length_is_refused_by_number_and_name(kind, rows):
    blocks = {"a": array(0), "b": array(1), "c": array(2, rows=rows)}
    keys, lengths = [("a", "b"), ("a", "c")], (4, 4)
    names = ("X", "y")
    found: BlockReader
    if kind == "memory":
        arrays = [tuple(blocks[key] for key in row) for row in keys]
        found = MemoryReader(arrays, lengths=lengths, names=names)
    else:
        own = blocks if kind == "own" else {}
        peers = Peers(**blocks)
        found = ClusterReader(
            keys,
            lengths=lengths,
            names=names,
            own=own,
            fetch=peers.fetch,
            cache_bytes=0,
            fetch_whole=True,
        )
    assert len(found.read(0)) == 2
    with pytest.raises(DataError, match=rf"block 1 of y gave an array of {rows} rows, expected 4:"):
        found.read(1)
