"""Ranks on several hosts, or with their leaves on GPUs: PyTorch's own process groups.

The groups are made directly, without ``init_process_group``, so that several gangs, and several
ranks, may live in one process. PyTorch only moves the bytes; the additions are made here, in the
order of the fixed tree. Of small leaves all subtree roots are gathered and everyone folds. Large
leaves go by owner-slice: an all-to-all brings each rank its slice of all roots, it folds them, and
the slices of the total are gathered.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _distributed_c10d as c10d

from dask_nn.collectives.base import Communicator
from dask_nn.collectives.process_group_store import RendezvousStore
from dask_nn.collectives.tree import all_roots, fold_program
from dask_nn.errors import Aborted, CollectiveError, CollectiveTimeout

if TYPE_CHECKING:
    import threading

    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["ProcessGroupCommunicator"]

# How long a wait may take to notice the abort flag.
POLL = timedelta(milliseconds=100)
# Our own deadline comes first: it knows more to say.
SPARE_S = 30.0
BREAK_TIMEOUT_S = 5.0


class ProcessGroupCommunicator(Communicator):
    """The exchange through a process group; subclasses make and break the group.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    rendezvous : Rendezvous
        Where ranks find each other's addresses; of this gang alone.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        rendezvous: Rendezvous,
        timeout_s: float = 600.0,
        abort_event: threading.Event | None = None,
        slice_above_bytes: int = 1 << 20,
    ) -> None:
        super().__init__(rank, world_size, timeout_s=timeout_s, abort_event=abort_event)
        self.slice_above_bytes = slice_above_bytes
        self._rendezvous = rendezvous
        self._group: Any = None
        self.work: Any = None

    @abstractmethod
    def connect(self, store: RendezvousStore) -> Any:
        """Make the process group; every rank of the gang does so."""

    @abstractmethod
    def disconnect(self, group: Any) -> None:
        """End what the group has under way, here and at the peers."""

    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Connect the ranks and make the buffers."""
        self._device = device
        store = RendezvousStore(self, self._rendezvous)
        try:
            self._group = self.connect(store)
        except RuntimeError as error:
            raise (store.error or self.failure(error)) from error
        roots = all_roots(shards, self.world_size)
        self._program = fold_program(shards, [node for nodes in roots for node in nodes])
        self._counts = [len(nodes) for nodes in roots]
        size = leaf_size * dtype.itemsize
        self._sliced = size > self.slice_above_bytes and self.world_size > 1
        own = self._counts[self.rank]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if self._sliced:
            slice_size = -(-leaf_size // self.world_size)
            sent = zeros(own, self.world_size, slice_size)
            self._by_owner = sent.transpose(0, 1)
            self._sent = torch.empty_like(self._by_owner, memory_format=torch.contiguous_format)
            self._received = zeros(sum(self._counts), slice_size)
            self._out_splits = [count * slice_size for count in self._counts]
            self._in_splits = [own * slice_size] * self.world_size
            self._slots = [row[:leaf_size] for row in sent.flatten(1)]
            values = list(self._received)
            self._part = zeros(slice_size)
            self._gathered = zeros(self.world_size, slice_size)
            self._total = self._gathered.flatten()[:leaf_size]
        else:
            self._sent = zeros(max(self._counts), leaf_size)
            self._received = zeros(self.world_size, max(self._counts), leaf_size)
            self._slots = list(self._sent[:own])
            values = [
                self._received[rank, i]
                for rank, count in enumerate(self._counts)
                for i in range(count)
            ]
            self._part = self._total = zeros(leaf_size)
        num_scratch = max((add.dst for add in self._program), default=0) - len(values)
        values += [self._part, *(torch.zeros_like(self._part) for _ in range(num_scratch))]
        self._fold = [(values[a.left], values[a.right], values[a.dst]) for a in self._program]
        self._only_root = values[0]

    def slots(self) -> list[torch.Tensor]:
        """Give the tensors to fill; they are the same in every exchange."""
        return self._slots

    def publish(self) -> None:
        """Begin to send the slots."""
        if self._sliced:
            self._sent.copy_(self._by_owner)
            options = c10d.AllToAllOptions()
            options.timeout = self.patience
            self._begin(
                "alltoall_base",
                self._received.view(-1),
                self._sent.view(-1),
                self._out_splits,
                self._in_splits,
                options,
            )
        else:
            self._begin_gather(self._received, self._sent)

    def collect(self) -> torch.Tensor:
        """Wait for what the peers sent, and fold it."""
        self.finish()
        for left, right, out in self._fold:
            torch.add(left, right, out=out)
        if not self._fold:
            self._part.copy_(self._only_root)
        if self._sliced:
            self._begin_gather(self._gathered, self._part)
            self.finish()
        return self._total

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Gather the cells' lengths, then the cells."""
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=self._device)
        self._begin_gather(lengths, torch.tensor([len(cell)], device=self._device))
        self.finish()
        longest = int(lengths.max())
        if not longest:
            return [b""] * self.world_size
        own = torch.frombuffer(bytearray(cell.ljust(longest, b"\0")), dtype=torch.uint8)
        cells = torch.zeros(self.world_size, longest, dtype=torch.uint8, device=self._device)
        self._begin_gather(cells, own.to(self._device))
        self.finish()
        ends = lengths.tolist()
        return [bytes(row[:end]) for row, end in zip(cells.cpu().numpy(), ends, strict=True)]

    def signal_abort(self) -> None:
        """Break the connections: the peers' waits end, and so does one of this rank."""
        group = self._group
        if group is not None:
            self.disconnect(group)

    def close(self) -> None:
        """Leave the group, and break it first if an exchange is still under way."""
        group, self._group = self._group, None
        work, self.work = self.work, None
        if group is None:
            return
        if work is not None and not work.is_completed():
            self.disconnect(group)
            # A group that goes joins its threads with the interpreter lock held, while they may
            # want that lock to drop tensors: let them end first.
            deadline = time.monotonic() + BREAK_TIMEOUT_S
            while not work.is_completed() and time.monotonic() < deadline:
                time.sleep(0.001)
        del work, group
        self._slots, self._fold = [], []

    @property
    def patience(self) -> timedelta:
        """Deadline for PyTorch's own waits, later than that of this communicator."""
        return timedelta(seconds=self.timeout_s + SPARE_S)

    def _begin_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        options = c10d.AllgatherOptions()
        options.timeout = self.patience
        self._begin("_allgather_base", received.view(-1), sent.view(-1), options)

    def _begin(self, operation: str, *arguments: Any) -> None:
        self.check_abort()
        group = self._group
        if group is None:
            raise Aborted(f"rank {self.rank} exchanges through a closed communicator")
        try:
            self.work = getattr(group, operation)(*arguments)
        except RuntimeError as error:
            raise self.failure(error) from error

    def finish(self) -> None:
        """Wait for the operation under way."""
        work = self.work
        deadline = self.deadline()
        while True:
            try:
                work.wait(POLL)
            except RuntimeError as error:
                if work.is_completed() and not work.is_success():
                    raise self.failure(error) from error
            else:
                return
            self.check_abort()
            if time.monotonic() > deadline:
                raise self.timed_out("its peers")

    def failure(self, error: RuntimeError) -> CollectiveError:
        """Turn an error of PyTorch into one of ours."""
        reason = str(error).partition("\n")[0]
        if self.abort_event.is_set():
            return Aborted(f"rank {self.rank} was told to end its exchange")
        if "timed out" in reason.lower():
            return CollectiveTimeout(f"rank {self.rank} waited too long for a peer: {reason}")
        return Aborted(
            f"rank {self.rank} lost a peer, which ended the exchange or died "
            f"(communicator {self.name!r}): {reason}"
        )
