"""A cluster of worker processes on this machine that leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
from dask.system import cpu_count
from distributed import LocalCluster, Nanny
from distributed.deploy.cluster import Cluster

from dask_nn.clusters.dashboard_port import free_or_any, no_warning_of_busy_ports
from dask_nn.clusters.default_client import default_client
from dask_nn.clusters.graphics_cards import check_cards, give_a_card_to_each, visible_cards
from dask_nn.clusters.local_options import check_request
from dask_nn.clusters.loop import loop_blind_to_interrupts, see_through, start_in, stop
from dask_nn.clusters.quiet import quiet_distributed, warnings_of_distributed
from dask_nn.clusters.reason import first_reason_of
from dask_nn.clusters.shared_setting import SharedSetting
from dask_nn.clusters.worker_processes import WorkerProcesses
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distributed import Client, Security
    from distributed.utils import LoopRunner

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["available_cores", "check_request", "local_cluster", "open_cluster"]

# Scheduler, nannies and workers of one machine share its cores with the ranks. Sampling stacks and
# measuring event loops, a hundred times a second in each, would take a tenth of a small step.
FEW_WAKE_UPS = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
}
few_wake_ups = SharedSetting(partial(dask.config.set, FEW_WAKE_UPS))
# A scheduler that is being made, and imports its dashboard, keeps the event loop busy so long at
# most on a slow machine.
SETTLE_TIMEOUT_S = 30.0


def available_cores() -> int:
    """Count the cores that this process may use, by affinity mask and cgroup."""
    return int(cpu_count())


@contextmanager
def local_cluster(
    workers: int | None = None,
    threads_per_worker: int = 1,
    *,
    processes: bool = True,
    memory_limit: str | float | None = "auto",
    preload: Sequence[str] = ("torch",),
    dashboard_address: str | None = "127.0.0.1:8787",
    security: Security | bool | None = None,
    env: Mapping[str, str] | None = None,
    gpus: int = 0,
    start_timeout_s: float = 60,
    close_timeout_s: float = 0.5,
    **options: Any,
) -> Iterator[Client]:
    """Run a cluster on this machine for the length of a ``with`` block.

    Workers do not see Ctrl-C: a terminal sends it to the whole process group, and only the client
    shall decide what stops. On leaving the block, whatever the reason, all processes and the
    workers' scratch folder are gone.

    Parameters
    ----------
    workers : int, optional
        Worker processes; by default as many as there are cores, or GPUs with ``gpus=1``.
    threads_per_worker : int, default 1
        Threads in which each worker runs tasks.
    processes : bool, default True
        Workers in processes of their own, else in threads of this process.
    memory_limit : str, float or None, default "auto"
        Memory of each worker, as Dask understands it.
    preload : sequence of str, default ("torch",)
        Modules that the workers import before they take work.
    dashboard_address : str or None, default "127.0.0.1:8787"
        Where the dashboard listens; another port is taken where this one is busy.
    security : distributed.Security, optional
        TLS for everything that Dask sends.
    env : mapping, optional
        Environment variables of worker processes.
    gpus : int, default 0
        With 1, each worker sees one GPU alone, of those that this process may use.
    start_timeout_s : float, default 60
        How long to wait for the workers.
    close_timeout_s : float, default 0.5
        What is still alive so many seconds after the block ended is killed.
    **options
        Of ``distributed.LocalCluster``.

    Yields
    ------
    distributed.Client
        A client of the new cluster, with all its workers there.

    Raises
    ------
    ConfigurationError
        If a count is below 1, or there are fewer GPUs than workers.
    ClusterError
        If the workers do not start, or not in time.
    """
    cards = visible_cards() if gpus else []
    if workers is None:
        workers = max(1, len(cards)) if gpus else available_cores()
    for name, count in (("workers", workers), ("threads_per_worker", threads_per_worker)):
        if count < 1:
            message = f"{name} must be at least 1, got {count}"
            raise ConfigurationError(message)
    if gpus:
        check_cards(workers, cards)

    deadline = time.monotonic() + start_timeout_s
    scratch = tempfile.mkdtemp(prefix="dask-nn-")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings_of_distributed)
        heard = stack.enter_context(quiet_distributed())
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        processes_left = WorkerProcesses()
        stack.callback(processes_left.kill)
        runner = loop_blind_to_interrupts()
        stack.callback(stop, runner, close_timeout_s)
        made: list[LocalCluster] = []
        stack.push(partial(_close, runner, made, processes_left, close_timeout_s))
        with no_warning_of_busy_ports, few_wake_ups:
            making = start_in(
                runner,
                _make(
                    made,
                    processes_left,
                    n_workers=workers,
                    threads_per_worker=threads_per_worker,
                    processes=processes,
                    memory_limit=memory_limit,
                    local_directory=scratch,
                    scheduler_kwargs={
                        "local_directory": scratch,
                        **(options.pop("scheduler_kwargs", None) or {}),
                    },
                    dashboard_address=dashboard_address and free_or_any(dashboard_address),
                    # It would silence all handlers of this process, also where they are heard.
                    silence_logs=False,
                    security=security,
                    asynchronous=True,
                    **({"preload": list(preload)} if preload else {}),
                    **({"env": dict(env)} if processes and env else {}),
                    **options,
                ),
            )
            try:
                cluster = making.result()
            except (TypeError, ValueError, ImportError, AttributeError) as error:
                raise ConfigurationError(f"the local cluster cannot be made: {error}") from error
            if gpus:
                give_a_card_to_each(cluster, cards)
            started = start_in(runner, _started(cluster))
            try:
                started.result(start_timeout_s)
            except Exception as error:
                if isinstance(error, TimeoutError) and not started.done():
                    # A start that is cancelled half-way leaves a cluster that cannot be closed.
                    processes_left.kill()
                    wait([started], timeout=1)
                    raise _too_late(start_timeout_s) from None
                reason = first_reason_of(error)
                raise ClusterError(f"the local cluster did not start: {reason}") from error
        client = stack.enter_context(default_client(cluster))
        try:
            client.wait_for_workers(workers, timeout=max(0.1, deadline - time.monotonic()))
        except TimeoutError:
            raise _too_late(start_timeout_s) from None
        with heard():
            yield client


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Run the local cluster of a request.

    Raises
    ------
    ConfigurationError
        If an option cannot work.
    """
    options = dict(request.options)
    with local_cluster(
        request.wanted,
        request.cores,
        memory_limit=request.memory or options.pop("memory_limit", "auto"),
        preload=request.preload,
        security=request.security,
        env=request.env,
        gpus=request.gpus,
        start_timeout_s=request.timeout_s,
        **options,
    ) as client:
        if request.adapt:
            cluster: Any = client.cluster
            cluster.adapt(minimum=request.adapt[0], maximum=request.adapt[1])
        yield client


