"""What a worker that joins a run must show before it gets a rank."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import (
    DESCRIBE_S,
    ask_workers,
    check_versions,
    client_versions,
    in_loop,
)
from dask_nn.controller.placement import WorkerFacts
from dask_nn.controller.reachability import unreachable_from
from dask_nn.controller.worker_side import describe
from dask_nn.errors import CheckpointError
from dask_nn.training.checkpointing import prepare_storage, sees_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["Admission"]

# How long it may take to reach its peers, and to look for a file.
REACH_S = 5.0
SEE_S = 10.0


class Admission:
    """Examines workers, several at once, without making anybody wait.

    Parameters
    ----------
    client : Client
        Of the cluster.
    checkpoint : Checkpoint, optional
        What every worker of the run must see, for each may become rank 0.
    """

    def __init__(self, client: Client, checkpoint: Checkpoint | None = None) -> None:
        self._client = client
        self._checkpoint = checkpoint

    def examine(self, address: str, peers: Sequence[str]) -> Future[WorkerFacts]:
        """Examine a worker.

        Parameters
        ----------
        address : str
            The worker.
        peers : sequence of str
            Workers that it must reach.

        Returns
        -------
        concurrent.futures.Future
            Its description, or why it does not fit: a DaskNNError; a ConnectionError if it does not
            reach a peer, another OSError if it is gone or does not answer.
        """
        return in_loop(self._client, self._examine(address, list(peers)))

    async def _examine(self, address: str, peers: list[str]) -> WorkerFacts:
        facts = WorkerFacts(**await self._ask(address, describe, timeout_s=DESCRIBE_S))
        check_versions([facts], client_versions())
        cut = await self._ask(address, unreachable_from, peers, REACH_S, timeout_s=2 * REACH_S)
        if cut:
            message = f"{address} does not reach {', '.join(cut)}"
            raise ConnectionError(message)
        if self._checkpoint is not None and await self._is_blind(address, self._checkpoint):
            message = (
                f"{self._checkpoint.url} of this client is another place on {address}: "
                "checkpoints need a folder that all workers and the client share, or an object "
                "store"
            )
            raise CheckpointError(message)
        return facts

    async def _is_blind(self, address: str, checkpoint: Checkpoint) -> bool:
        """Tell whether a worker does not see a file that this process writes."""
        probe = prepare_storage(checkpoint)
        try:
            name, _ = await asyncio.to_thread(probe.__enter__)
        except (CheckpointError, OSError):
            return False  # a disk that is full for the moment says nothing about the worker
        try:
            return not await self._ask(address, sees_storage, checkpoint, name, timeout_s=SEE_S)
        finally:
            await asyncio.to_thread(probe.__exit__, None, None, None)

    async def _ask(
        self, address: str, function: Callable[..., Any], *arguments: Any, timeout_s: float
    ) -> Any:
        asked = ask_workers(self._client, function, [address], *arguments, timeout_s=timeout_s)
        answer = (await asyncio.wrap_future(asked))[address]
        if isinstance(answer, Exception):
            raise answer
        return answer
