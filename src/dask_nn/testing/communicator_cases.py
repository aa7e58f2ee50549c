"""What the ranks of the communicator suite do; functions of a module reach other processes."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dask_nn.collectives.base import CELL_BYTES
from dask_nn.collectives.tree import roots, shard_range
from dask_nn.errors import Aborted, CollectiveTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from dask_nn.collectives.base import Communicator
    from dask_nn.testing.gangs import Outcome

__all__ = [
    "REPEATS",
    "SLACK_S",
    "TIMEOUT_S",
    "WAKE_S",
    "close_early_and_often",
    "come_after_the_end",
    "count_resources",
    "cross_barriers",
    "digest",
    "exchange_leaves",
    "gather_payloads",
    "open_alone",
    "open_resources",
    "resources",
    "shared_memory_files",
    "tree_sum",
    "values",
    "wait_until_ended",
    "wild_leaves",
]

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


def _take_part(communicator: Communicator, action: str) -> None:
    """Exchange leaves (``"collect"``) or messages, once."""
    if action == "collect":
        communicator.publish()
        communicator.collect()
    else:
        communicator.barrier()


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
        _take_part(communicator, action)
    except (Aborted, CollectiveTimeout) as error:
        return type(error).__name__, time.monotonic()
    finally:
        if how == "own flag":
            timer.join()
    return "no error", time.monotonic()


def come_after_the_end(communicator: Communicator, action: str, ended: str) -> str:
    """Take part after a peer that had has ended the exchange, and return the error's name.

    Rank 0 is late; for it, nothing is missing any more. The file `ended` is made at the end.
    """
    open_communicator(communicator, communicator.world_size, 1000)
    communicator.barrier()
    mark = Path(ended)

    def end_exchange() -> None:
        communicator.abort()
        mark.touch()

    end = threading.Timer(HEAD_START_S, end_exchange)
    if communicator.rank == 1:
        end.start()
    deadline = time.monotonic() + TIMEOUT_S + SLACK_S
    while communicator.rank == 0 and not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if communicator.rank == 0:
        time.sleep(HEAD_START_S)  # letters travel, and so does the end
    try:
        _take_part(communicator, action)
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
