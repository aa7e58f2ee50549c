"""One function for every kind of cluster."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.hangups import heard_as_interrupts
from dask_nn.clusters.known_names import nearest
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distributed import Client, Security

__all__ = ["KINDS", "check_kind", "check_request", "cluster", "open_request"]

# The modules have `open_cluster(request)`, a context manager that yields a client; and where
# options can be checked before anything starts, `check_request(request)`.
_BATCH = "dask_nn.clusters.jobqueue"
KINDS = {
    "local": "dask_nn.clusters.local",
    "address": "dask_nn.clusters.connect",
    "ssh": "dask_nn.clusters.ssh",
    "slurm": _BATCH,
    "pbs": _BATCH,
    "lsf": _BATCH,
    "sge": _BATCH,
    "oar": _BATCH,
    "htcondor": _BATCH,
    "kubernetes": "dask_nn.clusters.kubernetes",
    "aws": "dask_nn.clusters.aws",
}
INSTEAD_OF_WALLTIME = {
    "kubernetes": "set activeDeadlineSeconds in worker_pod, or idle_timeout_s",
    "aws": "machines end with the cluster, or when they had nothing to do for the scheduler's "
    "idle_timeout",
}


@contextmanager
def cluster(
    kind: str = "local",
    *,
    workers: int | None = None,
    cores: int = 1,
    memory: str | None = None,
    adapt: tuple[int, int] | None = None,
    walltime: str | None = None,
    gpus: int = 0,
    security: Security | bool | None = None,
    env: Mapping[str, str] | None = None,
    preload: str | Sequence[str] = ("torch",),
    start_timeout_s: float | None = None,
    **options: Any,
) -> Iterator[Client]:
    """Run a cluster for the length of a ``with`` block.

    A fixed number of workers is kept: what a batch system ends is asked for again. On leaving
    the block, whatever the reason, jobs, processes and machines that were started are gone.

    Parameters
    ----------
    kind : str, default "local"
        ``"local"``, ``"ssh"``, ``"slurm"``, ``"pbs"``, ``"lsf"``, ``"sge"``, ``"oar"``,
        ``"htcondor"``, ``"kubernetes"``, ``"aws"``, or ``"address"`` for a scheduler that runs
        already.
    workers : int, optional
        Workers to start and to keep.
    cores : int, default 1
        Threads of each worker.
    memory : str, optional
        Memory of each worker, such as ``"16 GB"``.
    adapt : (int, int), optional
        Smallest and largest number of workers instead of a fixed one; Dask chooses by the load.
    walltime : str, optional
        How long a batch job may run.
    gpus : int, default 0
        GPUs of each worker: 0 or 1.
    security : distributed.Security or bool, optional
        TLS for everything that Dask sends; True makes temporary certificates.
    env : mapping, optional
        Environment variables of the workers.
    preload : str or sequence of str, default ("torch",)
        Modules that the workers import before they take work.
    start_timeout_s : float, optional
        How long to wait for the workers, in seconds: by default 600, and 10 for the answer of a
        scheduler that runs already.
    **options
        Keyword arguments of the library that starts this kind of cluster.

    Yields
    ------
    distributed.Client
        A client of the cluster, with its workers there; ``client.cluster.scale(n)`` and
        ``client.cluster.adapt(minimum=, maximum=)`` change their number.

    Raises
    ------
    ConfigurationError
        If a value cannot work, or the package for this kind of cluster is not installed.
    ClusterError
        If the workers did not come in time; with what the batch system says.
    """
    check_kind(kind)
    request = ClusterRequest(
        kind=kind,
        workers=workers,
        cores=cores,
        memory=memory,
        adapt=adapt,
        walltime=walltime,
        gpus=gpus,
        security=security,
        env=env or {},
        preload=preload,
        start_timeout_s=start_timeout_s,
        options=options,
    )
    with open_request(request) as client:
        yield client


@contextmanager
def open_request(request: ClusterRequest) -> Iterator[Client]:
    """Run the cluster that a request describes; see `cluster`."""
    check_request(request)
    if request.kind != "address":
        # A scheduler that runs already has its own certificates.
        request = request.with_certificates()
    opened = import_module(KINDS[request.kind]).open_cluster
    with heard_as_interrupts(), opened(request) as client:
        yield client


def check_request(request: ClusterRequest) -> None:
    """Refuse what cannot work, before anything is started.

    Raises
    ------
    ConfigurationError
        As `cluster`.
    """
    check_kind(request.kind)
    _check_walltime(request)
    check = getattr(import_module(KINDS[request.kind]), "check_request", None)
    if check is not None:
        check(request)


def _check_walltime(request: ClusterRequest) -> None:
    if request.walltime is not None and KINDS[request.kind] != _BATCH:
        instead = INSTEAD_OF_WALLTIME.get(request.kind, "leave it out")
        raise ConfigurationError(
            f"walltime is a limit of batch systems, and cluster kind {request.kind!r} is none; "
            f"{instead}"
        )


def check_kind(kind: Any) -> None:
    """Refuse an unknown kind of cluster.

    Raises
    ------
    ConfigurationError
        With the nearest kind that exists.
    """
    if not isinstance(kind, str):
        raise ConfigurationError(f'kind of cluster must be a text such as "slurm", got {kind!r}')
    if kind in KINDS:
        return
    raise ConfigurationError(f"unknown kind of cluster {kind!r}{nearest(kind, KINDS)}")
