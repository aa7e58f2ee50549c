"""Whether everybody is there, for how long, and whether it can be watched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask.utils import format_time

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts

__all__ = ["check_dashboard", "check_scheduler", "check_walltime", "check_workers"]

LITTLE_TIME_S = 600
SETTINGS = (
    "distributed.comm.tls.ca-file, client.cert and client.key in Dask's configuration "
    "(docs/clusters/security.md)"
)


def check_scheduler(facts: ClusterFacts) -> Line:
    """Check that the scheduler answers."""
    if facts.problem:
        return fail(
            "scheduler", f"{facts.address} does not answer: {facts.problem}", _remedy(facts)
        )
    text = f"{facts.address} answers in {format_time(facts.latency_s)}"
    return ok("scheduler", text, latency_s=facts.latency_s)


def check_workers(facts: ClusterFacts) -> Line:
    """Check that there are workers, and that each of them answers."""
    if not facts.registered:
        remedy = "scale the cluster up, or start workers: dask worker ADDRESS"
        return fail("workers", "the scheduler has none", remedy, workers=[], silent={})
    details = {"workers": list(facts.registered), "silent": facts.silent}
    if facts.silent:
        texts = [f"{address} ({reason})" for address, reason in facts.silent.items()]
        text = f"{len(facts.silent)} of {len(facts.registered)} do not answer: {some(texts)}"
        remedy = (
            "look at their logs; end those that hang, mend the addresses of the others, or wait "
            "longer for slow ones (--timeout)"
        )
        return fail("workers", text, remedy, **details)
    hosts = len(facts.hosts)
    number = len(facts.registered)
    text = f"{number} worker{'s' * (number != 1)} on {hosts} host{'s' * (hosts != 1)}, all answer"
    return ok("workers", text, **details)


def check_walltime(facts: ClusterFacts) -> Line:
    """Check how long the workers may still live."""
    left = {
        worker.address: {source: ends - facts.now_s for source, ends in worker.ends_at_s.items()}
        for worker in facts.workers
    }
    ends = [
        (seconds, address, source)
        for address, found in left.items()
        for source, seconds in found.items()
    ]
    if not ends:
        return ok("walltime", "no limit is known", left_s=left)
    seconds, address, source = min(ends)
    remedy = (
        "start workers anew with a longer walltime; Checkpoint(before_walltime_s=60) saves before "
        "a job ends, resume=True goes on"
    )
    if seconds <= 0:
        late = some(f"{a} {format_time(-s)} ago ({source})" for s, a, source in ends if s <= 0)
        return fail("walltime", f"over: {late}", remedy, left_s=left)
    text = f"{format_time(seconds)} left on {address} ({source})"
    if seconds < LITTLE_TIME_S:
        return warn("walltime", text, remedy, left_s=left)
    return ok("walltime", f"at least {text}", left_s=left)


def check_dashboard(facts: ClusterFacts) -> Line:
    """Check that the dashboard can be read from here."""
    if not facts.dashboard:
        remedy = "install bokeh where the scheduler runs, and start it without --no-dashboard"
        return warn("dashboard", "the scheduler has none", remedy, link="")
    if facts.dashboard_problem:
        port = facts.dashboard.partition("://")[2].partition("/")[0].rpartition(":")[2]
        text = f"{facts.dashboard} cannot be read from here: {facts.dashboard_problem}"
        remedy = (
            "training does without; to see it, install bokeh where the scheduler runs, or forward "
            f"its port: ssh -L {port}:localhost:{port} HOST"
        )
        return warn("dashboard", text, remedy, link=facts.dashboard)
    return ok("dashboard", facts.dashboard, link=facts.dashboard)


def _remedy(facts: ClusterFacts) -> str:
    """Say what to do about a scheduler that does not answer."""
    scheme, _, place = facts.address.rpartition("://")
    with_tls = f"{'wss' if scheme == 'ws' else 'tls'}://{place}"
    without = f"{'ws' if scheme == 'wss' else 'tcp'}://{place}"
    return {
        "": "start it, or give the address that `dask scheduler` prints; if it runs, look at its "
        "log and let the firewall pass its port",
        "no certificates": f"give this client the cluster's TLS certificates: {SETTINGS}",
        "spoken": f"use {with_tls} with the cluster's TLS certificates: {SETTINGS}",
        "not spoken": f"use {without}, or start the scheduler with TLS certificates: its are "
        "distributed.comm.tls.scheduler in Dask's configuration (docs/clusters/security.md)",
        "refused": f"use TLS certificates that the cluster's authority has signed: {SETTINGS}",
        "required": "distributed.comm.require-encryption is set in this client's configuration: "
        f"start the scheduler with TLS and use {with_tls}, or take that setting out "
        "(docs/clusters/security.md)",
    }[facts.tls]
