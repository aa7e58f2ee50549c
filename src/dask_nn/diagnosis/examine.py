"""From facts to the report: every check, in the order in which its lines are best read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.diagnosis.checks.cluster import (
    check_dashboard,
    check_scheduler,
    check_walltime,
    check_workers,
)
from dask_nn.diagnosis.checks.data import check_blocks, check_placement
from dask_nn.diagnosis.checks.gpus import check_gpus
from dask_nn.diagnosis.checks.memory import check_allocator, check_memory, check_shared_memory
from dask_nn.diagnosis.checks.network import (
    check_clocks,
    check_connections,
    check_encryption,
    check_interfaces,
    check_speed,
)
from dask_nn.diagnosis.checks.processors import check_bits, check_processors
from dask_nn.diagnosis.checks.start import check_start
from dask_nn.diagnosis.checks.threads import check_math_threads, check_threads
from dask_nn.diagnosis.checks.versions import check_imports, check_versions
from dask_nn.diagnosis.report import Line, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.diagnosis.facts import ClusterFacts

__all__ = ["examine"]

PACKAGES = ("python", "torch", "dask", "distributed", "numpy", "dask-nn")
# Without a worker that answers, nothing can be said of workers.
ALWAYS: tuple[Callable[[ClusterFacts], Line], ...] = (check_scheduler, check_workers)
OF_WORKERS: tuple[Callable[[ClusterFacts], Line], ...] = (
    *map(check_versions, PACKAGES),
    check_imports,
    check_threads,
    check_math_threads,
    check_memory,
    check_shared_memory,
    check_allocator,
    check_processors,
    check_bits,
    check_gpus,
)
OF_CLUSTER: tuple[Callable[[ClusterFacts], Line], ...] = (
    check_connections,
    check_speed,
    check_interfaces,
    check_encryption,
    check_clocks,
    check_walltime,
    check_dashboard,
    check_blocks,
    check_placement,
)


def examine(facts: ClusterFacts) -> Report:
    """Judge what is known of a cluster."""
    checks: tuple[Callable[[ClusterFacts], Line], ...]
    if facts.not_started or facts.problem:
        checks = (check_start if facts.not_started else check_scheduler,)
        if facts.data is not None and facts.data.problem:
            checks += (check_blocks,)
    else:
        checks = (*ALWAYS, *(OF_WORKERS if facts.workers else ()), *OF_CLUSTER)
    return Report(scheduler=facts.address, lines=tuple(check(facts) for check in checks))
