"""Whether workers reach each other, how fast, and who may listen."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes, format_time
from distributed.comm import get_address_host

from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts, Link, ProcessFacts

__all__ = [
    "check_clocks",
    "check_connections",
    "check_encryption",
    "check_interfaces",
    "check_speed",
]

SLOW_BYTES_PER_S = 50e6
LONG_LATENCY_S = 5e-3
LARGE_SKEW_S = 1.0


def check_connections(facts: ClusterFacts) -> Line:
    """Check that scheduler and workers can open connections to every worker's address."""
    links = (*facts.reached.values(), *facts.links)
    broken = [
        {"source": link.source, "target": link.target, "problem": link.problem}
        for link in links
        if link.problem
    ]
    if broken:
        texts = [
            text
            for target in dict.fromkeys(link["target"] for link in broken)
            for text in _unreached([link for link in links if link.target == target], facts)
        ]
        remedy = (
            "open the workers' ports in the firewall (fix them with --worker-port FIRST:LAST), and "
            "let workers tell an address that all others reach: --contact-address, --interface"
        )
        return fail("connections", some(texts), remedy, broken=broken)
    if not links:
        return ok("connections", "none to try", broken=[])
    text = f"{len(links)} tried between workers and the scheduler, all answer"
    return ok("connections", text, broken=[])


def check_speed(facts: ClusterFacts) -> Line:
    """Check bandwidth and latency between workers."""
    workers = {worker.address for worker in facts.workers}
    latencies = [
        (link.latency_s, f"{link.source} to {link.target}")
        for link in facts.links
        if link.latency_s is not None and link.target in workers
    ]
    if not facts.speeds or not latencies:
        return ok("speed", "not measured: fewer than two workers answer")
    (source, target), slowest = min(facts.speeds.items(), key=lambda item: item[1])
    latency, longest = max(latencies)
    details = {
        "bytes_per_s": [
            {"source": a, "target": b, "value": round(speed)}
            for (a, b), speed in facts.speeds.items()
        ],
        "longest_latency_s": latency,
    }
    text = (
        f"at least {format_bytes(int(slowest))}/s, latency at most {format_time(latency)}"
        if slowest
        else f"a transfer from {source} to {target} did not end in time"
    )
    remedy = (
        "let workers use the fastest network (--interface ib0); where hosts are far apart, larger "
        "batches exchange less often"
    )
    if slowest < SLOW_BYTES_PER_S:
        text += f" ({source} to {target})" if slowest else ""
        return warn("speed", text, remedy, **details)
    if latency > LONG_LATENCY_S:
        return warn("speed", f"{text} ({longest})", remedy, **details)
    return ok("speed", text, **details)


def check_interfaces(facts: ClusterFacts) -> Line:
    """Check which network interfaces the workers' addresses belong to."""
    used = {worker.address: _interface(worker) for worker in facts.workers}
    details = {
        "used": {address: found.get("name", "") for address, found in used.items()},
        "interfaces": {worker.address: worker.interfaces for worker in facts.workers},
    }
    places = {(worker.machine, worker.network) for worker in facts.workers}
    if facts.scheduler is not None:
        places.add((facts.scheduler.machine, facts.scheduler.network))
    if len(places) > 1:
        local = [address for address in used if _is_loopback(address)]
        if local:
            text = f"{some(local)}: a loopback address, but there are {len(places)} hosts"
            remedy = "start workers with --interface NAME or --host ADDRESS that others reach"
            return fail("interfaces", text, remedy, **details)
        repeated = _repeated(facts)
        slow = [
            text
            for worker in facts.workers
            if (text := _faster(worker, used[worker.address], repeated))
        ]
        if slow:
            remedy = "start scheduler and workers with --interface of the faster network"
            return warn("interfaces", some(slow), remedy, **details)
    names = sorted({str(found.get("name", "another address")) for found in used.values()})
    text = f"{' and '.join(names) or 'none'}, {_hosts(len(places))}"
    return ok("interfaces", text, **details)


