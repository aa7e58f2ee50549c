"""Blocks that were lost with their workers, and that only the client can put back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

    from dask_nn.controller.membership import Membership

__all__ = ["LostBlocks"]

logger = logging.getLogger("dask_nn")


class LostBlocks:
    """Puts blocks back that were lost with workers, and knows with which.

    Parameters
    ----------
    client : Client
        Of the cluster.
    membership : Membership
        The workers that are there.
    restore : callable
        Puts blocks that only the client can make again back on the cluster.
    """

    def __init__(self, client: Client, membership: Membership, restore: Callable[[], None]) -> None:
        self._client = client
        self._membership = membership
        self._restore = restore
        self._made_good: set[str] = set()

    def lost_with(self) -> set[str]:
        """Give the workers that have left since blocks were put back."""
        removed = set(self._membership.removed)
        self._made_good &= removed  # whoever came back at an old address may leave again
        return removed - self._made_good

    def put_back(self) -> bool:
        """Put them back; False if workers leave meanwhile, or have no room."""
        self._membership.settle()
        removed = set(self._membership.removed)
        try:
            self._restore()
        except (OSError, KeyError, ClusterError) as error:
            if self._client.status != "running":
                raise
            logger.warning("lost blocks could not be put back yet: %s", error)
            return False
        self._made_good = removed
        return True
