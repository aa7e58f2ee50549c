"""Connect to a scheduler that is already running."""

from __future__ import annotations

import asyncio

from distributed import Client, Security
from distributed.core import rpc
from distributed.utils import LoopRunner

from dask_nn.clusters.quiet import quiet_distributed
from dask_nn.errors import SchedulerUnreachable

__all__ = ["connect"]


def connect(address: str, timeout_s: float = 10) -> Client:
    """Open a client of the scheduler at an address.

    Parameters
    ----------
    address : str
        Such as ``"tcp://10.0.0.5:8786"``; without a protocol TCP is meant.
    timeout_s : float, default 10
        How long to wait for an answer, in seconds.

    Returns
    -------
    distributed.Client
        The caller closes it. It is the default client until then.

    Raises
    ------
    SchedulerUnreachable
        If no Dask scheduler answers in time, or the address cannot be understood.
    """
    try:
        with quiet_distributed():
            # A client waits for ever for the answer of something that listens and is no Dask.
            kind = LoopRunner().run_sync(_kind, address, timeout_s)
            if kind == "Scheduler":
                return Client(address, timeout=timeout_s)
    except Exception as error:
        # Also MemoryError: what another protocol says is read as the length of a message.
        lines = str(error).strip().splitlines()
        raise _unreachable(address, timeout_s, lines[0] if lines else "no answer") from error
    raise _unreachable(address, timeout_s, f"a Dask {kind.lower()} did")


def _unreachable(address: str, timeout_s: float, reason: str) -> SchedulerUnreachable:
    return SchedulerUnreachable(
        f"no Dask scheduler answered at {address!r} within {timeout_s:g} s ({reason}); expected "
        "the address that `dask scheduler` prints, such as tcp://10.0.0.5:8786"
    )


async def _kind(address: str, timeout_s: float) -> str:
    arguments = Security().get_connection_args("client")
    async with (
        asyncio.timeout(timeout_s),
        rpc(address, timeout=timeout_s, connection_args=arguments) as server,
    ):
        return str((await server.identity())["type"])
