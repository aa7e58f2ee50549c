"""What every communicator promises; a backend passes it by inheriting the two classes.

A test class of pytest inherits :class:`CommunicatorSuite`, and :class:`PeerSuite` too if the
backend connects more than one rank, and offers a fixture ``gang``, a
:class:`~dask_nn.testing.gangs.Gang`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dask_nn.collectives.base import CELL_BYTES
from dask_nn.testing.communicator_cases import (
    REPEATS,
    SLACK_S,
    TIMEOUT_S,
    WAKE_S,
    close_early_and_often,
    come_after_the_end,
    count_resources,
    cross_barriers,
    digest,
    exchange_leaves,
    gather_payloads,
    open_alone,
    open_resources,
    resources,
    shared_memory_files,
    tree_sum,
    values,
    wait_until_ended,
    wild_leaves,
)

if TYPE_CHECKING:
    from dask_nn.testing.gangs import Gang

__all__ = ["CommunicatorSuite", "PeerSuite"]


class CommunicatorSuite:
    """Promises of a communicator of any number of ranks."""

    gangs: ClassVar[tuple[tuple[int, int], ...]] = (
        (1, 1), (2, 2), (3, 2), (8, 2), (7, 3), (8, 3), (8, 4), (5, 5), (13, 5),
    )  # fmt: skip
    large_gang: ClassVar[tuple[int, int]] = (5, 3)
    exchanges: ClassVar[int] = 200

    def check_totals(
        self,
        gang: Gang,
        shards: int,
        world_size: int,
        leaf_size: int,
        exchanges: int = 3,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        """Compare all ranks' totals with the tree's definition, bit for bit."""
        leaves = [wild_leaves(shards, leaf_size, i, dtype) for i in range(exchanges)]
        expected = [digest(tree_sum(x)) for x in leaves]
        outcomes = gang.run(
            world_size, exchange_leaves, shards, leaf_size, exchanges, dtype, **options
        )
        for rank, got in enumerate(values(outcomes)):
            assert got == expected, f"rank {rank} of {world_size}, {shards} shards of {leaf_size}"

    def test_small_totals_have_the_bits_of_the_tree(self, gang: Gang) -> None:
        """Any number of ranks gives the tree's bits; small leaves are folded by everyone."""
        for shards, world_size in self.gangs:
            for leaf_size in (1, 1003):
                self.check_totals(gang, shards, world_size, leaf_size)

    def test_sliced_totals_have_the_bits_of_the_tree(self, gang: Gang) -> None:
        """Owner-slice gives the same bits, also where slices are ragged or empty."""
        for shards, world_size in self.gangs:
            for leaf_size in (1, 17, 1003):
                self.check_totals(gang, shards, world_size, leaf_size, slice_above_bytes=0)

    def test_large_totals_have_the_bits_of_the_tree(self, gang: Gang) -> None:
        """Leaves above the default threshold give the tree's bits."""
        shards, world_size = self.large_gang
        self.check_totals(gang, shards, world_size, 300_001, exchanges=2)

    def test_float64_totals_have_the_bits_of_the_tree(self, gang: Gang) -> None:
        """Leaves of double precision work too, small and sliced."""
        shards, world_size = self.gangs[-1]
        for threshold in (0, 1 << 20):
            self.check_totals(
                gang, shards, world_size, 101, dtype="float64", slice_above_bytes=threshold
            )

    def test_exchanges_repeat(self, gang: Gang) -> None:
        """Many exchanges in a row stay right, whoever comes late."""
        shards, world_size = self.gangs[-1]
        for threshold in (0, 1 << 20):
            self.check_totals(
                gang, shards, world_size, 129, self.exchanges, slice_above_bytes=threshold
            )

    def test_payloads_of_any_length_reach_every_rank(self, gang: Gang) -> None:
        """Empty payloads, and payloads larger than one cell, arrive whole and in order."""
        world_size = self.gangs[-1][1]
        lengths = (0, 1, CELL_BYTES, CELL_BYTES + 1, 3 * CELL_BYTES - 7, 12)
        rounds = [
            [os.urandom(lengths[(rank + turn) % len(lengths)]) for rank in range(world_size)]
            for turn in range(len(lengths))
        ]
        rounds.append([b""] * world_size)
        for gathered in values(gang.run(world_size, gather_payloads, rounds)):
            assert gathered == rounds

    def test_nobody_passes_a_barrier_before_the_last_comes(self, gang: Gang) -> None:
        """The last to come is there before the first goes on."""
        world_size = self.gangs[-1][1]
        times = values(gang.run(world_size, cross_barriers, 2 * world_size))
        for turn in range(2 * world_size):
            assert max(rank[turn][0] for rank in times) <= min(rank[turn][1] for rank in times)

    def test_close_may_come_twice_and_before_open(self, gang: Gang) -> None:
        """Closing is idempotent and needs no open."""
        world_size = self.gangs[-1][1]
        for opens in (True, False):
            values(gang.run(world_size, close_early_and_often, opens))

    def test_nothing_is_left_behind(self, gang: Gang) -> None:
        """Files, threads and memory maps are given back."""
        world_size = self.large_gang[1]
        files = shared_memory_files()
        values(gang.run(world_size, open_resources, 300_000))
        before = [*values(gang.run(1, count_resources)), resources()]
        for turn in range(REPEATS):
            values(gang.run(world_size, open_resources, 300_000 if turn % 2 else 10))
        after = [*values(gang.run(1, count_resources)), resources()]
        for (files_0, threads_0, _), (files_1, threads_1, maps_1) in zip(
            before, after, strict=True
        ):
            assert files_1 < files_0 + REPEATS, "open files were left behind"
            assert threads_1 < threads_0 + REPEATS, "threads were left behind"
            assert maps_1 == 0, "shared memory is still mapped"
        assert shared_memory_files() <= files


