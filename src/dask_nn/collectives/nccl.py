"""Ranks whose leaves live on CUDA devices: PyTorch's NCCL."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch._C import _distributed_c10d as c10d

from dask_nn.collectives.process_group import ProcessGroupCommunicator

if TYPE_CHECKING:
    from dask_nn.collectives.process_group_store import RendezvousStore

__all__ = ["NcclCommunicator"]


class NcclCommunicator(ProcessGroupCommunicator):
    """NCCL, for leaves on CUDA devices, one device for each rank.

    Untested: no GPU has run it yet.
    """

    name = "nccl"

    def make_group(self, store: RendezvousStore) -> Any:
        """Make a group; NCCL itself connects in the first exchange."""
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = self.patience  # noqa: SLF001 - there is no public name
        return c10d.ProcessGroupNCCL(store, self.rank, self.world_size, options)

    def disconnect(self, group: Any) -> None:
        """End the device's part in the exchange; peers notice by their deadline."""
        with suppress(RuntimeError):
            group.abort()

    def finish(self) -> None:
        """Poll for the operation's end."""
        # Work.wait would only order the device's streams, and so could neither poll nor end.
        deadline = self.deadline()
        while not self.work.is_completed():
            self.check_abort()
            if time.monotonic() > deadline:
                raise self.timed_out("its peers")
            time.sleep(0)
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.failure(error) from error
