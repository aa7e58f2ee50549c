"""Can one process of a cluster reach the others, and how fast? Over Dask's own connections.

Sent to schedulers and workers as text, as `probe` is. Every Dask server answers ``echo``, so
nothing has to be installed for it, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["measure_speed", "refusal", "try_links"]

ECHOES = 5
UNANSWERED = "accepts connections and does not answer"


async def try_links(
    addresses: Sequence[str], timeout_s: float, at_once: int = 32, dask_worker: Any = None
) -> dict[str, dict[str, Any]]:
    """Connect to addresses, and say of each what came of it.

    Returns
    -------
    dict
        From address to ``{"latency_s": ...}``, or ``{"problem": ..., "connected": bool}``.
    """
    gate = asyncio.Semaphore(at_once)

    async def one(address: str) -> dict[str, Any]:
        async with gate:
            return await _try_link(dask_worker, address, timeout_s)

    results = await asyncio.gather(*[one(address) for address in addresses])
    return dict(zip(addresses, results))  # noqa: B905 - no older Python knows strict=


async def measure_speed(
    address: str, size_bytes: int, timeout_s: float, dask_worker: Any = None
) -> float:
    """Send bytes to an address and back; give bytes per second of one direction, 0 if that fails.

    The bytes are random, so that no compression helps.
    """
    from distributed.protocol import to_serialize

    comm = None
    data = os.urandom(size_bytes)
    deadline = time.monotonic() + timeout_s
    try:
        comm = await _open(dask_worker, address, timeout_s)
        best = 0.0
        for _ in range(2):  # the first opens the connection's window
            began = time.monotonic()
            await asyncio.wait_for(
                _ask(comm, {"op": "echo", "data": to_serialize(data), "reply": True}),
                max(0.01, deadline - began),
            )
            best = max(best, 2 * size_bytes / (time.monotonic() - began))
    except Exception:
        return 0.0
    finally:
        if comm is not None:
            comm.abort()
    return best


async def _try_link(server: Any, address: str, timeout_s: float) -> dict[str, Any]:
    comm = None
    try:
        comm = await _open(server, address, timeout_s)
        return {"latency_s": await asyncio.wait_for(_latency(comm), timeout_s)}
    except Exception as error:
        refused = "" if comm is not None else await refusal(address, timeout_s)
        return {"problem": refused or _unanswered(error), "connected": not refused}
    finally:
        if comm is not None:
            comm.abort()


async def _open(server: Any, address: str, timeout_s: float) -> Any:
    """Connect anew, as this server connects: with its TLS settings, from its own address."""
    from distributed.comm import connect

    arguments = dict(getattr(server.rpc, "connection_args", None) or {})
    return await asyncio.wait_for(connect(address, timeout=timeout_s, **arguments), timeout_s + 1)


async def refusal(address: str, timeout_s: float) -> str:
    """Say why a port accepts no connection at all; empty if it does."""
    from distributed.comm import parse_host_port
    from distributed.comm.addressing import parse_address

    try:
        scheme, place = parse_address(address)
        if scheme not in ("tcp", "tls", "ws", "wss"):
            return ""
        opened = asyncio.open_connection(*parse_host_port(place))
        _, writer = await asyncio.wait_for(opened, timeout_s)
    except asyncio.TimeoutError:  # noqa: UP041 - another class before Python 3.11
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    except Exception as error:
        return str(error)
    writer.close()
    return ""


async def _latency(comm: Any) -> float:
    best = float("inf")
    for _ in range(ECHOES):
        began = time.monotonic()
        await _ask(comm, {"op": "echo", "data": 0, "reply": True})
        best = min(best, time.monotonic() - began)
    return best / 2


async def _ask(comm: Any, message: dict[str, Any]) -> Any:
    await comm.write(message)
    answer = await comm.read()
    if isinstance(answer, dict) and answer.get("status") in ("error", "uncaught-error"):
        raise OSError(str(answer.get("text") or answer))
    return answer


def _unanswered(error: BaseException | None) -> str:
    """Say what is wrong with a server that accepts connections: the innermost cause knows."""
    texts = []
    while error is not None:
        texts += [line for line in str(error).strip().splitlines()[:1] if line]
        error = error.__cause__
    return UNANSWERED + (f" ({texts[-1]})" if texts else "")
