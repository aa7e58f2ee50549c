"""The interface through which ranks of one gang add up their leaves."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dask_nn.errors import Aborted, CollectiveTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["CELL_BYTES", "Communicator"]

# One rank's part of a byte message travels in cells of this size.
CELL_BYTES = 64 * 1024
LENGTH_BYTES = 8
# How long the rendezvous may wait before the abort flag is looked at again.
KEY_POLL_S = 0.1


class Communicator(ABC):
    """Fixed-tree reduction, byte messages and barriers between the ranks of one gang.

    A step of training writes its subtree roots into :meth:`slots`, calls :meth:`publish`, may do
    other work, and calls :meth:`collect` for the total. Every wait ends with the total, with
    :class:`~dask_nn.errors.Aborted`, or with :class:`~dask_nn.errors.CollectiveTimeout`.

    Parameters
    ----------
    rank : int
        This rank, from 0.
    world_size : int
        Ranks of the gang.
    timeout_s : float
        Deadline of every wait, in seconds.
    abort_event : threading.Event, optional
        Ends every wait of this rank once it is set.

    Attributes
    ----------
    beats : int
        Grows while the rank is alive.
    title : str
        How errors name this rank.
    watch : callable, optional
        Called now and then during every wait; what it raises ends the wait.
    waiting_since : float or None
        When the wait for peers began that is under way, by ``time.monotonic()``. It counts only
        while `beats` grow, and until the rank says that it is at work again.
    """

    name: str

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = 600.0,
        abort_event: threading.Event | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.abort_event = abort_event or threading.Event()
        self.beats = 0
        self.title = f"rank {rank}"
        self.watch: Callable[[], None] | None = None
        self.waiting_since: float | None = None

    @abstractmethod
    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Meet the other ranks and make the buffers; every rank calls it with equal arguments.

        Parameters
        ----------
        shards : int
            Leaves of the tree.
        leaf_size : int
            Elements of one leaf.
        dtype : torch.dtype
            Type of the leaves.
        device : torch.device
            Where the leaves live.
        """

    @abstractmethod
    def slots(self) -> list[torch.Tensor]:
        """Give the tensors, shape (leaf_size,), for this rank's subtree roots in the next exchange.

        One tensor for each node of ``roots(shards, *shard_range(rank, world_size, shards))``, in
        that order. The same few tensors come back in turn, so views of them may be kept.
        """

    @abstractmethod
    def publish(self) -> None:
        """Say that the slots are filled; does not wait for peers.

        Raises
        ------
        Aborted
            If the exchange was ended, and this rank can know by now: who comes after the end does
            not complete it. Where the end has yet to travel, `collect` may raise it instead.
        """

    @abstractmethod
    def collect(self) -> torch.Tensor:
        """Wait for all peers and return the total of all leaves, shape (leaf_size,).

        It is always the same tensor, overwritten by the next exchange. The additions are those of
        the fixed tree, so its bits depend on the leaves alone.

        Raises
        ------
        Aborted
            If a peer or the client ended the exchange.
        CollectiveTimeout
            If a peer did not publish within ``timeout_s``.
        """

    @abstractmethod
    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Give every rank's cell of at most ``CELL_BYTES + LENGTH_BYTES`` bytes, by rank."""

    @abstractmethod
    def signal_abort(self) -> None:
        """Wake the peers out of their waits with :class:`~dask_nn.errors.Aborted`."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything; may be called twice, and after a failure."""

    def abort(self) -> None:
        """End this rank's waits and those of its peers."""
        self.abort_event.set()
        self.signal_abort()

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Give every rank's payload, in the order of ranks; payloads may differ in length."""
        parts: list[list[bytes]] = [[] for _ in range(self.world_size)]
        offset = 0
        while True:
            chunk = payload[offset : offset + CELL_BYTES]
            cells = self.exchange_cells(len(payload).to_bytes(LENGTH_BYTES, "little") + chunk)
            for part, cell in zip(parts, cells, strict=True):
                part.append(cell[LENGTH_BYTES:])
            offset += CELL_BYTES
            longest = max(int.from_bytes(cell[:LENGTH_BYTES], "little") for cell in cells)
            if offset >= longest:
                return [b"".join(part) for part in parts]

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.exchange_cells(bytes(LENGTH_BYTES))

    def check_abort(self) -> None:
        """Raise :class:`~dask_nn.errors.Aborted` if this rank was told to stop."""
        self.beats += 1  # who asks is alive: whoever watches this rank looks at the count
        if self.abort_event.is_set():
            message = f"{self.title} was told to end its exchange"
            raise Aborted(message)
        if self.watch is not None:
            self.watch()

    def show_life(self) -> None:
        """Say that this rank is alive, and waits for no peer."""
        self.waiting_since = None
        self.beats += 1

    def at_work(self) -> None:
        """Look at the abort flag outside of any exchange: this rank waits for no peer."""
        self.waiting_since = None
        self.check_abort()

    def deadline(self) -> float:
        """Give the moment, by ``time.monotonic``, at which a wait that begins now must end."""
        self.waiting_since = now = time.monotonic()
        return now + self.timeout_s

    def await_key(self, rendezvous: Rendezvous, key: str) -> bytes:
        """Wait for a key at the rendezvous, as long as a wait of this rank may last."""
        deadline = self.deadline()
        while True:
            try:
                return rendezvous.get(key, timeout_s=min(KEY_POLL_S, self.timeout_s))
            except CollectiveTimeout:
                self.check_abort()
                if time.monotonic() > deadline:
                    raise self.timed_out(f"a peer to announce {key!r}") from None

    def timed_out(self, peer: str) -> CollectiveTimeout:
        """Make the error for a peer that did not come."""
        return CollectiveTimeout(
            f"{self.title} waited {self.timeout_s:g} s for {peer}, which took no part in the "
            f"exchange (communicator {self.name!r}, world size {self.world_size})"
        )
