"""Options of a local cluster, looked at before anything starts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from distributed import LocalCluster, Nanny, Worker

from dask_nn.clusters.graphics_cards import check_cards, visible_cards
from dask_nn.clusters.known_names import refuse_unknown
from dask_nn.clusters.option_types import (
    MAPPING,
    NUMBER,
    OF_SCHEDULERS,
    OF_WORKERS,
    PORT,
    SWITCH,
    TEXT,
    check_types,
)
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_request"]

# Chosen by what is asked of every kind of cluster, or by local_cluster itself.
OF_THE_REQUEST = {
    *("self", "args", "kwargs", "worker_kwargs", "n_workers", "threads_per_worker", "nthreads"),
    *("security", "env", "preload", "local_directory", "silence_logs", "asynchronous", "loop"),
    *("start", "ip", "workers", "worker", "scheduler", "scheduler_ip", "scheduler_file"),
}

TYPES = {
    **OF_WORKERS.keys,
    "close_timeout_s": NUMBER,
    "processes": SWITCH,
    "scheduler_kwargs": OF_SCHEDULERS,
    "scheduler_port": PORT,
    "service_kwargs": MAPPING,
    "worker_dashboard_address": TEXT,
}


def check_request(request: ClusterRequest) -> None:
    """Check the options, before anything starts.

    Raises
    ------
    ConfigurationError
        If one is unknown, needs processes where workers are threads, or asks for more GPUs than
        there are.
    """
    worker_class = request.options.get("worker_class")
    known = {"close_timeout_s"}
    for kind in (LocalCluster, Nanny, Worker, *filter(inspect.isclass, [worker_class])):
        for part in kind.__mro__:
            if (made_with := vars(part).get("__init__")) is not None:
                known |= set(inspect.signature(made_with).parameters)
    known -= OF_THE_REQUEST
    refuse_unknown(
        request.options, sorted(known), of="LocalCluster and its workers have", listed=False
    )
    check_types(request.options, TYPES)
    if request.options.get("processes") is False:
        for name in ("env", "gpus"):
            if getattr(request, name):
                raise ConfigurationError(
                    f"{name} needs workers in processes of their own, and processes=False makes "
                    "them threads of this process; leave either out"
                )
    if request.gpus:
        most = request.adapt[1] if request.adapt else request.workers
        check_cards(most or 1, visible_cards())
