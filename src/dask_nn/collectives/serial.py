"""The communicator of a gang of one."""

from __future__ import annotations

import torch

from dask_nn.collectives.base import Communicator

__all__ = ["SerialCommunicator"]


class SerialCommunicator(Communicator):
    """One rank that computes every shard: its only subtree root is the total."""

    name = "serial"

    def open(
        self, *, shards: int, leaf_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the one buffer."""
        del shards  # the root of the tree is this rank's only node, whatever their number
        self._total = torch.zeros(leaf_size, dtype=dtype, device=device)
        self._slots = [self._total]

    def slots(self) -> list[torch.Tensor]:
        """Give the total itself, shape (leaf_size,): what is folded into it needs no copy."""
        return self._slots

    def publish(self) -> None:
        """Do nothing: there are no peers."""

    def collect(self) -> torch.Tensor:
        """Give the total."""
        self.check_abort()
        return self._total

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Give the rank's own cell."""
        self.check_abort()
        return [cell]

    def signal_abort(self) -> None:
        """Do nothing: there are no peers."""

    def close(self) -> None:
        """Do nothing: the buffer goes with the object."""
