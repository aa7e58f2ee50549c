"""What ranks leave in their worker's process, and how the next gang gets hold of it.

A rank that ends, for whatever reason, leaves its state where it is. The next gang of the run starts
from the newest of these: ranks on the same worker take it as it is, others copy it from that peer.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed.utils import sync

from dask_nn import faults
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    from distributed import Worker

    from dask_nn.training.snapshot import Keepsake, Snapshot

__all__ = ["Position", "StateSource", "fetch_state", "forget", "keep", "kept", "serve_states"]

OPERATION = "dask_nn_state"
# States travel in pieces of this size; each must come within the deadline.
PIECE_BYTES = 32 << 20
PIECE_S = 10.0


class Position(NamedTuple):
    """How far a state is: the epoch under way, and the steps completed over the whole run."""

    epoch: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StateSource:
    """Where a gang finds the state from which it starts.

    Parameters
    ----------
    address : str
        The worker whose rank left it.
    generation : int
        The gang of that rank.
    position : Position
        How far the state is.
    """

    address: str
    generation: int
    position: Position


@dataclass
class _Kept:
    generation: int
    keepsake: Keepsake
    pickled: bytes | None = None


# By worker and run: workers of threads share a process.
_kept: dict[tuple[str, str], _Kept] = {}
_lock = threading.Lock()


def keep(address: str, run_id: str, generation: int, keepsake: Keepsake) -> None:
    """Leave a rank's state in this process; that of an older gang never replaces a newer one."""
    with _lock:
        found = _kept.get((address, run_id))
        if found is None or found.generation <= generation:
            _kept[address, run_id] = _Kept(generation, keepsake)


def kept(address: str, run_id: str) -> Keepsake | None:
    """Give what the last rank of a run on this worker left."""
    with _lock:
        found = _kept.get((address, run_id))
    return found.keepsake if found is not None else None


def forget(run_id: str) -> None:
    """Drop the states of a run that is over."""
    with _lock:
        for key in [key for key in _kept if key[1] == run_id]:
            del _kept[key]


def serve_states(worker: Worker) -> None:
    """Let peers copy states from a worker; done once for each worker."""

    async def handle(run_id: str, generation: int, offset: int) -> tuple[int, bytes] | None:
        return await asyncio.to_thread(_piece, worker.address, run_id, generation, offset)

    worker.handlers.setdefault(OPERATION, handle)


def _piece(address: str, run_id: str, generation: int, offset: int) -> tuple[int, bytes] | None:
    if faults.hook is not None:
        faults.hook("serving state", {"run_id": run_id, "generation": generation})
    with _lock:
        found = _kept.get((address, run_id))
        if found is None or found.generation != generation:
            return None
        if found.pickled is None:
            found.pickled = pickle.dumps(found.keepsake.snapshot, pickle.HIGHEST_PROTOCOL)
        pickled = found.pickled
        if offset + PIECE_BYTES >= len(pickled):
            found.pickled = None  # the last piece: it is made again in the rare case of need
    return len(pickled), pickled[offset : offset + PIECE_BYTES]


def fetch_state(
    worker: Worker, source: StateSource, run_id: str, abort: threading.Event
) -> Snapshot:
    """Copy a state from the worker that has it.

    Raises
    ------
    Aborted
        If that worker is gone, has it no longer, or this rank was told to end.
    """

    async def ask(offset: int) -> Any:
        peer = worker.rpc(source.address)
        async with asyncio.timeout(PIECE_S):
            return await getattr(peer, OPERATION)(
                run_id=run_id, generation=source.generation, offset=offset
            )

    pieces: list[bytes] = []
    received, total = 0, 1
    while received < total:
        if abort.is_set():
            message = f"told to end while copying the state from {source.address}"
            raise Aborted(message)
        try:
            answer = sync(worker.loop, ask, received)
        except (OSError, TimeoutError) as error:
            message = f"{source.address}, which has the newest state, does not answer: {error!r}"
            raise Aborted(message) from error
        if answer is None:
            message = f"{source.address} does not have the newest state any more"
            raise Aborted(message)
        total, piece = answer
        pieces.append(piece)
        received += len(piece)
    snapshot: Snapshot = pickle.loads(b"".join(pieces))  # noqa: S301  (made by this run's own rank)
    return snapshot
