"""The exchange of ranks that share no memory, whatever carries the bytes between them.

The additions are made here, in the order of the fixed tree. Of small leaves all subtree roots are
gathered and everyone folds. Large leaves go by owner-slice: every rank is sent its slice of all
roots, folds them, and the slices of the total are gathered.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.collectives.base import Communicator
from dask_nn.collectives.fold import Fold
from dask_nn.collectives.tree import Node, group_roots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["MessageCommunicator"]


class MessageCommunicator(Communicator):
    """Leaves travel; subclasses say how.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    rendezvous : Rendezvous
        Where ranks find each other's addresses; of this gang alone.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    group_sizes : sequence of int, optional
        Where each member speaks for several ranks of a gang, which follow each other: how many.
        `rank` and `world_size` then count the members.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        rendezvous: Rendezvous,
        slice_above_bytes: int = 1 << 20,
        group_sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rank, world_size, **options)
        self.rendezvous = rendezvous
        self.slice_above_bytes = slice_above_bytes
        self.group_sizes = tuple(group_sizes or (1,) * world_size)
        self._firsts = list(accumulate(self.group_sizes, initial=0))
        self.title = self.name_of(rank)

    @abstractmethod
    def connect(self, device: torch.device) -> None:
        """Meet the peers."""

    @abstractmethod
    def begin_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Begin to give all members all tensors ``sent``, in the order of members.

        `sent` stays as it is until a later exchange with the same peers has ended.

        Parameters
        ----------
        received : Tensor
            Contiguous, as large as all members' `sent`.
        sent : Tensor
            Contiguous, of the same size everywhere.
        """

    @abstractmethod
    def begin_scatter(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_sizes: Sequence[int],
        sent_sizes: Sequence[int],
    ) -> None:
        """Begin to give every member its part of `sent`, and to receive one from everybody.

        Parameters
        ----------
        received, sent : Tensor
            Contiguous; the parts lie in the order of members.
        received_sizes, sent_sizes : sequence of int
            Elements of each part.
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait for what the peers send in the operation under way."""

    def name_of(self, member: int) -> str:
        """Name a member by its rank in the gang, the first of those for which it speaks."""
        return f"rank {self._firsts[member]}"

    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Connect the ranks and make the buffers."""
        self.connect(device)
        roots = group_roots(shards, self.group_sizes)
        nodes = [node for own in roots for node in own]
        counts = [len(own) for own in roots]
        num_own = counts[self.rank]
        whole = Node(0, shards)
        size_bytes = leaf_size * dtype.itemsize
        self._sliced = size_bytes > self.slice_above_bytes and self.world_size > 1
        self._device = device
        self._exchanges = 0

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if self._sliced:
            slice_size = -(-leaf_size // self.world_size)
            filled = zeros(num_own, self.world_size, slice_size)
            self._by_owner = filled.transpose(0, 1)
            self._sent = [torch.empty_like(self._by_owner, memory_format=torch.contiguous_format)]
            self._received = zeros(len(nodes), slice_size)
            self._received_sizes = [count * slice_size for count in counts]
            self._sent_sizes = [num_own * slice_size] * self.world_size
            self._slots = [[row[:leaf_size] for row in filled.flatten(1)]]
            self._part = zeros(slice_size)
            self._gathered = zeros(self.world_size, slice_size)
            self._total = self._gathered.flatten()[:leaf_size]
            self._fold = Fold(whole, nodes, list(self._received), self._part)
        else:
            # In turn: what a slow peer still reads is not overwritten.
            self._sent = [zeros(max(counts), leaf_size) for _ in range(2)]
            self._received = zeros(self.world_size, max(counts), leaf_size)
            self._slots = [list(sent[:num_own]) for sent in self._sent]
            values = [
                self._received[member, i]
                for member, count in enumerate(counts)
                for i in range(count)
            ]
            self._total = zeros(leaf_size)
            self._fold = Fold(whole, nodes, values, self._total)

    def slots(self) -> list[torch.Tensor]:
        """Give the tensors to fill next."""
        return self._slots[self._exchanges % len(self._slots)]

    def publish(self) -> None:
        """Begin to send the slots."""
        sent = self._sent[self._exchanges % len(self._sent)]
        self._exchanges += 1
        if self._sliced:
            sent.copy_(self._by_owner)
            self.begin_scatter(self._received, sent, self._received_sizes, self._sent_sizes)
        else:
            self.begin_gather(self._received, sent)

    def collect(self) -> torch.Tensor:
        """Wait for what the peers sent, and fold it."""
        self.finish()
        self._fold.run()
        if self._sliced:
            self.begin_gather(self._gathered, self._part)
            self.finish()
        return self._total

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Gather the cells' lengths, then the cells."""
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=self._device)
        self.begin_gather(lengths, torch.tensor([len(cell)], device=self._device))
        self.finish()
        longest = int(lengths.max())
        if not longest:
            return [b""] * self.world_size
        own = torch.frombuffer(bytearray(cell.ljust(longest, b"\0")), dtype=torch.uint8)
        cells = torch.zeros(self.world_size, longest, dtype=torch.uint8, device=self._device)
        self.begin_gather(cells, own.to(self._device))
        self.finish()
        ends = lengths.tolist()
        return [bytes(row[:end]) for row, end in zip(cells.cpu().numpy(), ends, strict=True)]

    def close(self) -> None:
        """Let go of the buffers."""
        self._slots, self._sent = [], []
        self.__dict__.pop("_fold", None)
