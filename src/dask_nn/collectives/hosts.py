"""Ranks on several hosts: shared memory inside a host, another communicator between the hosts.

The ranks of one host follow each other, so their shards are a contiguous range. They fold their
leaves into the largest subtrees inside that range; one rank of each host, its leader, exchanges
these with the other leaders, and everybody ends with the total of the same tree. What crosses hosts
is one host's share, however many ranks it has.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dask_nn.collectives.base import Communicator
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

LENGTH_BYTES = 8
LEADER = (0,)


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

    name: ClassVar[str] = "shared_memory+"

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
        if sum(hosts) != world_size or min(hosts) < 1:
            message = f"hosts must share {world_size} ranks, at least 1 each, got {tuple(hosts)}"
            raise ConfigurationError(message)
        self.name = name  # type: ignore[misc]  # one class, a name for each pair of levels
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
        roots = all_roots(shards, self.world_size)[self._first : self._first + self._members]
        nodes = [node for own in roots for node in own]
        targets = group_roots(shards, self._hosts)[self._host]
        leaf_bytes = leaf_size * dtype.itemsize
        self._sliced = leaf_bytes > self.slice_above_bytes and self._members > 1
        num_slots = len(nodes) + 1 + (len(targets) if self._sliced else 0)
        layout = RegionLayout(
            members=self._members,
            num_cells=self._members + self.world_size,
            num_slots=num_slots if self._members > 1 else 0,
            slot_bytes=leaf_bytes,
        )
        make = self._file.map if self._member else self._file.make
        arguments = (self,) if self._member else ()
        region = Region(
            self,
            layout,
            make(layout.size_bytes, *arguments),  # type: ignore[operator]
            self._member,
            first_rank=self._first,
        )
        self._region = region
