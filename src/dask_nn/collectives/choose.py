"""Which communicator a gang uses."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NAMES", "RankPlace", "choose"]

NAMES = ("serial", "threads", "shared_memory", "gloo", "nccl")
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
    """

    host: str
    process: int
    machine: str = platform.machine()


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
    one_host = len({place.host for place in places}) == 1
    one_process = one_host and len({place.process for place in places}) == 1
    ordered = all(place.machine in ORDERED_STORES for place in places)
    possible = {
        "serial": len(places) == 1,
        "nccl": device == "cuda",
        "threads": device == "cpu" and one_process and ordered,
        "shared_memory": device == "cpu" and one_host and ordered,
        "gloo": True,
    }
    if wanted is None:
        return next(name for name, works in possible.items() if works)
    if wanted not in possible:
        message = f"collective must be one of {', '.join(NAMES)}, got {wanted!r}"
        raise ConfigurationError(message)
    if not possible[wanted]:
        message = (
            f"collective {wanted!r} cannot connect {len(places)} ranks on "
            f"{len({place.host for place in places})} host(s) with device {device!r}; "
            f"possible here: {', '.join(name for name, works in possible.items() if works)}"
        )
        raise ConfigurationError(message)
    return wanted
