"""Defaults of dask-nn, read from ``dask.config`` in this one place.

An argument beats ``dask.config`` (its files and ``DASK_DASK_NN__*`` variables), which beats the
defaults below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.config
from dask.utils import parse_bytes, parse_timedelta

from dask_nn.errors import ConfigurationError

__all__ = ["Settings", "settings"]

DEFAULTS = {
    # Rows are shuffled among so many blocks of a shard at a time.
    "window": 10,
    # NumPy arrays are cut into blocks of about so many bytes of X.
    "block-size": "2 MiB",
    # A rank waits so long for its peers before it gives up.
    "exchange-timeout": "10 minutes",
    # Forming a gang (tasks started, memory mapped, groups connected) may take so long.
    "start-timeout": "2 minutes",
    # A run waits so long for another one that trains on the same workers.
    "queue-timeout": "1 day",
    # Rank 0 reports at most so often.
    "progress-interval": "200 ms",
    # Buffers above this size are reduced slice by slice, each rank owning one slice.
    "slice-above": "1 MiB",
    # The communicator of a gang; "auto" takes the best that can connect its ranks.
    "collective": "auto",
}


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "window": int,
    "block-size": parse_bytes,
    "slice-above": parse_bytes,
    "collective": str,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values in force.

    Parameters
    ----------
    window : int
        Blocks among which a shard shuffles.
    block_size_bytes : int
        Target size of the blocks that NumPy arrays are cut into.
    exchange_timeout_s : float
        Deadline of a wait for peers, in seconds.
    start_timeout_s : float
        Deadline for forming a gang, in seconds.
    queue_timeout_s : float
        How long to wait for another run on the same workers, in seconds.
    progress_interval_s : float
        Least time between two progress reports, in seconds.
    slice_above_bytes : int
        Buffers above this size are reduced by owner-slice.
    collective : str or None
        Name of the communicator that the user asks for; None for the best.
    """

    window: int
    block_size_bytes: int
    exchange_timeout_s: float
    start_timeout_s: float
    queue_timeout_s: float
    progress_interval_s: float
    slice_above_bytes: int
    collective: str | None = None


def settings() -> Settings:
    """Read the settings that are in force now.

    Raises
    ------
    ConfigurationError
        If a value of the ``dask-nn`` section cannot be understood; names the key.
    """
    values = {}
    for key, default in DEFAULTS.items():
        value = dask.config.get(f"dask-nn.{key}", default)
        parse: Callable[[Any], Any] = _PARSERS.get(key, parse_timedelta)
        try:
            values[key] = parse(value)
        except (TypeError, ValueError, KeyError) as error:
            message = f"dask-nn.{key} is {value!r}, expected something like {default!r}: {error}"
            raise ConfigurationError(message) from error
        if not isinstance(values[key], str) and values[key] <= 0:
            message = f"dask-nn.{key} must be positive, got {value!r}"
            raise ConfigurationError(message)
    return Settings(
        window=values["window"],
        block_size_bytes=values["block-size"],
        exchange_timeout_s=values["exchange-timeout"],
        start_timeout_s=values["start-timeout"],
        queue_timeout_s=values["queue-timeout"],
        progress_interval_s=values["progress-interval"],
        slice_above_bytes=values["slice-above"],
        collective=None if values["collective"] == "auto" else values["collective"],
    )
