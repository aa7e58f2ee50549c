"""Connect to a scheduler that is already running."""

from __future__ import annotations

import asyncio
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from distributed import Client, Security
from distributed.core import rpc
from distributed.utils import LoopRunner

from dask_nn.clusters.quiet import quiet_distributed
from dask_nn.errors import ClusterError, ConfigurationError, SchedulerUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_request", "connect", "open_cluster"]


CONNECT_TIMEOUT_S = 10.0


def connect(
    address: str, timeout_s: float = CONNECT_TIMEOUT_S, *, security: Security | None = None
) -> Client:
    """Open a client of the scheduler at an address.

    Parameters
    ----------
    address : str
        Such as ``"tcp://10.0.0.5:8786"``; without a protocol TCP is meant.
    timeout_s : float, default 10
        How long to wait for an answer, in seconds.
    security : distributed.Security, optional
        The certificates of a scheduler with TLS; as Dask's configuration says by default.

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
            kind = LoopRunner().run_sync(_kind, address, timeout_s, security or Security())
            if kind == "Scheduler":
                return Client(address, timeout=timeout_s, security=security)
    except Exception as error:
        # Also MemoryError: what another protocol says is read as the length of a message.
        raise _unreachable(address, timeout_s, _first_cause(error)) from error
    raise _unreachable(address, timeout_s, f"a Dask {kind.lower()} did")


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Use the running cluster of a request: ``options["address"]`` says where its scheduler is.

    Raises
    ------
    ConfigurationError
        If the address is missing, or what is asked for would mean to start workers.
    SchedulerUnreachable
        If nobody answers there.
    ClusterError
        If its workers are not there in time.
    """
    address = str(request.options["address"])
    security = request.security if isinstance(request.security, Security) else None
    given_s = request.start_timeout_s
    timeout_s = CONNECT_TIMEOUT_S if given_s is None else given_s
    with closing(connect(address, timeout_s, security=security)) as client:
        _wait_for(client, request)
        yield client


def check_request(request: ClusterRequest) -> None:
    """Check that there is an address, and that nothing is asked for that would start workers.

    Raises
    ------
    ConfigurationError
        If not.
    """
    address = request.options.get("address")
    if not isinstance(address, str):
        raise ConfigurationError(
            'cluster kind "address" needs address, the one that `dask scheduler` prints, such as '
            f'"tcp://10.0.0.5:8786"; got {address!r}'
        )
    asked = [name for name in request.options if name != "address"]
    asked += [name for name in ("adapt", "memory", "env") if getattr(request, name)]
    asked += ["cores"] * (request.cores != 1) + ["gpus"] * bool(request.gpus)
    if asked:
        raise ConfigurationError(
            f"cluster kind 'address' uses workers that run already, {', '.join(asked)} would start "
            "some: leave it out"
        )
    if request.security is True:
        raise ConfigurationError(
            "security=True makes new certificates, and the scheduler has its own; give a "
            "distributed.Security with those"
        )


def _wait_for(client: Client, request: ClusterRequest) -> None:
    if request.workers is None:
        return
    try:
        client.wait_for_workers(request.workers, timeout=request.timeout_s)
    except TimeoutError:
        info = client.scheduler_info(n_workers=-1)
        raise ClusterError(
            f"{len(info['workers'])} of {request.workers} workers were at {info['address']} within "
            f"{request.timeout_s:g} s; start more, or ask for less"
        ) from None


def _first_cause(error: BaseException | None) -> str:
    """Give what began it: those behind say that a call did not come through."""
    found = "no answer"
    while error is not None:
        if lines := str(error).strip().splitlines():
            found = lines[0]
        error = error.__cause__
    return found


def _unreachable(address: str, timeout_s: float, reason: str) -> SchedulerUnreachable:
    return SchedulerUnreachable(
        f"no Dask scheduler answered at {address!r} within {timeout_s:g} s ({reason}); expected "
        "the address that `dask scheduler` prints, such as tcp://10.0.0.5:8786",
        reason,
    )


async def _kind(address: str, timeout_s: float, security: Security) -> str:
    arguments = security.get_connection_args("client")
    async with (
        asyncio.timeout(timeout_s),
        rpc(address, timeout=timeout_s, connection_args=arguments) as server,
    ):
        return str((await server.identity())["type"])
