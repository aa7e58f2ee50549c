"""Whether there are as many threads as cores, and the same on all workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, ok, some, warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dask_nn.diagnosis.facts import ClusterFacts, ProcessFacts

__all__ = ["check_math_threads", "check_threads"]

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def check_threads(facts: ClusterFacts) -> Line:
    """Check Dask's threads against each other and the cores of their machine."""
    threads = {worker.address: worker.threads for worker in facts.workers}
    machines = [_crowd(workers) for workers in facts.machines.values()]
    details = {"threads": threads, "machines": [asdict(machine) for machine in machines]}
    if len(set(threads.values())) > 1:
        usual, others = _others(threads)
        text = f"mixed: {usual} on most workers, but {some(others)}"
        remedy = (
            f"start all workers with the same --nthreads; until then every rank gets "
            f"{min(threads.values())}, as Synchronous(threads_per_rank=) says"
        )
        return warn("threads", text, remedy, **details)
    crowded = [machine for machine in machines if machine.threads > machine.cores]
    if crowded:
        text = some(
            f"{machine.workers} workers with {machine.threads} threads on the {machine.cores} "
            f"cores of {machine.hostname}"
            for machine in crowded
        )
        remedy = (
            "start fewer workers or threads: ranks never outnumber cores, so surplus workers run "
            "no rank, and tasks of predict and evaluate take turns"
        )
        return warn("threads", text, remedy, **details)
    each = next(iter(threads.values()), 0)
    cores = sum(machine.cores for machine in machines)
    text = f"{each} per worker, {sum(threads.values())} on {cores} cores"
    return ok("threads", text, **details)


def check_math_threads(facts: ClusterFacts) -> Line:
    """Check the threads within an operator, which variables of the environment set."""
    threads = {worker.address: worker.torch_threads for worker in facts.workers}
    variables = {
        worker.address: {name: worker.environment.get(name, "") for name in VARIABLES}
        for worker in facts.workers
    }
    details = {"torch_threads": threads, "environment": variables}
    known = {address: number for address, number in threads.items() if number}
    mixed = [name for name in VARIABLES if len({v[name] for v in variables.values()}) > 1]
    settings = {
        address: " ".join(f"{name}={found[name] or 'unset'}" for name in mixed)
        for address, found in variables.items()
    }
    remedy = "set OMP_NUM_THREADS=1 for all workers, as Dask's nanny does"
    if len(set(known.values())) > 1:
        usual, others = _others(known)
        text = f"mixed: {usual} PyTorch threads on most workers, but {some(others)}"
        return warn("OMP", text, remedy, **details)
    if mixed:
        setting, others = _others(settings)
        text = f"mixed: {setting} on most workers, but {some(others)}"
        return warn("OMP", text, remedy, **details)
    for workers in facts.machines.values():
        wanted = sum(worker.torch_threads * max(1, worker.threads) for worker in workers)
        cores = max(worker.cores for worker in workers)
        if wanted > cores and len(workers) > 1:
            text = (
                f"tasks of {len(workers)} workers may use {wanted} threads on the {cores} cores of "
                f"{workers[0].hostname}"
            )
            return warn("OMP", text, remedy, **details)
    each = next(iter(known.values()), 0)
    text = f"{each} thread{'s' * (each != 1)} in each operator" if each else "PyTorch is not loaded"
    return ok("OMP", text, **details)


@dataclass(frozen=True)
class _Crowd:
    hostname: str
    workers: int
    threads: int
    cores: int


def _crowd(workers: Sequence[ProcessFacts]) -> _Crowd:
    return _Crowd(
        hostname=workers[0].hostname,
        workers=len(workers),
        threads=sum(worker.threads for worker in workers),
        cores=max(worker.cores for worker in workers),
    )


def _others[T](values: Mapping[str, T]) -> tuple[T, list[str]]:
    """Give the most frequent value, and who has which other one."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, [f"{address} has {value}" for address, value in values.items() if value != usual]
