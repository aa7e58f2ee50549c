"""Whether all workers compute the same bits, and on what."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts

__all__ = ["check_bits", "check_gpus", "check_processors"]

SAME_KIND = (
    "take nodes of one kind (SLURM: --constraint), or set ATEN_CPU_CAPABILITY to the lowest level "
    "on all workers"
)


def check_processors(facts: ClusterFacts) -> Line:
    """Check that processors and the level of PyTorch's kernels are the same."""
    kinds = {
        worker.address: f"{worker.processor}, {worker.capability or 'level unknown'}"
        for worker in facts.workers
    }
    forced = {
        worker.address: worker.environment["ATEN_CPU_CAPABILITY"]
        for worker in facts.workers
        if "ATEN_CPU_CAPABILITY" in worker.environment
    }
    # Where PyTorch is not loaded the level is not known, and the processor may be as any other.
    names = {worker.processor for worker in facts.workers}
    known = [w.address for w in facts.workers if w.capability or len(names) > 1]
    counts = Counter(kinds[address] for address in known or kinds).most_common()
    if len(counts) > 1:
        usual = counts[0][0]
        others = [
            f"{address} has {kind}"
            + (f" (ATEN_CPU_CAPABILITY={forced[address]})" if address in forced else "")
            for address in known
            if (kind := kinds[address]) != usual
        ]
        text = f"mixed: {usual} on most workers, but {some(others)}"
        return warn("processor", text, SAME_KIND, processors=kinds, forced=forced)
    text = counts[0][0] if counts else "no workers"
    return ok("processor", text, processors=kinds, forced=forced)


def check_bits(facts: ClusterFacts) -> Line:
    """Compare fingerprints: equal ones promise the same bits, whoever computes what."""
    found = {a: hash_ for a, hash_ in facts.fingerprints.items() if a}
    here = facts.fingerprints.get("", "")
    details = {"client": here, "workers": found}
    unknown = [worker.address for worker in facts.workers if worker.address not in found]
    if not found:
        text = "no worker could compute the test batch"
        return warn("bits", text, "mend the lines of torch and dask-nn first", **details)
    counts = Counter(found.values()).most_common()
    if len(counts) > 1:
        others = [address for address, hash_ in found.items() if hash_ != counts[0][0]]
        text = f"other bits on {some(others)} than on {counts[0][1]} of {len(found)} workers"
        remedy = f"{SAME_KIND}, or train with Synchronous(bitwise=False)"
        return fail("bits", text, remedy, **details)
    if here and here != counts[0][0]:
        text = "equal on all workers, but not with this client"
        remedy = (
            "nothing, unless you compare with runs in this process: set ATEN_CPU_CAPABILITY alike"
        )
        return warn("bits", text, remedy, **details)
    text = f"equal on {_workers(len(found))}" + (" and the client" if here else "")
    if unknown:
        text += f"; not computed on {some(unknown)}"
    return ok("bits", text, **details)


def check_gpus(facts: ClusterFacts) -> Line:
    """Check that the graphics cards can be used: one worker each, by a PyTorch that knows CUDA."""
    details = {
        worker.address: {
            "gpus": worker.gpus,
            "devices": worker.num_cuda_devices,
            "cuda": worker.cuda,
            "nccl": worker.nccl,
        }
        for worker in facts.workers
    }
    if not any(worker.gpus or worker.num_cuda_devices for worker in facts.workers):
        return ok("GPU", "none: training runs on processors", workers=details)
    blind = [w.address for w in facts.workers if w.gpus and not w.num_cuda_devices]
    if blind:
        text = f"PyTorch sees no CUDA device on {some(blind)}, the driver does"
        remedy = "install PyTorch with CUDA there, and look at CUDA_VISIBLE_DEVICES and the driver"
        return warn("GPU", text, remedy, workers=details)
    for workers in facts.machines.values():
        cards = {str(card["uuid"]) for worker in workers for card in worker.gpus}
        if cards and sum(worker.num_cuda_devices for worker in workers) > len(cards):
            text = (
                f"{_workers(len(workers))} on {workers[0].hostname} share {len(cards)} card"
                f"{'s' * (len(cards) != 1)}"
            )
            remedy = "start one worker for each card, each with its own CUDA_VISIBLE_DEVICES"
            return warn("GPU", text, remedy, workers=details)
    kinds = Counter(str(card["name"]) for worker in facts.workers for card in worker.gpus[:1])
    devices = {worker.num_cuda_devices for worker in facts.workers}
    if len(kinds) > 1 or len(devices) > 1:
        text = f"mixed: {some(kinds)}; {' or '.join(map(str, sorted(devices)))} devices a worker"
        return warn("GPU", text, "train on workers with cards of one kind", workers=details)
    if len(facts.workers) > 1 and not all(worker.nccl for worker in facts.workers):
        text = f"{some(kinds)}, but PyTorch without nccl"
        return warn(
            "GPU", text, "install PyTorch for Linux with CUDA, it has nccl", workers=details
        )
    text = f"{some(kinds)}, CUDA {facts.workers[0].cuda}, one for each of {len(facts.workers)}"
    return ok("GPU", text, workers=details)


def _workers(number: int) -> str:
    return f"{number} worker" + "s" * (number != 1)
