"""Which workers get a rank, and with how many threads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dask_nn.data.memory import PROCESS_SHARE
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Seating", "WorkerFacts", "seat_ranks"]

# Schemes of addresses.
ENCRYPTED = frozenset({"tls", "wss"})


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a worker says of itself.

    Parameters
    ----------
    address : str
        Its Dask address.
    host : str
        Equal for workers that can share memory.
    process : int
        Its process id on that host.
    machine : str
        Processor architecture.
    cores : int
        Cores of the host that it may use, after affinity and cgroup limits.
    threads : int
        Its own Dask threads.
    memory_bytes : int
        Its memory limit; 0 if it has none.
    used_bytes : int
        What its process takes already, besides the data that it holds.
    num_gpus : int
        CUDA devices that it sees.
    versions : dict of str to str
        Of python, torch, dask, distributed and dask_nn; empty text where one is missing.
    """

    address: str
    host: str
    process: int
    machine: str
    cores: int
    threads: int
    memory_bytes: int
    used_bytes: int = 0
    num_gpus: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def encrypted(self) -> bool:
        """Whether Dask encrypts what is said to this worker."""
        return self.address.partition("://")[0] in ENCRYPTED

    @property
    def room_bytes(self) -> int | None:
        """What data may take in this worker, before Dask would pause it; None without a limit."""
        if not self.memory_bytes:
            return None
        return max(0, int(self.memory_bytes * PROCESS_SHARE) - self.used_bytes)


@dataclass(frozen=True, kw_only=True)
class Seating:
    """The workers that run ranks 0, 1, ..., and the intra-op threads of each."""

    workers: tuple[WorkerFacts, ...]
    threads_per_rank: int

    @property
    def addresses(self) -> list[str]:
        """The workers' addresses, by rank."""
        return [worker.address for worker in self.workers]


def seat_ranks(
    workers: Sequence[WorkerFacts],
    *,
    shards: int,
    threads_per_rank: int | None = None,
    device: str = "cpu",
) -> Seating:
    """Choose the workers of a gang: never more ranks on a host than it has cores for.

    Ranks of one host follow each other. Workers beyond a host's cores run no rank; they hold
    and serve blocks.

    Parameters
    ----------
    workers : sequence of WorkerFacts
        All workers of the cluster.
    shards : int
        No more ranks than shards.
    threads_per_rank : int, optional
        What the user wants; by default a host's cores divided by its ranks, at most the worker's
        own threads, and the same for all ranks.
    device : str
        With ``"cuda"`` a host has as many ranks as its workers see devices.

    Raises
    ------
    ConfigurationError
        If no worker can run a rank.
    """
    by_host: dict[str, list[WorkerFacts]] = defaultdict(list)
    for worker in sorted(workers, key=lambda worker: (worker.host, worker.address)):
        by_host[worker.host].append(worker)
    chosen: list[WorkerFacts] = []
    limits = []
    for host_workers in by_host.values():
        cores = max(worker.cores for worker in host_workers)
        if device == "cuda":
            able = [worker for worker in host_workers if worker.num_gpus]
        else:
            able = host_workers[: max(1, cores // (threads_per_rank or 1))]
        able = able[: shards - len(chosen)]
        if able:
            limits.append(max(1, cores // len(able)))
            chosen += able
    if not chosen:
        message = (
            f"no worker of {len(workers)} can run a rank on device {device!r}; "
            "start workers that see a CUDA device, or use device='cpu'"
        )
        raise ConfigurationError(message)
    if threads_per_rank is None:
        threads_per_rank = min([*limits, *(max(1, worker.threads) for worker in chosen)])
    return Seating(workers=tuple(chosen), threads_per_rank=threads_per_rank)
