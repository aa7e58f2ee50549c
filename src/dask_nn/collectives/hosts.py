"""Ranks on several hosts: shared memory inside a host, another communicator between the hosts.

The ranks of one host follow each other, so their shards are a contiguous range. They fold their
leaves into the largest subtrees inside that range; one rank of each host, its leader, exchanges
these with the other leaders, and everybody ends with the total of the same tree. What crosses hosts
is one host's share, however many ranks it has.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.collectives.base import LENGTH_BYTES, Communicator
from dask_nn.collectives.fold import Fold, slice_bounds
from dask_nn.collectives.region import (
    FILLED,
    FINISHED,
    FOLDED,
    MAPPED,
    WRITTEN,
    Region,
    RegionLayout,
)
from dask_nn.collectives.shared_file import SharedFile
from dask_nn.collectives.tree import all_roots, group_roots
from dask_nn.errors import Aborted, CollectiveError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["HostsCommunicator"]

LEADER = (0,)
# Values of the flag MAPPED: this host is whole, all hosts are.
HOST_WHOLE, ALL_WHOLE = 1, 2


class HostsCommunicator(Communicator):
    """Two levels: the ranks of a host, and the leaders of all hosts.

    Parameters
    ----------
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    name : str
        Of this pair of levels.
    hosts : sequence of int
        Ranks on each host, in the order of ranks.
    rendezvous, gang, folder
        See :class:`~dask_nn.collectives.shared_file.SharedFile`.
    make_outer : callable
        ``make_outer(host, num_hosts, **options)`` makes the communicator between the hosts, not
        yet open; called on leaders alone.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.

    Raises
    ------
    ConfigurationError
        If the hosts' ranks are not as many as there are.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        name: str,
        hosts: Sequence[int],
        rendezvous: Rendezvous,
        make_outer: Callable[..., Communicator],
        gang: str = "gang",
        folder: str | None = None,
        slice_above_bytes: int = 1 << 20,
        **options: Any,
    ) -> None:
        super().__init__(rank, world_size, **options)
        if sum(hosts) != world_size or min(hosts, default=0) < 1:
            message = f"hosts must share {world_size} ranks, at least 1 each, got {tuple(hosts)}"
            raise ConfigurationError(message)
        self.name = name
        self.slice_above_bytes = slice_above_bytes
        self._hosts = tuple(hosts)
        firsts = list(accumulate(hosts, initial=0))
        self._host = next(host for host, first in enumerate(firsts[1:]) if rank < first)
        self._first = firsts[self._host]
        self._members = hosts[self._host]
        self._member = rank - self._first
        key = f"shared-memory-{self._host}"
        self._file = SharedFile(rendezvous, key=key, gang=gang, folder=folder)
        self._region: Region | None = None
        self._outer: Communicator | None = None
        if not self._member:
            self._outer = make_outer(
                self._host,
                len(hosts),
                group_sizes=self._hosts,
                rendezvous=rendezvous,
                slice_above_bytes=slice_above_bytes,
                **options,
            )
            # Its waits are ours: who waits for another host lives, and hears its own host.
            self._outer.abort_event = self.abort_event
            self._outer.watch = self._look_around

    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Meet the host's other ranks, then the other hosts."""
        self._exchanges = self._messages = 0
        try:
            if self._members > 1:
                self._meet_host(shards, leaf_size, dtype)
            if self._outer is not None:
                self._outer.open(shards=shards, leaf_size=leaf_size, dtype=dtype, device=device)
            if self._region is not None and self._outer is not None:
                self._region.raise_flag(MAPPED, ALL_WHOLE)
            elif self._region is not None:
                self._region.wait(MAPPED, ALL_WHOLE, LEADER)
        except CollectiveError:
            self.signal_abort()
            raise

    def _meet_host(self, shards: int, leaf_size: int, dtype: torch.dtype) -> None:
        roots = all_roots(shards, self.world_size)[self._first : self._first + self._members]
        self._nodes = [node for own in roots for node in own]
        self._targets = group_roots(shards, self._hosts)[self._host]
        leaf_bytes = leaf_size * dtype.itemsize
        self._sliced = leaf_bytes > self.slice_above_bytes
        layout = RegionLayout(
            members=self._members,
            num_cells=self._members + self.world_size,
            num_slots=len(self._nodes) + 1 + self._sliced * len(self._targets),
            slot_bytes=leaf_bytes,
        )
        leads = self._outer is not None
        size_bytes = layout.size_bytes
        memory = self._file.make(size_bytes) if leads else self._file.map(size_bytes, self)
        region = Region(self, layout, memory, self._member, first_rank=self._first)
        self._region = region
        slots = [region.slot(i, dtype, leaf_size) for i in range(layout.num_slots)]
        self._leaves, self._result = slots[: len(self._nodes)], slots[len(self._nodes)]
        self._joined = slots[len(self._nodes) + 1 :]
        first = sum(len(own) for own in roots[: self._member])
        self._slots = self._leaves[first : first + len(roots[self._member])]
        self._total = torch.zeros(0 if leads else leaf_size, dtype=dtype)
        self._folds: dict[tuple[int, ...], list[Fold]] = {}
        bounds = slice_bounds(leaf_size, self._members)
        self._own_slice = slice(*bounds[self._member : self._member + 2])
        region.raise_flag(MAPPED, HOST_WHOLE)
        region.wait(MAPPED, HOST_WHOLE)
        self._file.unlink()

    def slots(self) -> list[torch.Tensor]:
        """Give the tensors to fill next; of a host's only rank, those between the hosts."""
        if self._region is None and self._outer is not None:
            return self._outer.slots()
        return self._slots

    def publish(self) -> None:
        """Tell the host's other ranks, or, where there are none, the other hosts."""
        self._exchanges += 1
        if self._region is not None:
            self._region.raise_flag(FILLED, self._exchanges)
        else:
            self._between_hosts().publish()

    def collect(self) -> torch.Tensor:
        """Wait for the total of all hosts."""
        try:
            if self._region is None:
                return self._between_hosts().collect()
            if self._sliced:
                self._region.wait(FILLED, self._exchanges)
                self._fold(self._joined, self._own_slice)
                self._region.raise_flag(FOLDED, self._exchanges)
            if self._outer is None:
                self._region.wait(FINISHED, self._exchanges, LEADER)
                return self._total.copy_(self._result)
            return self._lead(self._region, self._outer)
        except CollectiveError:
            self.signal_abort()
            raise

    def _lead(self, region: Region, outer: Communicator) -> torch.Tensor:
        """Take the host's subtrees to the other hosts, and bring back the total."""
        if self._sliced:
            region.wait(FOLDED, self._exchanges)
            for slot, joined in zip(outer.slots(), self._joined, strict=True):
                slot.copy_(joined)
        else:
            region.wait(FILLED, self._exchanges)
            self._fold(outer.slots(), slice(None))
        outer.publish()
        total = outer.collect()
        self._result.copy_(total)
        region.raise_flag(FINISHED, self._exchanges, complete=True)
        return total

    def _fold(self, targets: list[torch.Tensor], part: slice) -> None:
        """Fold a part of the host's leaves into its subtrees."""
        key = tuple(map(id, targets))
        folds = self._folds.get(key)
        if folds is None:
            folds = self._folds[key] = []
            for target, total in zip(self._targets, targets, strict=True):
                inside = [
                    i
                    for i, node in enumerate(self._nodes)
                    if target.lo <= node.lo and node.hi <= target.hi
                ]
                nodes = [self._nodes[i] for i in inside]
                leaves = [self._leaves[i][part] for i in inside]
                folds.append(Fold(target, nodes, leaves, total[part]))
        for fold in folds:
            fold.run()

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Gather the host's cells, then those of all hosts."""
        try:
            if self._region is None:
                return _unpack(self._between_hosts().all_gather_bytes(_pack([cell])))
            region = self._region
            self._messages += 1
            ranks = range(self.world_size)
            if self._outer is None:
                region.write_cell(self._member, cell)
                region.raise_flag(WRITTEN, self._messages)
                region.wait(WRITTEN, self._messages, LEADER)
                return [region.read_cell(self._members + rank) for rank in ranks]
            region.wait(WRITTEN, self._messages)
            own = [cell, *(region.read_cell(peer) for peer in region.peers)]
            cells = _unpack(self._outer.all_gather_bytes(_pack(own)))
            for rank in ranks:
                region.write_cell(self._members + rank, cells[rank])
            region.raise_flag(WRITTEN, self._messages, complete=True)
        except CollectiveError:
            self.signal_abort()
            raise
        else:
            return cells

    def signal_abort(self) -> None:
        """Wake the host's ranks, and the other hosts where this rank leads its own."""
        if self._region is not None:
            self._region.end()
        if self._outer is not None:
            self._outer.signal_abort()

    def close(self) -> None:
        """Give back both levels."""
        self._file.unlink()
        region, self._region = self._region, None
        outer, self._outer = self._outer, None
        if outer is not None:
            outer.close()
        if region is not None:
            region.close()
            self._slots, self._leaves, self._joined, self._folds = [], [], [], {}
            self.__dict__.pop("_result", None)

    def _between_hosts(self) -> Communicator:
        if self._outer is None:
            raise Aborted(f"{self.title} exchanges through a closed communicator")
        return self._outer

    def _look_around(self) -> None:
        """While another host is waited for: live, and hear what this host's ranks say."""
        self.beats += 1
        if self._outer is not None:
            self.waiting_since = self._outer.waiting_since
        if self._region is not None:
            self._region.check_ended()
        if self.watch is not None:
            self.watch()


def _pack(cells: list[bytes]) -> bytes:
    return b"".join(len(cell).to_bytes(LENGTH_BYTES, "little") + cell for cell in cells)


def _unpack(packed: list[bytes]) -> list[bytes]:
    cells = []
    for several in packed:
        at = 0
        while at < len(several):
            end = at + LENGTH_BYTES + int.from_bytes(several[at : at + LENGTH_BYTES], "little")
            cells.append(several[at + LENGTH_BYTES : end])
            at = end
    return cells