class PeerSuite:
    """Promises of a communicator about peers that do not come."""

    peers: ClassVar[int] = 3

    def check_woken(self, gang: Gang, action: str, how: str, error: str, limit_s: float) -> None:
        """Check that every rank but 0 ends with the error soon after the exchange ended."""
        outcomes = gang.run(self.peers, wait_until_ended, action, how, timeout_s=30.0)
        (_, ended), *waiting = values(outcomes)
        for name, moment in waiting:
            assert name == error
            assert moment - ended < limit_s, f"took {moment - ended:.2f} s"

    def test_abort_wakes_waiting_peers(self, gang: Gang) -> None:
        """A peer that waits learns within a second that a rank has ended the exchange."""
        for action in ("collect", "barrier"):
            self.check_woken(gang, action, "abort", "Aborted", WAKE_S)

    def test_who_comes_after_the_end_gets_no_total(self, gang: Gang, tmp_path: Path) -> None:
        """Otherwise it would complete a step alone, whose state is not the one that is saved."""
        for action in ("collect", "barrier"):
            arguments = (action, str(tmp_path / action))
            outcomes = gang.run(self.peers, come_after_the_end, *arguments, timeout_s=30.0)
            assert values(outcomes) == ["Aborted"] * self.peers

    def test_the_own_flag_ends_a_wait(self, gang: Gang) -> None:
        """A rank whose flag somebody sets stops waiting within a second."""
        self.check_woken(gang, "collect", "own flag", "Aborted", WAKE_S)

    def test_a_missing_peer_raises_within_the_deadline(self, gang: Gang) -> None:
        """A peer that does not take part costs the deadline and no more."""
        outcomes = gang.run(self.peers, wait_until_ended, "collect", "timeout", timeout_s=TIMEOUT_S)
        (_, began), *waiting = values(outcomes)
        # The first to give up may take the others' connections with it.
        assert "CollectiveTimeout" in {name for name, _ in waiting}
        assert {name for name, _ in waiting} <= {"CollectiveTimeout", "Aborted"}
        assert all(moment - began < TIMEOUT_S + SLACK_S for _, moment in waiting)

    def test_a_peer_that_never_opens_raises_within_the_deadline(self, gang: Gang) -> None:
        """Nobody waits for ever for a gang to become whole."""
        outcomes = gang.run(self.peers, open_alone, False, timeout_s=TIMEOUT_S)
        waiting = values(outcomes)[1:]
        # As above; who waits inside a host hears it from the one that waits outside.
        assert "CollectiveTimeout" in {name for name, _ in waiting}
        assert {name for name, _ in waiting} <= {"CollectiveTimeout", "Aborted"}
        assert all(seconds < TIMEOUT_S + SLACK_S for _, seconds in waiting)

    def test_abort_ends_the_opening(self, gang: Gang) -> None:
        """A rank that waits for its gang to become whole can be told to stop."""
        outcomes = gang.run(self.peers, open_alone, True, timeout_s=30.0)
        for name, seconds in values(outcomes)[1:]:
            assert name == "Aborted"
            assert seconds < 0.2 + WAKE_S

    def test_failures_leave_nothing_behind(self, gang: Gang) -> None:
        """Files, threads and memory maps are given back after an abort, too."""
        self.check_woken(gang, "collect", "abort", "Aborted", WAKE_S)
        files = shared_memory_files()
        before = [*values(gang.run(1, count_resources)), resources()]
        for _ in range(REPEATS):
            self.check_woken(gang, "collect", "abort", "Aborted", WAKE_S)
        after = [*values(gang.run(1, count_resources)), resources()]
        for (files_0, threads_0, _), (files_1, threads_1, maps_1) in zip(
            before, after, strict=True
        ):
            assert files_1 < files_0 + REPEATS
            assert threads_1 < threads_0 + REPEATS
            assert maps_1 == 0
        assert shared_memory_files() <= files
