"""What is known of a cluster before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Clock", "ClusterFacts", "DataFacts", "Link", "ProcessFacts", "TLSFault"]

TLSFault = Literal["", "no certificates", "spoken", "not spoken", "refused", "required"]


@dataclass(frozen=True, kw_only=True)
class ProcessFacts:
    """What a client, a scheduler or a worker says of itself.

    Parameters
    ----------
    address : str
        Its Dask address; empty for a client.
    hostname : str
        Of its host or container.
    machine : str
        Equal for processes that share processors and memory.
    network : str
        Its network namespace.
    process : int
        Its process id.
    versions, problems : dict of str to str
        Of packages, without those that are missing; and why modules cannot be imported.
    spared : bool
        PyTorch was not imported, because the memory limit would have ended the process.
    threads, cores : int
        Dask's threads, and the cores that affinity mask and control group allow.
    torch_threads : int
        Intra-op threads of PyTorch; 0 where it is not loaded.
    environment : dict of str to str
        The variables that matter.
    memory_limit_bytes, used_bytes, host_memory_bytes : int
        Dask's limit (0 without one), what the process takes, and what the host has.
    shared_bytes, shared_free_bytes : int or None
        Size of ``/dev/shm``; None where there is none.
    shared_place : str
        Equal for processes that see the same ``/dev/shm``.
    scratch_folder, scratch_free_bytes : str, int or None
        Where Dask spills, and its free space.
    libc, allocator : str
        The C library, and what took its allocator's place.
    processor, architecture, capability : str
        The CPU's name, its architecture, and the level at which PyTorch dispatches kernels.
    gpus : list of dict
        uuid, name and memory of the graphics cards that the driver shows.
    cuda, nccl, num_cuda_devices : str, bool, int
        PyTorch's CUDA version (empty without), whether it has nccl, and the devices it sees.
    torch_problem : str
        What asking PyTorch raised.
    interfaces : list of dict
        name, addresses and mbit_per_s of the network interfaces that are up, and whether each is
        virtual: that of containers or a tunnel, without a device below it.
    ends_at_s : dict of str to float
        When the process will be ended, by source, in seconds since 1970.
    """

    address: str = ""
    hostname: str = ""
    machine: str = ""
    network: str = ""
    process: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    spared: bool = False
    threads: int = 0
    cores: int = 1
    torch_threads: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    memory_limit_bytes: int = 0
    used_bytes: int = 0
    host_memory_bytes: int = 0
    shared_bytes: int | None = None
    shared_free_bytes: int | None = None
    shared_place: str = ""
    scratch_folder: str = ""
    scratch_free_bytes: int | None = None
    libc: str = ""
    allocator: str = ""
    processor: str = ""
    architecture: str = ""
    capability: str = ""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    cuda: str = ""
    nccl: bool = False
    num_cuda_devices: int = 0
    torch_problem: str = ""
    interfaces: list[dict[str, Any]] = field(default_factory=list)
    ends_at_s: dict[str, float] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """Equal for workers whose ranks share memory, as a run tells it (see worker_side)."""
        return "|".join(filter(None, (self.machine, self.shared_place, self.network)))


@dataclass(frozen=True, kw_only=True)
class Link:
    """One attempt to reach a process from another one.

    Parameters
    ----------
    source, target : str
        Addresses.
    latency_s : float or None
        Half of the shortest round trip.
    problem : str
        Why there was none.
    connected : bool
        Whether the port accepted the connection.
    """

    source: str
    target: str
    latency_s: float | None = None
    problem: str = ""
    connected: bool = True


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a clock is ahead of the client's, give or take half the round trip."""

    offset_s: float
    error_s: float


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """How a data set is cut.

    Parameters
    ----------
    lengths : tuple of int
        Rows of each block; empty where they are unknown.
    num_blocks : int
        Blocks along the rows.
    fields : dict of str to str
        Arrays by name, as type and shape of a row.
    row_bytes : int
        Size of one row of all arrays; 0 where it is unknown.
    rows_held : dict of str to int or None
        Rows in the memory of each worker; None for data that is not held yet.
    problem : str
        Why it cannot be read.
    places_problem : str
        Why it is not known who holds it.
    """

    lengths: tuple[int, ...] = ()
    num_blocks: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    row_bytes: int = 0
    rows_held: dict[str, int] | None = None
    problem: str = ""
    places_problem: str = ""


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """Everything that the checks look at.

    Parameters
    ----------
    address : str
        The scheduler's.
    not_started : str
        Why the cluster did not start; of all else its kind and the data alone are known then.
    kind : str
        Of a cluster that was to be started, as `dask_nn.cluster` names it.
    problem : str
        Why the scheduler does not answer; nothing else but the data is known then.
    tls : str
        What TLS has to do with that: this client has no certificates for it, it is spoken at an
        address without, not spoken at one with it, refused, or required here; or empty.
    latency_s : float
        Of one message to the scheduler, there and back.
    client : ProcessFacts
        This process.
    scheduler : ProcessFacts or None
        None where it may not be asked.
    registered : tuple of str
        Addresses of all workers that the scheduler knows.
    workers : tuple of ProcessFacts
        Those that answered.
    silent : dict of str to str
        Why the others did not.
    reached : dict of str to Link
        What came of the scheduler's connections to workers.
    links : tuple of Link
        Connections between workers, and from them to the scheduler.
    speeds : dict of (str, str) to float
        Bytes per second from worker to worker; 0 where the transfer did not end in time.
    clocks : dict of str to Clock
        By address.
    fingerprints : dict of str to str
        What one fixed batch gives on each worker, and on the client under an empty address.
    fingerprint_errors, fingerprints_unknown : dict of str to str
        What computing it raised instead; and why there is no answer.
    dashboard : str
        Its link; empty without one.
    dashboard_problem : str
        Why it could not be read.
    data : DataFacts or None
        None if no data was given.
    now_s : float
        The client's time, in seconds since 1970.
    parameters : int
        Size of the model to make room for.
    gpus : int
        GPUs of each worker that were asked for: 0 or 1.
    timeout_s : float
        How long an answer was waited for.
    """

    address: str
    not_started: str = ""
    kind: str = ""
    problem: str = ""
    tls: TLSFault = ""
    latency_s: float = 0.0
    client: ProcessFacts = field(default_factory=ProcessFacts)
    scheduler: ProcessFacts | None = None
    registered: tuple[str, ...] = ()
    workers: tuple[ProcessFacts, ...] = ()
    silent: dict[str, str] = field(default_factory=dict)
    reached: dict[str, Link] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    speeds: dict[tuple[str, str], float] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    fingerprint_errors: dict[str, str] = field(default_factory=dict)
    fingerprints_unknown: dict[str, str] = field(default_factory=dict)
    dashboard: str = ""
    dashboard_problem: str = ""
    data: DataFacts | None = None
    now_s: float = 0.0
    parameters: int = 10_000_000
    gpus: int = 0
    timeout_s: float = 60.0

    @property
    def machines(self) -> dict[str, list[ProcessFacts]]:
        """Workers by the machine that they run on, whose processors and memory they share."""
        return _grouped((worker.machine, worker) for worker in self.workers)

    @property
    def hosts(self) -> dict[str, list[ProcessFacts]]:
        """Workers by host, as a run counts them: one machine may have several containers."""
        return _grouped((worker.host, worker) for worker in self.workers)

    @property
    def places(self) -> set[tuple[str, str]]:
        """Machines and networks of all processes that are known: workers, scheduler, client."""
        processes = (*self.workers, self.client, *filter(None, (self.scheduler,)))
        return {(found.machine, found.network) for found in processes if found.machine}


def _grouped(pairs: Iterable[tuple[str, ProcessFacts]]) -> dict[str, list[ProcessFacts]]:
    found: dict[str, list[ProcessFacts]] = {}
    for name, worker in pairs:
        found.setdefault(name, []).append(worker)
    return found
