"""Whether all workers compute the same bits, and on what."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts

__all__ = ["check_bits", "check_processors"]

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
    errors, unknown = facts.fingerprint_errors, facts.fingerprints_unknown
    details = {"client": here, "workers": found, "errors": errors, "unknown": unknown}
    failed = [f"{address}: {text}" for address, text in errors.items() if address]
    if failed:
        remedy = "mend PyTorch there: training computes with the same functions"
        return fail("bits", f"the test batch fails on {some(failed)}", remedy, **details)
    missing = [f"{address or 'the client'} ({text})" for address, text in unknown.items()]
    if not found:
        text = f"not computed: {some(missing)}" if missing else "not computed: no worker is asked"
        return warn("bits", text, "mend the lines of torch and dask-nn first", **details)
    counts = Counter(found.values()).most_common()
    if len(counts) > 1:
        others = [address for address, hash_ in found.items() if hash_ != counts[0][0]]
        text = f"other bits on {some(others)} than on {counts[0][1]} of {len(found)} workers"
        remedy = f"{SAME_KIND}, or train with Synchronous(bitwise=False)"
        return fail("bits", text, remedy, **details)
    if missing or errors:
        missing += [f"the client ({text})" for text in errors.values()]
        text = f"equal on {_workers(len(found))}; not computed on {some(missing)}"
        remedy = "look at their logs; wait longer for slow ones (--timeout)"
        return warn("bits", text, remedy, **details)
    if here and here != counts[0][0]:
        text = "equal on all workers, but not with this client"
        remedy = (
            "nothing, unless you compare with runs in this process: set ATEN_CPU_CAPABILITY alike"
        )
        return warn("bits", text, remedy, **details)
    return ok("bits", f"equal on {_workers(len(found))} and the client", **details)


def _workers(number: int) -> str:
    return f"{number} worker" + "s" * (number != 1)
