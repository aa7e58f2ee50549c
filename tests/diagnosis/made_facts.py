"""Facts of two workers on two hosts, all in order but for what a test changes."""

from __future__ import annotations

from dataclasses import replace

from dask_nn.diagnosis.facts import Clock, ClusterFacts, Link, ProcessFacts

GIB = 1 << 30
FIRST, SECOND, SCHEDULER = "tcp://10.0.0.1:1111", "tcp://10.0.0.2:2222", "tcp://10.0.0.9:8786"
VERSIONS = {
    "python": "3.13.0",
    "torch": "2.13.0",
    "dask": "2026.8.0",
    "distributed": "2026.8.0",
    "numpy": "2.5.5",
    "dask-nn": "0.1.0",
}
ONE_HOST = {"machine": "host", "network": "host", "shared_place": "host-1"}


def worker(address: str, **changes: object) -> ProcessFacts:
    host = address.rpartition(":")[0].partition("://")[2]
    facts = ProcessFacts(
        address=address,
        hostname=host,
        machine=host,
        network=host,
        versions=VERSIONS,
        threads=1,
        cores=2,
        torch_threads=1,
        environment={"OMP_NUM_THREADS": "1"},
        memory_limit_bytes=8 * GIB,
        used_bytes=GIB,
        host_memory_bytes=16 * GIB,
        shared_bytes=8 * GIB,
        shared_free_bytes=8 * GIB,
        shared_place=f"{host}-1",
        scratch_free_bytes=100 * GIB,
        libc="glibc 2.36",
        processor="A processor",
        architecture="x86_64",
        capability="AVX2",
        interfaces=[{"name": "eth0", "addresses": [host], "mbit_per_s": 1_000}],
    )
    return replace(facts, **changes)


def cluster(first: dict | None = None, second: dict | None = None, **changes) -> ClusterFacts:
    """Give two workers on two hosts, all in order but what is changed."""
    workers = (worker(FIRST, **(first or {})), worker(SECOND, **(second or {})))
    facts = ClusterFacts(
        address=SCHEDULER,
        client=ProcessFacts(versions=VERSIONS),
        scheduler=worker(SCHEDULER),
        registered=tuple(one.address for one in workers),
        workers=workers,
        reached={a: Link(source=SCHEDULER, target=a, latency_s=1e-4) for a in (FIRST, SECOND)},
        links=(
            Link(source=FIRST, target=SECOND, latency_s=1e-4),
            Link(source=SECOND, target=FIRST, latency_s=1e-4),
        ),
        speeds={(FIRST, SECOND): 1e9},
        clocks={a: Clock(offset_s=0.001, error_s=0.0005) for a in (FIRST, SECOND)},
        fingerprints={FIRST: "aa", SECOND: "aa", "": "aa"},
        dashboard="http://10.0.0.9:8787/status",
    )
    return replace(facts, **changes)
