"""Whether every worker has a graphics card of its own, and a PyTorch that can use it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts, ProcessFacts

__all__ = ["check_gpus"]


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
    if text := _misused(facts):
        remedy = "start one worker for each card, each with its own CUDA_VISIBLE_DEVICES"
        return warn("GPU", text, remedy, workers=details)
    kinds = Counter(
        str(worker.gpus[0]["name"]) if worker.gpus else "cards that nvidia-smi does not name"
        for worker in facts.workers
        if worker.gpus or worker.num_cuda_devices
    )
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


def _misused(facts: ClusterFacts) -> str:
    """Say which workers share a card, or leave one idle; empty if none does."""
    seen = {worker.address: _visible_cards(worker) for worker in facts.workers}
    # A rank computes on the first card that its worker sees.
    used = Counter(cards[0] for cards in seen.values() if cards)
    for card, number in used.items():
        if number > 1:
            sharing = [address for address, cards in seen.items() if cards[:1] == [card]]
            return f"{number} workers share one card: {some(sharing)}"
    return some(
        f"{address} uses 1 of the {len(cards)} cards that it sees"
        for address, cards in seen.items()
        if not set(cards) <= set(used)
    )


def _visible_cards(worker: ProcessFacts) -> list[str]:
    """Name the cards that a worker's PyTorch sees: equal names are one card."""
    uuids = [str(card["uuid"]) for card in worker.gpus]
    listed = worker.environment.get("CUDA_VISIBLE_DEVICES")
    every = map(str, range(worker.num_cuda_devices))
    names = list(every) if listed is None else [name.strip() for name in listed.split(",")]
    return [_card(name, uuids, worker.machine) for name in names[: worker.num_cuda_devices]]


def _card(name: str, uuids: list[str], machine: str) -> str:
    if name.isdecimal():
        return uuids[int(name)] if int(name) < len(uuids) else f"{machine} {name}"
    # The first letters of a card's name do for CUDA.
    return next((uuid for uuid in uuids if uuid.startswith(name)), name)
