"""What every communicator promises; a backend passes it by inheriting the two classes.

A test class of pytest inherits :class:`CommunicatorSuite`, and :class:`PeerSuite` too if the
backend connects more than one rank, and offers a fixture ``gang``, a
:class:`~dask_nn.testing.gangs.Gang`. The functions that ranks run belong to this module, so that
they reach ranks in other processes.
"""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from dask_nn.collectives.base import CELL_BYTES
from dask_nn.collectives.tree import roots, shard_range
from dask_nn.errors import Aborted, CollectiveTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from dask_nn.collectives.base import Communicator
    from dask_nn.testing.gangs import Gang, Outcome

__all__ = ["CommunicatorSuite", "PeerSuite", "tree_sum", "wild_leaves"]

CPU = torch.device("cpu")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - it is looked at, nothing is made in it
# How soon a rank must notice that its exchange was ended.
WAKE_S = 1.0
TIMEOUT_S = 0.5
# So that the others wait when a rank ends the exchange.
HEAD_START_S = 0.15
# A machine under load is slow to run a thread whose time has come.
SLACK_S = 2.0


def wild_leaves(shards: int, leaf_size: int, seed: int, dtype: str = "float32") -> NDArray[Any]:
    """Return leaves of very different magnitudes, shape (shards, leaf_size): order shows."""
    rng = np.random.Generator(np.random.PCG64(seed))
    scale = 10.0 ** rng.integers(-6, 7, size=(shards, leaf_size))
    return (rng.standard_normal((shards, leaf_size)) * scale).astype(dtype)


def tree_sum(leaves: NDArray[Any]) -> NDArray[Any]:
    """Add leaves by the definition of the tree alone."""
    if len(leaves) == 1:
        return np.array(leaves[0])
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    total: NDArray[Any] = tree_sum(leaves[:left]) + tree_sum(leaves[left:])
    return total


def digest(total: NDArray[Any]) -> str:
    """Name the bits of an array."""
    return hashlib.sha256(total.tobytes()).hexdigest()


def open_communicator(
    communicator: Communicator, shards: int, leaf_size: int, dtype: str = "float32"
) -> None:
    """Open it for leaves in host memory."""
    communicator.open(shards=shards, leaf_size=leaf_size, dtype=getattr(torch, dtype), device=CPU)


def fill_slots(communicator: Communicator, leaves: NDArray[Any]) -> None:
    """Fill the slots with the sums of this rank's nodes."""
    bounds = shard_range(communicator.rank, communicator.world_size, len(leaves))
    nodes = roots(len(leaves), *bounds)
    for slot, node in zip(communicator.slots(), nodes, strict=True):
        slot.numpy()[:] = tree_sum(leaves[node.lo : node.hi])


def exchange_leaves(
    communicator: Communicator, shards: int, leaf_size: int, exchanges: int, dtype: str
) -> list[str]:
    """Add up leaves several times; ranks come late in turn."""
    open_communicator(communicator, shards, leaf_size, dtype)
    digests = []
    totals: set[int] = set()
    slots: set[int] = set()
    for exchange in range(exchanges):
        fill_slots(communicator, wild_leaves(shards, leaf_size, exchange, dtype))
        slots.update(slot.data_ptr() for slot in communicator.slots())
        if (exchange + communicator.rank) % 7 == 6:
            time.sleep(0.001)
        communicator.publish()
        total = communicator.collect()
        assert total.shape == (leaf_size,)
        totals.add(total.data_ptr())
        digests.append(digest(total.numpy()))
    assert len(totals) == 1, "collect must return the same tensor every time"
    assert len(slots) <= 2 * len(communicator.slots()), "slots must return few tensors in turn"
    return digests


def gather_payloads(communicator: Communicator, rounds: list[list[bytes]]) -> list[list[bytes]]:
    """Gather bytes, with an exchange of leaves after each."""
    open_communicator(communicator, communicator.world_size, 5)
    gathered = []
    for payloads in rounds:
        gathered.append(communicator.all_gather_bytes(payloads[communicator.rank]))
        fill_slots(communicator, wild_leaves(communicator.world_size, 5, 0))
        communicator.publish()
        communicator.collect()
    return gathered


def cross_barriers(communicator: Communicator, count: int) -> list[tuple[float, float]]:
    """Note the times before and behind each barrier; each time another rank comes last."""
    open_communicator(communicator, communicator.world_size, 1)
    times = []
    for turn in range(count):
        if turn % communicator.world_size == communicator.rank:
            time.sleep(0.02)
        before = time.monotonic()
        communicator.barrier()
        times.append((before, time.monotonic()))
    return times


