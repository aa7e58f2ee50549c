"""Which communicator a gang uses."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NAMES", "RankPlace", "choose", "host_sizes", "possible"]

NAMES = (
    "serial",
    "threads",
    "shared_memory",
    "shared_memory+gloo",
    "shared_memory+dask",
    "gloo",
    "dask",
    "nccl",
)
# The flags of shared memory rely on stores becoming visible in the order they were made, which
# these processors promise and others do not.
ORDERED_STORES = frozenset({"x86_64", "AMD64"})


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where one rank runs.

    Parameters
    ----------
    host : str
        Equal for ranks that can share memory.
    process : int
        Process id on that host.
    machine : str
        Processor architecture, as ``platform.machine()`` names it.
    encrypted : bool
        Whether the cluster encrypts what its processes say to each other.
    """

    host: str
    process: int
    machine: str = platform.machine()
    encrypted: bool = False


def host_sizes(places: Sequence[RankPlace]) -> tuple[int, ...]:
    """Count the ranks on each host, in the order of ranks; a host that comes twice counts twice."""
    return tuple(len(list(ranks)) for _, ranks in groupby(places, key=lambda place: place.host))


def possible(places: Sequence[RankPlace], *, device: str = "cpu") -> dict[str, str]:
    """Tell which communicators can connect ranks at these places.

    Parameters
    ----------
    places : sequence of RankPlace
        One for each rank.
    device : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    dict of str to str
        From every name to the reason why it cannot; empty text where it can. The first that can
        is the best.
    """
    num_hosts = len({place.host for place in places})
    sizes = host_sizes(places)
    one_process = num_hosts == 1 and len({place.process for place in places}) == 1
    encrypted = any(place.encrypted for place in places)

    host_memory = "" if device == "cpu" else f"its leaves lie in host memory, not on {device!r}"
    if not host_memory and not all(place.machine in ORDERED_STORES for place in places):
        host_memory = "these processors do not order their stores"
    one_host = "" if num_hosts == 1 else f"the ranks are on {num_hosts} hosts"
    levels = "" if num_hosts > 1 else "the ranks are on one host"
    if num_hosts != len(sizes):
        levels = levels or "the ranks of a host do not follow each other"
    if max(sizes) == 1:
        levels = levels or "no host has more than one rank"
    # These listen without asking who calls, too, so that one host alone is no excuse for gloo.
    clear = "it does not encrypt, and this cluster's workers talk over TLS" if encrypted else ""
    cuda = "" if device == "cuda" else f"its leaves lie on GPUs, not on {device!r}"
    reasons = {
        "serial": "" if len(places) == 1 else f"there are {len(places)} ranks",
        "nccl": cuda or (one_host and clear),
        "threads": host_memory or one_host or ("" if one_process else "there are many processes"),
        "shared_memory": host_memory or one_host,
        "shared_memory+gloo": host_memory or levels or clear,
        "gloo": clear,
        "shared_memory+dask": host_memory or levels,
        "dask": "",
    }
    if encrypted:
        # On one host nobody else sees NCCL's data, but it listens: for those who ask for it.
        reasons["nccl"] = reasons.pop("nccl")
    return reasons


def choose(places: Sequence[RankPlace], *, device: str = "cpu", wanted: str | None = None) -> str:
    """Name the communicator for ranks at these places.

    Parameters
    ----------
    places : sequence of RankPlace
        One for each rank.
    device : str
        ``"cpu"`` or ``"cuda"``.
    wanted : str, optional
        A name that the user asked for; refused where it cannot work.

    Raises
    ------
    ConfigurationError
        If the wanted communicator is unknown or cannot connect these ranks.
    """
    reasons = possible(places, device=device)
    able = [name for name, reason in reasons.items() if not reason]
    if wanted is None:
        return able[0]
    if wanted not in reasons:
        message = f"collective must be one of {', '.join(NAMES)}, got {wanted!r}"
        raise ConfigurationError(message)
    if reasons[wanted]:
        message = (
            f"collective {wanted!r} cannot connect these {len(places)} ranks on "
            f"{len({place.host for place in places})} host(s): {reasons[wanted]}; "
            f"possible here: {', '.join(able)}"
        )
        raise ConfigurationError(message)
    return wanted