def check_encryption(facts: ClusterFacts) -> Line:
    """Check whether what crosses hosts is encrypted."""
    addresses = [facts.address, *facts.registered]
    schemes = sorted({address.partition("://")[0] for address in addresses})
    plain = [scheme for scheme in schemes if scheme not in {"tls", "wss", "inproc"}]
    places = facts.places
    if not plain:
        return ok("encryption", f"Dask's connections use {' and '.join(schemes)}", schemes=schemes)
    if len(places) > 1:
        text = f"none ({', '.join(plain)}), and there are {len(places)} hosts"
        remedy = "on a network that others use, start the cluster with TLS (distributed.Security)"
        return warn("encryption", text, remedy, schemes=schemes)
    return ok("encryption", f"none ({', '.join(plain)}), all on one host", schemes=schemes)


def check_clocks(facts: ClusterFacts) -> Line:
    """Check that clocks agree with the client's."""
    details = {
        address: {"offset_s": clock.offset_s, "error_s": clock.error_s}
        for address, clock in facts.clocks.items()
    }
    wrong = [
        f"{address} by {clock.offset_s:+.1f} s"
        for address, clock in facts.clocks.items()
        if abs(clock.offset_s) - clock.error_s > LARGE_SKEW_S
    ]
    if wrong:
        remedy = (
            "synchronise clocks (chrony, ntpd): certificates, logs and the saves before the end of "
            "a job go by them"
        )
        text = f"not those of the client: {some(wrong)}"
        return warn("clocks", text, remedy, clocks=details)
    if not facts.clocks:
        return ok("clocks", "not compared: no worker answers", clocks=details)
    vague = [
        f"{address} ({format_time(clock.error_s)} more or less)"
        for address, clock in facts.clocks.items()
        if clock.error_s > LARGE_SKEW_S
    ]
    if vague:
        text = f"not known well enough, as the answer took too long: {some(vague)}"
        return ok("clocks", text, clocks=details)
    most = max(abs(clock.offset_s) + clock.error_s for clock in facts.clocks.values())
    return ok("clocks", f"at most {format_time(most)} apart", clocks=details)


def _unreached(links: list[Link], facts: ClusterFacts) -> list[str]:
    """Say who cannot reach one target: once, if it is everybody."""
    broken = [link for link in links if link.problem]
    target = "the scheduler" if links[0].target == facts.address else links[0].target
    if len(broken) == len(links) > 1:
        reasons = some(sorted({link.problem for link in broken}))
        return [f"nobody reaches {target}: {reasons} (tried by {len(links)})"]
    return [
        f"{'the scheduler' if link.source == facts.address else link.source} cannot reach "
        f"{target}: {link.problem}"
        for link in broken
    ]


def _interface(worker: ProcessFacts) -> dict[str, Any]:
    host = _host(worker.address)
    for interface in worker.interfaces:
        if host in [str(address).partition("%")[0] for address in interface["addresses"]]:
            return interface
    return {}


def _repeated(facts: ClusterFacts) -> set[str]:
    """Give the addresses that several hosts have: none of them is reached there by the others."""
    processes = (*facts.workers, facts.client, *filter(None, (facts.scheduler,)))
    found = Counter(
        address
        for _, _, address in {
            (process.machine, process.network, address)
            for process in processes
            for interface in process.interfaces
            for address in map(str, interface["addresses"])
        }
    )
    return {address for address, hosts in found.items() if hosts > 1}


def _faster(worker: ProcessFacts, own: dict[str, Any], repeated: set[str]) -> str:
    """Name an interface that is faster than the one in use; empty if there is none.

    One that is virtual or has no address that others can reach would be no network to use.
    """
    others = [
        found
        for found in worker.interfaces
        if not found.get("virtual")
        and any(_leads_here(address) for address in {*found["addresses"]} - repeated)
    ]
    speed = int(own.get("mbit_per_s", 0))
    best = max(others, key=lambda found: int(found["mbit_per_s"]), default=own)
    if not speed or int(best["mbit_per_s"]) <= speed:
        return ""
    return (
        f"{worker.address} uses {own['name']} with {speed:,} Mbit/s, {best['name']} has "
        f"{best['mbit_per_s']:,}"
    )


def _leads_here(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return True
    return not (found.is_loopback or found.is_link_local)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(_host(address)).is_loopback
    except ValueError:
        return _host(address) == "localhost"


def _host(address: str) -> str:
    try:
        return str(get_address_host(address))
    except (ValueError, NotImplementedError):
        return ""


def _hosts(number: int) -> str:
    return f"{number} host" + "s" * (number != 1)
