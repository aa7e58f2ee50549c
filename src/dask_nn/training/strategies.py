"""How shards keep their weights equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dask_nn.errors import ConfigurationError

__all__ = ["Synchronous", "default_shards"]


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """Every step is one update from the gradient of the whole global batch.

    Parameters
    ----------
    shards : int, optional
        Logical data-parallel replicas. The weights depend on this number, not on how many workers
        compute them. By default the largest divisor of the batch size that is not above the
        number of ranks: of workers, but on a host no more than it has cores for.
    threads_per_rank : int, optional
        Intra-op threads of each rank; also part of what the bits depend on. By default the host's
        cores divided by its ranks, at most the worker's own threads.
    bitwise : bool
        Whether workers that compute other bits than the rest, and kernels whose bits vary from run
        to run, are refused. If not, the result says so.

    Raises
    ------
    ConfigurationError
        If a number is not positive.
    """

    name: ClassVar[str] = "synchronous"

    shards: int | None = None
    threads_per_rank: int | None = None
    bitwise: bool = True

    def __post_init__(self) -> None:
        for option in ("shards", "threads_per_rank"):
            value = getattr(self, option)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                message = f"{option} must be a positive integer or None, got {value!r}"
                raise ConfigurationError(message)


def default_shards(batch_size: int, ranks: int) -> int:
    """Give the largest divisor of the batch size that is not above the number of ranks."""
    candidates = range(min(max(1, ranks), batch_size), 0, -1)
    return next(shards for shards in candidates if batch_size % shards == 0)
