"""How long one all-reduce takes: every communicator, beside PyTorch's own over gloo.

Two ranks meet at a barrier and exchange. What counts is the time from the moment when the last
rank began to the moment when the last rank held the total; of many exchanges the median. Beginning
is calling ``publish`` and ending is the return of ``collect``: filling the slots is not part of it,
as filling the tensor is not part of PyTorch's ``all_reduce``. The serial communicator has one rank.
"""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from dask_nn.collectives.make import make_communicator
from dask_nn.testing.gangs import ProcessGang, ThreadGang

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dask_nn.collectives.base import Communicator
    from dask_nn.collectives.rendezvous import Rendezvous
    from dask_nn.testing.gangs import Gang

__all__ = ["COMMUNICATORS", "SIZES_BYTES", "TORCH", "Latency", "measure_latencies"]

COMMUNICATORS = ("serial", "threads", "shared_memory", "gloo")
TORCH = "torch gloo"
# Bytes of float32, and how often they are exchanged.
SIZES_BYTES = {4_000: 2_000, 400_000: 500, 4_000_000: 100, 100_000_000: 8}
QUICK_SHARE = 0.1
WARM_UP_SHARE = 0.2
MIN_EXCHANGES = 3
ELEMENT_BYTES = 4
RENDEZVOUS_S = 30.0
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The median time of one all-reduce of so many bytes between so many ranks."""

    communicator: str
    size_bytes: int
    num_ranks: int
    num_exchanges: int
    median_s: float


class Exchange(ABC):
    """One rank's part in an all-reduce of ones or zeros."""

    @abstractmethod
    def prepare(self, num_elements: int) -> None:
        """Make and fill the buffers."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for the other ranks."""

    @abstractmethod
    def run(self) -> None:
        """Add up the buffers of all ranks."""

    @abstractmethod
    def refill(self) -> None:
        """Make ready for the next exchange."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything."""


class OwnExchange(Exchange):
    """A communicator of this package."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def prepare(self, num_elements: int) -> None:
        """Open the communicator, one shard for each rank."""
        self._communicator.open(
            shards=self._communicator.world_size,
            leaf_size=num_elements,
            dtype=torch.float32,
            device=CPU,
        )
        self.refill()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self._communicator.barrier()

    def run(self) -> None:
        """Publish and collect."""
        self._communicator.publish()
        self._total = self._communicator.collect()

    def refill(self) -> None:
        """Fill the slots with ones, as a rank's gradients would; check the total before."""
        if hasattr(self, "_total"):
            expected = float(self._communicator.world_size)
            assert self._total[0] == self._total[-1] == expected, "the total is wrong"
        for slot in self._communicator.slots():
            slot.fill_(1.0)

    def close(self) -> None:
        """Close the communicator."""
        self._communicator.close()


class TorchExchange(Exchange):
    """PyTorch's default process group, over gloo on the loopback interface."""

    def __init__(self, rank: int, world_size: int, rendezvous: Rendezvous) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        host = "127.0.0.1"
        if rank == 0:
            store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
            rendezvous.set("port", str(store.port).encode())
        else:
            port = int(rendezvous.get("port", timeout_s=RENDEZVOUS_S))
            store = TCPStore(host, port, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    def prepare(self, num_elements: int) -> None:
        """Make zeros, whose sum over and over stays what it is."""
        self._tensor = torch.full((num_elements,), 0.0)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        dist.barrier()

    def run(self) -> None:
        """Add up in place."""
        dist.all_reduce(self._tensor)

    def refill(self) -> None:
        """Touch the buffer, as the next gradients would."""
        self._tensor.fill_(0.0)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def make_exchange(
    rank: int, world_size: int, rendezvous: Rendezvous, options: dict[str, Any]
) -> Any:
    """Make one rank's exchange, in its own process or thread."""
    if options["name"] == TORCH:
        return TorchExchange(rank, world_size, rendezvous)
    return OwnExchange(
        make_communicator(rank=rank, world_size=world_size, rendezvous=rendezvous, **options)
    )


def time_exchanges(exchange: Any, num_elements: int, warm_ups: int, repeats: int) -> list[Any]:
    """Exchange over and over; return begin and end of each in nanoseconds of the host's clock."""
    torch.set_num_threads(1)
    exchange.prepare(num_elements)
    times = []
    for _ in range(warm_ups + repeats):
        exchange.barrier()
        begin = perf_counter_ns()
        exchange.run()
        times.append((begin, perf_counter_ns()))
        exchange.refill()
    exchange.barrier()
    return times[warm_ups:]


def measure_latencies(
    *, quick: bool, on_latency: Callable[[Latency], None] = lambda _: None
) -> list[Latency]:
    """Measure all communicators at all sizes, one after the other."""
    found = []
    threads = ThreadGang(make_exchange)
    with ProcessGang(make_exchange) as processes:
        for size_bytes, full in SIZES_BYTES.items():
            repeats = max(MIN_EXCHANGES, int(full * QUICK_SHARE)) if quick else full
            for name in (*COMMUNICATORS, TORCH):
                gang = threads if name in {"serial", "threads"} else processes
                latency = _measure(gang, name, size_bytes, repeats)
                on_latency(latency)
                found.append(latency)
    return found


def _measure(gang: Gang, name: str, size_bytes: int, repeats: int) -> Latency:
    world_size = 1 if name == "serial" else 2
    warm_ups = max(2, int(repeats * WARM_UP_SHARE))
    options: dict[str, Any] = {"name": name}
    if name != TORCH:
        options["gang"] = uuid.uuid4().hex
    outcomes = gang.run(
        world_size,
        time_exchanges,
        size_bytes // ELEMENT_BYTES,
        warm_ups,
        repeats,
        **options,
    )
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return Latency(
        communicator=name,
        size_bytes=size_bytes,
        num_ranks=world_size,
        num_exchanges=repeats,
        median_s=median(durations_s([outcome.value for outcome in outcomes])),
    )


def durations_s(ranks: Sequence[Iterable[tuple[int, int]]]) -> list[float]:
    """Give last begin to last end of each exchange; ranks of a host share the clock."""
    return [
        (max(end for _, end in times) - max(begin for begin, _ in times)) * 1e-9
        for times in zip(*ranks, strict=True)
    ]
