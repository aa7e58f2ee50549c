"""Whether every worker has a graphics card of its own, and a PyTorch that can use it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts, ProcessFacts

__all__ = ["check_gpus"]

USED = 'training uses them only with device="cuda"'
FIND_IT = (
    "look at the driver (nvidia-smi on that host), at how the container is started (docker run "
    "--gpus all, nvidia.com/gpu), at CUDA_VISIBLE_DEVICES, whether PyTorch there is built with "
    "CUDA, and whether the batch system was asked for a GPU of a partition that has some"
)


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
    unseen = [worker for worker in facts.workers if not _sees_a_card(worker)]
    if facts.gpus and unseen:
        return fail("GPU", _missing(unseen, facts), FIND_IT, workers=details)
    if not any(worker.gpus or worker.num_cuda_devices for worker in facts.workers):
        return ok("GPU", "none: training runs on processors", workers=details)
    if found := _fault(facts, unseen):
        return warn("GPU", *found, workers=details)
    kinds = some(_kinds(facts))
    text = f"{kinds}, CUDA {facts.workers[0].cuda}, one for each of {len(facts.workers)}; {USED}"
    return ok("GPU", text, workers=details)


def _fault(facts: ClusterFacts, unseen: list[ProcessFacts]) -> tuple[str, str] | None:
    """Say what is wrong with cards that there are, and what to do about it."""
    blind = [w.address for w in facts.workers if w.gpus and not w.num_cuda_devices]
    if blind:
        text = f"PyTorch sees no CUDA device on {some(blind)}, the driver does"
        remedy = "install PyTorch with CUDA there, and look at CUDA_VISIBLE_DEVICES and the driver"
        seen = any(worker.num_cuda_devices for worker in facts.workers)
        return f"{text}; {USED}" if seen else text, remedy
    if text := _misused(facts):
        remedy = "start one worker for each card, each with its own CUDA_VISIBLE_DEVICES"
        return f"{text}; {USED}", remedy
    if text := _mixed(facts, unseen):
        return f"{text}; {USED}", "train on workers with one card each, of one kind"
    if len(facts.workers) > 1 and not all(worker.nccl for worker in facts.workers):
        text = f"{some(_kinds(facts))}, but PyTorch without nccl; {USED}"
        return text, "install PyTorch for Linux with CUDA, it has nccl"
    return None


def _sees_a_card(worker: ProcessFacts) -> bool:
    # Where PyTorch is not loaded, the driver alone can be asked; another line says why it is not.
    return bool(worker.num_cuda_devices or (worker.gpus and not worker.torch_threads))


def _missing(unseen: list[ProcessFacts], facts: ClusterFacts) -> str:
    """Say where a card was asked for and is not seen, and by whom it is not."""
    where = f"{some(worker.address for worker in unseen)}: {some(_blindness(unseen))}"
    if len(unseen) == len(facts.workers):
        return f"asked for, but no worker sees one: {where}"
    return f"asked for, but not seen by {len(unseen)} of {len(facts.workers)} workers: {where}"


def _blindness(unseen: list[ProcessFacts]) -> list[str]:
    reasons = []
    for worker in unseen:
        built = ", which is built without CUDA," if worker.torch_threads and not worker.cuda else ""
        if worker.gpus:
            reasons.append(
                f"the driver shows {worker.gpus[0]['name']}, not so PyTorch{built.rstrip(',')}"
            )
        else:
            reasons.append(f"neither nvidia-smi nor PyTorch{built} shows one")
    return list(dict.fromkeys(reasons))


def _mixed(facts: ClusterFacts, unseen: list[ProcessFacts]) -> str:
    """Say how workers differ in what they see; empty if they do not."""
    kinds = _kinds(facts)
    if unseen:
        without = some(worker.address for worker in unseen)
        seeing = len(facts.workers) - len(unseen)
        return (
            f"mixed: {some(kinds)} on {seeing} of {len(facts.workers)} workers, no card on "
            f"{without}, where no rank would run"
        )
    if len(kinds) > 1:
        return f"mixed: {some(f'{kind} on {_workers(n)}' for kind, n in kinds.items())}"
    devices = Counter(worker.num_cuda_devices for worker in facts.workers)
    if len(devices) > 1:
        seen = some(f"{_workers(n)} with {count}" for count, n in sorted(devices.items()))
        return f"mixed: {some(kinds)}, seen by {seen}"
    return ""


def _kinds(facts: ClusterFacts) -> Counter[str]:
    """Count workers by the card that they see."""
    return Counter(
        str(worker.gpus[0]["name"]) if worker.gpus else "cards that nvidia-smi does not name"
        for worker in facts.workers
        if worker.gpus or worker.num_cuda_devices
    )


def _workers(number: int) -> str:
    return f"{number} worker" + "s" * (number != 1)


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
