"""Whether every process has the same packages, and can import them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.diagnosis.facts import ClusterFacts, ProcessFacts

__all__ = ["check_imports", "check_versions"]

# What a run refuses (see controller.cluster), and what usually works all the same.
REFUSED = ("python", "torch", "dask-nn")
TOLERATED = ("dask", "distributed", "numpy")
# A scheduler runs no rank.
ON_SCHEDULER = ("python", "dask", "distributed")


def check_versions(name: str) -> Callable[[ClusterFacts], Line]:
    """Make the check of one package."""

    def check(facts: ClusterFacts) -> Line:
        return _check(facts, name)

    return check


def _check(facts: ClusterFacts, name: str) -> Line:
    found = {worker.address: worker.versions.get(name, "") for worker in facts.workers}
    if facts.scheduler is not None and name in ON_SCHEDULER:
        found["the scheduler"] = facts.scheduler.versions.get(name, "")
    wanted = facts.client.versions.get(name, "")
    details = {"client": wanted, **found}
    if not wanted:
        text = f"missing in the client, {_count(len(facts.workers))} have {_kinds(found)}"
        return fail(name, text, f"install {name} where you start the training", **details)
    missing = [address for address, version in found.items() if not version]
    other = {a: v for a, v in found.items() if v and not _same(name, v, wanted)}
    if not missing and not other:
        builds = sorted({version for version in found.values() if version != wanted})
        if builds:
            return ok(name, f"{wanted} in the client, {some(builds)} elsewhere: fits", **details)
        return ok(name, f"{wanted} everywhere", **details)
    parts = []
    if missing:
        parts.append(f"missing on {some(missing)}")
    if other:
        parts.append(some(f"{address} has {version}" for address, version in other.items()))
    text = f"{wanted} in the client, but {' and '.join(parts)}"
    remedy = f"install {_pin(name, wanted)} there, or leave these workers out"
    refused = missing or name in REFUSED
    return (fail if refused else warn)(name, text, remedy, **details)


def check_imports(facts: ClusterFacts) -> Line:
    """Check that what a rank and the data need can be imported."""
    problems = {
        worker.address: {
            module: text for module, text in worker.problems.items() if not _told(worker, text)
        }
        for worker in facts.workers
    }
    problems = {address: found for address, found in problems.items() if found}
    if not problems:
        spared = [worker.address for worker in facts.workers if worker.spared]
        text = f"not tried on {some(spared)}: no memory for it" if spared else "all can be imported"
        return ok("packages", text)
    texts = [
        f"{module} on {address}: {text}"
        for address, found in problems.items()
        for module, text in found.items()
    ]
    remedy = (
        "install what is missing on these workers (pip install dask-nn brings what it needs); if "
        "an import takes too long, put the environment on a local disk, or wait (--timeout)"
    )
    return fail("packages", some(texts), remedy, problems=problems)


def _told(worker: ProcessFacts, text: str) -> bool:
    """Tell whether the line of dask-nn or torch says it already."""
    return any(
        f"'{module}" in text and name not in worker.versions
        for module, name in (("torch", "torch"), ("dask_nn", "dask-nn"))
    )


def _same(name: str, version: str, wanted: str) -> bool:
    """Compare as a run does: of Python the minor version, without the build of PyTorch."""
    if name == "python":
        return _minor(version) == _minor(wanted)
    return version.partition("+")[0] == wanted.partition("+")[0]


def _pin(name: str, version: str) -> str:
    if name == "python":
        return f"Python {_minor(version)}"
    return f"{name}=={version.partition('+')[0]}"


def _minor(version: str) -> str:
    return ".".join(version.split(".", 2)[:2])


def _kinds(found: dict[str, str]) -> str:
    return some(sorted({version or "none" for version in found.values()})) or "none"


def _count(workers: int) -> str:
    return f"{workers} worker" + "s" * (workers != 1)
