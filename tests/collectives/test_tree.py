"""The reduction tree: same additions in the same order, whoever makes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_nn.collectives.tree import (
    Node,
    all_roots,
    fold_program,
    roots,
    shard_range,
    split,
    stack_program,
)
from dask_nn.errors import ConfigurationError

sizes = st.integers(1, 64)
gangs = sizes.flatmap(lambda shards: st.tuples(st.just(shards), st.integers(1, shards)))


def reference_sum(leaves: np.ndarray) -> np.ndarray:
    """Sum rows by the recursive definition alone."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    return reference_sum(leaves[:left]) + reference_sum(leaves[left:])


def fold_on_stack(leaves: np.ndarray) -> np.ndarray:
    stack: list[np.ndarray] = []
    for leaf, merges in zip(leaves, stack_program(Node(0, len(leaves))), strict=True):
        stack.append(leaf)
        for _ in range(merges):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    assert len(stack) == 1
    return stack[0]


def total_of_gang(leaves: np.ndarray, world_size: int) -> np.ndarray:
    shards = len(leaves)
    nodes = [node for nodes in all_roots(shards, world_size) for node in nodes]
    values = {i: fold_on_stack(leaves[node.lo : node.hi]) for i, node in enumerate(nodes)}
    additions = fold_program(shards, nodes)
    for dst, left, right in additions:
        values[dst] = values[left] + values[right]
    return values[additions[-1].dst if additions else 0]


def wild_leaves(shards: int, seed: int, width: int = 33) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-6, 7, size=(shards, width))
    return (rng.standard_normal((shards, width)) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "left"), [(2, 1), (3, 2), (4, 2), (5, 4), (7, 4), (8, 4), (9, 8), (64, 32)]
)
def test_a_node_has_the_largest_smaller_power_of_two_on_its_left(size: int, left: int) -> None:
    assert split(0, size) == left
    assert split(100, 100 + size) == 100 + left


def test_a_leaf_cannot_be_split() -> None:
    with pytest.raises(ConfigurationError, match="two or more"):
        split(3, 4)


@given(sizes, st.integers(1, 80))
def test_the_ranks_of_any_world_size_share_all_shards(shards: int, world_size: int) -> None:
    ranges = [shard_range(rank, world_size, shards) for rank in range(world_size)]
    assert [shard for lo, hi in ranges for shard in range(lo, hi)] == list(range(shards))
    lengths = [hi - lo for lo, hi in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(sizes, st.integers(1, 80))
def test_the_roots_of_all_ranks_cover_the_shards_disjointly(shards: int, world_size: int) -> None:
    per_rank = all_roots(shards, world_size)
    assert len(per_rank) == world_size
    covered = [s for nodes in per_rank for node in nodes for s in range(node.lo, node.hi)]
    assert covered == list(range(shards))


@given(gangs)
def test_roots_are_few_and_maximal(gang: tuple[int, int]) -> None:
    shards, world_size = gang
    for nodes in all_roots(shards, world_size):
        assert len(nodes) <= 2 * shards.bit_length()
        parents = {(a.lo, b.hi) for a in nodes for b in nodes if a.hi == b.lo}
        assert not any(roots(shards, lo, hi) == (Node(lo, hi),) for lo, hi in parents)


def test_an_empty_range_has_no_roots() -> None:
    assert roots(5, 2, 2) == ()
    assert all_roots(1, 3) == ((), (), (Node(0, 1),))


@given(gangs, st.integers(0, 2**32 - 1))
def test_any_world_size_gives_the_bits_of_the_recursive_sum(
    gang: tuple[int, int], seed: int
) -> None:
    shards, world_size = gang
    leaves = wild_leaves(shards, seed)
    total = total_of_gang(leaves, world_size)
    assert total.tobytes() == reference_sum(leaves).tobytes()


@pytest.mark.parametrize("shards", [8, 13, 64])
def test_every_world_size_gives_equal_bits(shards: int) -> None:
    leaves = wild_leaves(shards, seed=shards)
    bits = {total_of_gang(leaves, world_size).tobytes() for world_size in range(1, shards + 1)}
    assert len(bits) == 1


def test_a_sum_in_rank_order_does_not_give_equal_bits() -> None:
    """The equalities above are no accident of harmless numbers."""
    leaves = wild_leaves(8, seed=1, width=1000)
    sums = set()
    for world_size in (1, 2, 4, 8):
        parts = []
        for rank in range(world_size):
            lo, hi = shard_range(rank, world_size, 8)
            part = leaves[lo]
            for shard in range(lo + 1, hi):
                part = part + leaves[shard]
            parts.append(part)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        sums.add(total.tobytes())
    assert len(sums) > 1
    assert len({total_of_gang(leaves, w).tobytes() for w in (1, 2, 4, 8)}) == 1


@given(st.integers(0, 300))
def test_the_stack_stays_as_low_as_a_binary_counter(leaves: int) -> None:
    height = 0
    for merges in stack_program(Node(7, 7 + leaves)):
        height += 1
        assert height <= leaves.bit_length()
        height -= merges
    assert height == (1 if leaves else 0)


@given(gangs)
def test_the_fold_reads_each_value_once_and_reuses_scratch(gang: tuple[int, int]) -> None:
    shards, world_size = gang
    nodes = [node for nodes in all_roots(shards, world_size) for node in nodes]
    additions = fold_program(shards, nodes)
    assert len(additions) == len(nodes) - 1
    read = [index for _, left, right in additions for index in (left, right)]
    assert sorted(i for i in read if i < len(nodes)) == list(range(len(nodes)))[: len(read)]
    scratch = {dst for dst, _, _ in additions}
    assert scratch == set(range(len(nodes), len(nodes) + len(scratch)))
    assert len(scratch) <= shards.bit_length()
    assert not additions or additions[-1].dst == len(nodes)


def test_nodes_may_come_in_any_order() -> None:
    assert fold_program(3, [Node(2, 3), Node(0, 2)]) == [(2, 1, 0)]


@pytest.mark.parametrize(
    "nodes",
    [
        [Node(0, 2)],
        [Node(0, 2), Node(2, 3), Node(2, 3)],
        [Node(0, 1), Node(1, 3)],
        [Node(0, 2), Node(1, 2), Node(2, 3)],
    ],
)
def test_nodes_that_do_not_tile_the_tree_are_refused(nodes: list[Node]) -> None:
    with pytest.raises(ConfigurationError):
        fold_program(3, nodes)


def test_bad_ranks_and_ranges_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"rank must be in 0\.\.1, got 2"):
        shard_range(2, 2, 8)
    with pytest.raises(ConfigurationError, match="shards"):
        shard_range(0, 1, -1)
    with pytest.raises(ConfigurationError, match="range"):
        roots(4, 2, 5)