def _too_late(timeout_s: float) -> ClusterError:
    return ClusterError(
        f"the local cluster was not there within {timeout_s:g} s; wait longer (start_timeout_s=, "
        "--start-timeout), ask for fewer workers, or look what their preload waits for"
    )


async def _make(
    made: list[LocalCluster], processes_left: WorkerProcesses, **options: Any
) -> LocalCluster:
    if options["processes"]:
        options["worker_class"] = processes_left.noted_by(options.get("worker_class") or Nanny)
    cluster = LocalCluster(**options)
    made.append(cluster)
    # Else it ends a nanny whose worker was lost a while ago (lost-worker-timeout) and is not there,
    # even if a second loss has just happened that the nanny is about to mend.
    only_noted = partial(Cluster._update_worker_status, cluster)  # noqa: SLF001 - no public name
    vars(cluster)["_update_worker_status"] = only_noted
    # The block closes it; at the end of the process there would be no loop to do so.
    cluster.shutdown_on_close = False
    return cluster


async def _started(cluster: Any) -> None:
    await cluster


async def _closed(cluster: Any) -> None:
    await cluster.close()
    # A cluster that was interrupted while it started leaves its scheduler open.
    if cluster.scheduler is not None:
        await cluster.scheduler.close()


def _close(
    runner: LoopRunner,
    made: list[LocalCluster],
    processes_left: WorkerProcesses,
    timeout_s: float,
    error: type[BaseException] | None,
    *_: object,
) -> None:
    # Who presses Ctrl-C waits for the prompt; and nothing of the workers is kept anyway.
    patience_s = 0.1 if error and issubclass(error, KeyboardInterrupt) else timeout_s

    async def close() -> None:
        for cluster in made:
            closing = asyncio.ensure_future(_closed(cluster))
            await asyncio.wait({closing}, timeout=patience_s)
            if not closing.done():
                # Workers that hang must not keep the caller; without them the cluster closes.
                # It waits for processes that are just starting, and this loop starts them.
                await asyncio.to_thread(processes_left.kill)
                await asyncio.wait({closing}, timeout=timeout_s)
            if closing.done():
                closing.result()

    with contextlib.suppress(TimeoutError, OSError, CancelledError):
        # It has its turn when the loop has made what it is just making: that cannot be closed
        # before it is there, and would go on using the scratch folder.
        see_through(start_in(runner, close()), SETTLE_TIMEOUT_S)
    for cluster in made:
        _let_go_of_folders(cluster)


def _let_go_of_folders(cluster: LocalCluster) -> None:
    """Let those of a cluster that could not be closed not look for their folders later.

    That would be at the end of the process, and Distributed complains of those that are gone.
    """
    for server in filter(None, (cluster.scheduler, *cluster.workers.values())):
        if (folder := vars(server).get("_workdir")) is not None:
            folder.release()
