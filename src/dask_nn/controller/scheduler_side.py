"""What runs on the scheduler to look after workers.

The scheduler imports this file, and with it all that it imports: never torch, which its image may
lack, and which would stop it for seconds at the very moment at which a worker has to be let go.
"""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["list_workers", "remove_worker"]


def list_workers(dask_scheduler: Any) -> dict[str, str]:
    """Give the workers: from address to what tells one process there from the next."""
    return {address: str(worker.server_id) for address, worker in dask_scheduler.workers.items()}


async def remove_worker(address: str, dask_scheduler: Any) -> None:
    """Let go of a worker, whose tasks are not to blame, and make it close when it wakes up."""
    # The argument that says so was renamed in distributed 2025.
    names = inspect.signature(dask_scheduler.remove_worker).parameters
    blameless = {name: True for name in ("expected", "safe") if name in names}
    await dask_scheduler.remove_worker(
        address, stimulus_id="dask-nn-evict", close=True, **blameless
    )
