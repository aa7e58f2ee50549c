"""A rendezvous in the shape that PyTorch's process groups ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._C._distributed_c10d import Store

from dask_nn.errors import CollectiveError, CollectiveTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from dask_nn.collectives.base import Communicator
    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["RendezvousStore"]

CHECK_S = 0.01


class RendezvousStore(Store):
    """Keys and values of one gang, for the threads of PyTorch that connect its ranks.

    Waits end with the communicator's abort flag or deadline. Since PyTorch may turn an exception
    into one of its own, the first is kept in ``error``.

    Parameters
    ----------
    communicator : Communicator
        Whose deadline, abort flag and name count.
    rendezvous : Rendezvous
        Where the values are.
    """

    def __init__(self, communicator: Communicator, rendezvous: Rendezvous) -> None:
        super().__init__()
        self.error: CollectiveError | None = None
        self._communicator = communicator
        self._rendezvous = rendezvous

    def set(self, key: str, value: bytes | str) -> None:
        """Store a value."""
        content = value.encode() if isinstance(value, str) else value
        self._rendezvous.set(self._name(key), content)

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value."""
        try:
            return self._communicator.await_key(self._rendezvous, self._name(key))
        except CollectiveError as error:
            self.error = self.error or error
            raise

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait for keys; the communicator's deadline counts, not that of the caller."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Say whether all keys are set."""
        try:
            for key in keys:
                self._rendezvous.get(self._name(key), timeout_s=CHECK_S)
        except CollectiveTimeout:
            return False
        return True

    def _name(self, key: str) -> str:
        return f"{self._communicator.name}/{key}"
