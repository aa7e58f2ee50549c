"""Why a scheduler does not answer: nobody there, another protocol, or TLS on one side only."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

from distributed.comm import parse_address, parse_host_port

from dask_nn.diagnosis import links
from dask_nn.diagnosis.facts import ClusterFacts

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import TLSFault

__all__ = ["silent_scheduler", "why_silent"]

CONNECT_TIMEOUT_S = 3.0
ENCRYPTED = {"tls", "wss"}
# The records with which a server answers a greeting, and the first byte of TLS's versions.
ALERT, HANDSHAKE, MAJOR_VERSION = 21, 22, 3
HEADER_BYTES = 5
# What Distributed says before it has connected at all.
NO_CERTIFICATES = "ssl_context"
REQUIRED = "encryption required"
# What it says where either side does not take the other's certificate.
REFUSED = ("SSL", "TLS", "certificate", "reset", "closed")


def silent_scheduler(
    address: str, reason: str = "", timeout_s: float = CONNECT_TIMEOUT_S
) -> ClusterFacts:
    """Find out why nobody could connect to a scheduler.

    Parameters
    ----------
    address : str
        As it was given.
    reason : str
        What the attempt to connect said.
    timeout_s : float
        How long to wait for an answer, in seconds.
    """
    problem, tls = asyncio.run(why_silent(address, reason, timeout_s))
    return ClusterFacts(address=address, problem=problem, tls=tls)


async def why_silent(
    address: str, reason: str = "", timeout_s: float = CONNECT_TIMEOUT_S
) -> tuple[str, TLSFault]:
    """Say why a scheduler does not answer, and what TLS has to do with it."""
    if refused := await links.refusal(address, timeout_s):
        return refused, ""
    if REQUIRED in reason:
        return reason, "required"
    if fault := _tls_fault(address, reason, speaks_tls=await _speaks_tls(address, timeout_s)):
        return fault
    known = f" ({reason})" if reason else ""
    return f"something {links.UNANSWERED} as a Dask scheduler does{known}", ""


def _tls_fault(
    address: str, reason: str, *, speaks_tls: bool | None
) -> tuple[str, TLSFault] | None:
    if parse_address(address)[0] not in ENCRYPTED:
        return ("it speaks TLS, and is addressed without", "spoken") if speaks_tls else None
    if speaks_tls is False:
        return "it does not speak TLS", "not spoken"
    if NO_CERTIFICATES in reason:
        return f"this client has no certificates for TLS ({reason})", "no certificates"
    if speaks_tls and any(word in reason for word in REFUSED):
        return f"it speaks TLS, but not with the certificates of this client ({reason})", "refused"
    return None


async def _speaks_tls(address: str, timeout_s: float) -> bool | None:
    """Greet a port as a TLS client would, and look what it answers; None if that is nothing.

    A Dask server without TLS speaks first, so that it is told at once.
    """
    writer = None
    with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        host, port = parse_host_port(parse_address(address)[1])
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(_greeting(host))
            kind, version, *_, high, low = await reader.readexactly(HEADER_BYTES)
        writer.close()
        return kind in {ALERT, HANDSHAKE} and version == MAJOR_VERSION and bool(high or low)
    if writer is not None:
        writer.close()
    return None


def _greeting(host: str) -> bytes:
    sent = ssl.MemoryBIO()
    # No answer is fed to it, so nothing is trusted.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        ssl.MemoryBIO(), sent, server_hostname=host
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()
