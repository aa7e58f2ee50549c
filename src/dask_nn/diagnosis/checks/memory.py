"""Whether there is room for PyTorch, for data, and for the exchange of the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask.utils import format_bytes

from dask_nn.collectives.choose import ORDERED_STORES
from dask_nn.collectives.region_layout import layout_of_ranks
from dask_nn.collectives.shared_file import SPARE_BYTES
from dask_nn.data.memory import PROCESS_SHARE
from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts, ProcessFacts

__all__ = ["check_allocator", "check_memory", "check_shared_memory"]

# At this share of its limit Dask pauses a worker.
PAUSED_SHARE = 0.8
LEAST_ROOM_BYTES = 256 << 20
LEAST_LIMIT = "1.5 GiB"
PARAMETER_BYTES = 4


def check_memory(facts: ClusterFacts) -> Line:
    """Check the limits of workers against what PyTorch takes and what hosts have."""
    workers = facts.workers
    details = {
        worker.address: {
            "limit_bytes": worker.memory_limit_bytes,
            "used_bytes": worker.used_bytes,
            "host_bytes": worker.host_memory_bytes,
        }
        for worker in workers
    }
    limited = [worker for worker in workers if worker.memory_limit_bytes]
    low = [w for w in limited if w.spared or w.used_bytes > PAUSED_SHARE * w.memory_limit_bytes]
    remedy = f"start workers with --memory-limit of at least {LEAST_LIMIT}"
    if low:
        text = f"too low for Python with PyTorch: {some(map(_limit, low))}"
        return fail("memory", text, remedy, workers=details)
    tight = [w for w in limited if _room(w) < LEAST_ROOM_BYTES]
    if tight:
        text = f"little room for data beside PyTorch: {some(map(_limit, tight))}"
        return warn("memory", text, remedy, workers=details)
    for found in facts.machines.values():
        wanted = sum(worker.memory_limit_bytes for worker in found)
        host = max(worker.host_memory_bytes for worker in found)
        if host and wanted > host * 1.01:
            text = (
                f"limits of {len(found)} workers on {found[0].hostname} add up to "
                f"{format_bytes(wanted)}, it has {format_bytes(host)}"
            )
            remedy = f"start them with --memory-limit {format_bytes(host // len(found))} each"
            return warn("memory", text, remedy, workers=details)
    if len(limited) < len(workers):
        free = [worker.address for worker in workers if not worker.memory_limit_bytes]
        text = f"no limit on {some(free)}: Dask does not spill there"
        return warn("memory", text, "start workers with --memory-limit auto", workers=details)
    least = min(limited, key=_room, default=None)
    text = "no workers" if least is None else f"{_limit(least)}, {format_bytes(_room(least))} free"
    return ok("memory", f"least: {text}", workers=details)


def check_shared_memory(facts: ClusterFacts) -> Line:
    """Check that the ranks of each host have room for their exchange."""
    details = {
        worker.address: {"bytes": worker.shared_bytes, "free_bytes": worker.shared_free_bytes}
        for worker in facts.workers
    }
    remedy = (
        "enlarge it: docker run --shm-size=1g, in Kubernetes an emptyDir of medium Memory at "
        "/dev/shm, or mount -o remount,size=1g /dev/shm"
    )
    needed = 0
    for workers in facts.hosts.values():
        ranks = min(len(workers), max(worker.cores for worker in workers))
        if ranks < 2 or workers[0].architecture not in ORDERED_STORES:
            continue  # one rank exchanges nothing, and other processors use gloo
        needed = needed_bytes(facts.parameters, ranks)
        small = [worker for worker in workers if (worker.shared_free_bytes or 0) < needed]
        if small:
            return _too_small(facts, small, needed, remedy, details)
    for workers in facts.machines.values():
        if len({worker.host for worker in workers}) > 1:
            text = f"workers on {workers[0].hostname} do not share one: they exchange by gloo"
            remedy = "run them in one container, or share /dev/shm between them (--ipc=host)"
            return warn("shared memory", text, remedy, needed_bytes=needed, workers=details)
    if not needed:
        return ok("shared memory", "not used: one rank a host", needed_bytes=0, workers=details)
    least = min(worker.shared_free_bytes or 0 for worker in facts.workers)
    text = (
        f"{format_bytes(least)} free in /dev/shm, {format_bytes(needed)} used for "
        f"{facts.parameters / 1e6:g} million parameters"
    )
    return ok("shared memory", text, needed_bytes=needed, workers=details)


def check_allocator(facts: ClusterFacts) -> Line:
    """Check that ranks can tell the C library to keep what is freed."""
    kinds = {
        worker.address: worker.allocator or worker.libc or "unknown" for worker in facts.workers
    }
    trim = {
        worker.address: worker.environment.get("MALLOC_TRIM_THRESHOLD_", "")
        for worker in facts.workers
    }
    details = {"allocator": kinds, "MALLOC_TRIM_THRESHOLD_": trim}
    other = [f"{a} has {kind}" for a, kind in kinds.items() if not kind.startswith("glibc")]
    if other:
        text = f"not glibc's: {some(other)}"
        remedy = (
            "nothing has to be done, but freed memory is kept as that library likes; dask-nn sets "
            "thresholds for glibc alone"
        )
        return warn("allocator", text, remedy, **details)
    text = next(iter(kinds.values()), "unknown")
    values = sorted({value or "unset" for value in trim.values()})
    text += f", MALLOC_TRIM_THRESHOLD_ {' or '.join(values)}; ranks keep freed memory"
    return ok("allocator", text, **details)


def needed_bytes(parameters: int, ranks: int) -> int:
    """Tell what ranks of one host need in ``/dev/shm`` for a float32 model, one shard each."""
    leaf_bytes = parameters * PARAMETER_BYTES
    layout = layout_of_ranks(shards=ranks, world_size=ranks, leaf_bytes=leaf_bytes)
    return layout.size_bytes + SPARE_BYTES


def _too_small(
    facts: ClusterFacts,
    small: list[ProcessFacts],
    needed: int,
    remedy: str,
    details: dict[str, dict[str, int | None]],
) -> Line:
    shown = some(
        f"{format_bytes(worker.shared_free_bytes or 0)} free on {worker.address}"
        for worker in small
    )
    text = f"{shown}, but {facts.parameters / 1e6:g} million parameters need {format_bytes(needed)}"
    nowhere = any((worker.scratch_free_bytes or 0) < needed for worker in small)
    text += (
        ", and the worker's folder has no room either"
        if nowhere
        else ": the exchange uses a file in the worker's folder, which may be slow"
    )
    line = fail if nowhere else warn
    return line("shared memory", text, remedy, needed_bytes=needed, workers=details)


def _room(worker: ProcessFacts) -> int:
    """Tell what data may take, as a run counts it."""
    return max(0, int(worker.memory_limit_bytes * PROCESS_SHARE) - worker.used_bytes)


def _limit(worker: ProcessFacts) -> str:
    used = "" if worker.spared else f" ({format_bytes(worker.used_bytes)} used)"
    return f"{format_bytes(worker.memory_limit_bytes)} on {worker.address}{used}"