def close_early_and_often(communicator: Communicator, opens: bool) -> None:
    """Close before the end of the gang, more than once, and perhaps before it began."""
    if opens:
        open_communicator(communicator, communicator.world_size, 3)
        communicator.barrier()
    communicator.close()
    communicator.close()


# A leak grows with every repetition; what else lives in the process, such as the connections of a
# test cluster, comes and goes by a few.
REPEATS = 5


def open_resources(communicator: Communicator, leaf_size: int) -> None:
    """Use everything once."""
    exchange_leaves(communicator, communicator.world_size + 1, leaf_size, 2, "float32")
    communicator.all_gather_bytes(bytes(CELL_BYTES + 1))


def count_resources(communicator: Communicator) -> tuple[int, int, int]:
    """Count this process's open files, threads, and maps of this package, with none in use."""
    del communicator
    return resources()


def resources() -> tuple[int, int, int]:
    """Count this process's open files, threads, and maps of this package."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    files, threads = (list(Path("/proc/self", kind).iterdir()) for kind in ("fd", "task"))
    return len(files), len(threads), maps.count("dask-nn-")


def wait_until_ended(
    communicator: Communicator, action: str, how: str, missing: int = 0
) -> tuple[str, float]:
    """Wait for a peer that never comes; rank `missing` is that peer, and may end the exchange.

    With ``how="watch"`` rank 1 is ended by what it watches.

    Returns
    -------
    str, float
        The error's name and when it came (for that peer: when it ended the exchange), by
        ``time.monotonic``.
    """
    open_communicator(communicator, communicator.world_size, 1000)
    communicator.barrier()
    if communicator.rank == missing:
        time.sleep(HEAD_START_S)
        moment = time.monotonic()
        if how == "abort":
            communicator.abort()
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "timeout":
            time.sleep(TIMEOUT_S + WAKE_S)
        else:
            time.sleep(WAKE_S)
        return "", moment
    timer = threading.Timer(HEAD_START_S, communicator.abort_event.set)
    if how == "own flag":
        timer.start()
    elif how == "watch" and communicator.rank == 1:
        communicator.watch = _ending(communicator)
    try:
        if action == "collect":
            communicator.publish()
            communicator.collect()
        else:
            communicator.barrier()
    except (Aborted, CollectiveTimeout) as error:
        return type(error).__name__, time.monotonic()
    finally:
        if how == "own flag":
            timer.join()
    return "no error", time.monotonic()


def come_after_the_end(communicator: Communicator) -> str:
    """Publish after a peer that had published has ended the exchange, and return the error's name.

    Rank 0 is late; for it, nothing is missing any more.
    """
    open_communicator(communicator, communicator.world_size, 1000)
    communicator.barrier()
    if communicator.rank == 0:
        time.sleep(2 * HEAD_START_S)
    end = threading.Timer(HEAD_START_S, communicator.abort)
    if communicator.rank == 1:
        end.start()
    try:
        communicator.publish()
        communicator.collect()
    except Aborted as error:
        return type(error).__name__
    finally:
        if communicator.rank == 1:
            end.join()
    return "no error"


def _ending(communicator: Communicator) -> Callable[[], None]:
    end = time.monotonic() + HEAD_START_S

    def watch() -> None:
        if time.monotonic() > end:
            communicator.signal_abort()  # the other peers need not wait for the missing one
            raise Aborted("what is watched has ended")

    return watch


def open_alone(communicator: Communicator, aborts: bool) -> tuple[str, float]:
    """Try to open while rank 0 never does, and return the error's name and how long it took."""
    if communicator.rank == 0:
        return "", 0.0
    timer = threading.Timer(0.2, communicator.abort)
    if aborts:
        timer.start()
    start = time.monotonic()
    try:
        open_communicator(communicator, communicator.world_size, 10)
    except (Aborted, CollectiveTimeout) as error:
        return type(error).__name__, time.monotonic() - start
    finally:
        if aborts:
            timer.join()
    return "no error", time.monotonic() - start


def values(outcomes: Iterable[Outcome]) -> list[Any]:
    """Return what the ranks returned, or raise the first error."""
    found = []
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        found.append(outcome.value)
    return found


def shared_memory_files() -> set[str]:
    """Return the names of this package's files in the host's shared memory."""
    return {path.name for path in SHARED_MEMORY.glob("dask-nn*")}


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

    def test_who_comes_after_the_end_gets_no_total(self, gang: Gang) -> None:
        """Otherwise it would complete a step alone, whose state is not the one that is saved."""
        outcomes = gang.run(self.peers, come_after_the_end, timeout_s=30.0)
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
