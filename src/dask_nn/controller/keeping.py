"""What ranks leave in their worker's process, and how the next gang gets hold of it.

A rank that ends, for whatever reason, leaves its state where it is. The next gang of the run starts
from the newest of these: ranks on the same worker take it as it is, others copy it from that peer.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed.utils import sync

from dask_nn import faults
from dask_nn.controller.state_pieces import StatePieces, assemble
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from distributed import Worker

    from dask_nn.training.snapshot import Keepsake, Snapshot

__all__ = [
    "Position",
    "StateSource",
    "collect_state",
    "fetch_state",
    "forget",
    "forget_all_but",
    "forget_older",
    "keep",
    "kept",
    "serve_states",
    "state_piece",
]

OPERATION = "dask_nn_state"
# States travel in pieces of this size; each must come within the deadline.
PIECE_BYTES = 32 << 20
PIECE_S = 30.0
# A rank may end after its run: so many runs are remembered to be over.
MOST_FORGOTTEN = 1000


# The gang that left the state (the same for all pieces), the size of the whole, and the bytes.
type StatePiece = tuple[int, int, bytes]


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
    lock: threading.Lock = field(default_factory=threading.Lock)
    pieces: StatePieces | None = None

    def piece(self, offset: int) -> StatePiece:
        with self.lock:
            if self.pieces is None:
                self.pieces = StatePieces(self.keepsake.snapshot)
        return self.generation, len(self.pieces), self.pieces.piece(offset, PIECE_BYTES)


# By worker and run: workers of threads share a process.
_kept: dict[tuple[str, str], _Kept] = {}
_forgotten: deque[str] = deque(maxlen=MOST_FORGOTTEN)
_lock = threading.Lock()


def keep(address: str, run_id: str, generation: int, keepsake: Keepsake) -> None:
    """Leave a rank's state in this process.

    That of an older gang never replaces a newer one, and that of a run that is over is dropped.
    """
    with _lock:
        found = _kept.get((address, run_id))
        if run_id not in _forgotten and (found is None or found.generation <= generation):
            _kept[address, run_id] = _Kept(generation, keepsake)


def kept(address: str, run_id: str) -> Keepsake | None:
    """Give what the last rank of a run on this worker left."""
    with _lock:
        found = _kept.get((address, run_id))
    return found.keepsake if found is not None else None


def forget(run_id: str) -> None:
    """Drop the states of a run that is over."""
    with _lock:
        _forgotten.append(run_id)
        for key in [key for key in _kept if key[1] == run_id]:
            del _kept[key]


def forget_older(address: str, run_id: str, generation: int) -> None:
    """Drop what a worker keeps of gangs before this one, whose ranks all have their own state."""
    with _lock:
        found = _kept.get((address, run_id))
        if found is not None and found.generation < generation:
            del _kept[address, run_id]


def forget_all_but(address: str, runs: Collection[str]) -> None:
    """Drop what a worker keeps of runs other than these: their clients are gone."""
    with _lock:
        for key in [key for key in _kept if key[0] == address and key[1] not in runs]:
            del _kept[key]


def serve_states(worker: Worker) -> None:
    """Let peers copy states from a worker; done once for each worker."""

    async def handle(run_id: str, position: Position, offset: int) -> StatePiece | None:
        return await asyncio.to_thread(_piece, worker.address, run_id, position, offset)

    worker.handlers.setdefault(OPERATION, handle)


async def state_piece(
    run_id: str, position: Position, offset: int, dask_worker: Worker
) -> StatePiece | None:
    """Give a piece of a state that a worker keeps; None without one."""
    return await asyncio.to_thread(_piece, dask_worker.address, run_id, position, offset)


def _piece(address: str, run_id: str, position: Position, offset: int) -> StatePiece | None:
    """Give a piece of the state of this position: which gang reached it makes no difference."""
    if faults.hook is not None:
        faults.hook("serving state", {"run_id": run_id})
    with _lock:
        found = _kept.get((address, run_id))
    if found is None or found.keepsake.snapshot.position != Position(*position):
        return None
    return found.piece(offset)


def fetch_state(
    worker: Worker, source: StateSource, run_id: str, check: Callable[[], None]
) -> Snapshot:
    """Copy a state from the worker that has it.

    Parameters
    ----------
    worker : Worker
        That copies it.
    source : StateSource
        Where it is.
    run_id : str
        The run.
    check : callable
        Called before every piece; raises Aborted if this rank was told to end.

    Raises
    ------
    Aborted
        If that worker is gone, has it no longer, or this rank was told to end.
    """

    async def ask(offset: int) -> Any:
        peer = worker.rpc(source.address)
        async with asyncio.timeout(PIECE_S):
            return await getattr(peer, OPERATION)(
                run_id=run_id, position=source.position, offset=offset
            )

    def ask_for(offset: int) -> Any:
        check()
        return sync(worker.loop, ask, offset)

    return collect_state(ask_for, source)


def collect_state(ask: Callable[[int], StatePiece | None], source: StateSource) -> Snapshot:
    """Put a state together from its pieces.

    Parameters
    ----------
    ask : callable
        Gives the piece from an offset on.
    source : StateSource
        Who is asked.

    Raises
    ------
    Aborted
        If there is no answer, no state, or another one meanwhile.
    """
    received = bytearray()
    total, left_by = 1, None
    while len(received) < total:
        try:
            answer = ask(len(received))
        except OSError as error:
            message = f"{source.address}, which has the newest state, does not answer: {error!r}"
            raise Aborted(message) from error
        if answer is None or answer[0] != (answer[0] if left_by is None else left_by):
            message = f"{source.address} does not have the newest state any more"
            raise Aborted(message)
        left_by, total, piece = answer
        received += piece
    snapshot: Snapshot = assemble(received)
    return snapshot
