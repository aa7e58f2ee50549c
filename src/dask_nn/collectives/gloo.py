"""Ranks on any hosts, their leaves in host memory: PyTorch's gloo."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _distributed_c10d as c10d

from dask_nn.collectives.process_group import ProcessGroupCommunicator

if TYPE_CHECKING:
    from dask_nn.collectives.process_group_store import RendezvousStore

__all__ = ["GlooCommunicator"]

# Gloo polls no flag while it connects, so that part gets a deadline of its own.
CONNECT_TIMEOUT_S = 20.0
BREAK_TAG = 0x0FF


class GlooCommunicator(ProcessGroupCommunicator):
    """Gloo over TCP, for leaves in the memory of hosts. It does not encrypt.

    Parameters
    ----------
    rank, world_size, rendezvous, timeout_s, abort_event, slice_above_bytes, group_sizes
        See :class:`ProcessGroupCommunicator`.
    host : str
        Name or address under which this rank's host listens for its peers.
    """

    name = "gloo"

    def __init__(
        self, rank: int, world_size: int, *, host: str = "127.0.0.1", **options: Any
    ) -> None:
        super().__init__(rank, world_size, **options)
        self._host = host

    def make_group(self, store: RendezvousStore) -> Any:
        """Make a group with one thread, listening at this host's address only."""
        gloo: Any = c10d.ProcessGroupGloo  # PyTorch's annotations leave the options out
        options = gloo._Options()  # noqa: SLF001 - there is no public name
        options._timeout = timedelta(  # noqa: SLF001
            seconds=min(self.timeout_s, CONNECT_TIMEOUT_S)
        )
        options._threads = 1  # noqa: SLF001
        options._devices = [  # noqa: SLF001
            gloo.create_device(hostname=self._host)
        ]
        return gloo(store, self.rank, self.world_size, options)

    def disconnect(self, group: Any) -> None:
        """Let a receive that nobody answers time out: gloo then closes every connection."""
        if self.world_size > 1:
            peer = (self.rank + 1) % self.world_size
            with suppress(RuntimeError):
                group.recv([torch.zeros(1)], peer, BREAK_TAG).wait(timedelta(milliseconds=1))
