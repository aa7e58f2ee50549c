"""What the checks make of facts that no machine of a test has."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from tests.diagnosis.made_facts import (
    FIRST,
    GIB,
    ONE_HOST,
    SCHEDULER,
    SECOND,
    VERSIONS,
    cluster,
    worker,
)

from dask_nn.clusters.open import KINDS
from dask_nn.controller.worker_side import _host_identity
from dask_nn.diagnosis.checks.memory import needed_bytes
from dask_nn.diagnosis.examine import examine
from dask_nn.diagnosis.facts import Clock, ClusterFacts, DataFacts, Link, ProcessFacts
from dask_nn.diagnosis.probe import describe_process
from dask_nn.diagnosis.report import Report, fail, ok, some, warn


def test_two_hosts_in_order_have_one_warning_about_encryption():
    report = examine(cluster())
    bad = {line.check: line.status for line in report.lines if line.status != "ok"}
    assert bad == {"encryption": "warn"}
    assert "TLS" in report["encryption"].remedy


def test_tls_is_in_order():
    facts = cluster(address=SCHEDULER.replace("tcp", "tls"), registered=("tls://10.0.0.1:1111",))
    assert examine(facts)["encryption"].status == "ok"


FAULTS = {
    "a worker with an older Python": (
        {"first": {"versions": VERSIONS | {"python": "3.12.1"}}},
        ("python", "fail", f"{FIRST} has 3.12.1", "Python 3.13"),
    ),
    "a scheduler with another distributed": (
        {"scheduler": worker(SCHEDULER, versions=VERSIONS | {"distributed": "2025.5.0"})},
        ("distributed", "warn", "the scheduler has 2025.5.0", "distributed==2026.8.0"),
    ),
    "another numpy": (
        {"second": {"versions": VERSIONS | {"numpy": "2.1.0"}}},
        ("numpy", "warn", f"{SECOND} has 2.1.0", "numpy==2.5.5"),
    ),
    "a client without torch": (
        {"client": ProcessFacts(versions={k: v for k, v in VERSIONS.items() if k != "torch"})},
        ("torch", "fail", "missing in the client", "install torch"),
    ),
    "a reader that is missing": (
        {"first": {"problems": {"zarr": "is not installed"}}},
        ("packages", "fail", f"zarr on {FIRST}: is not installed", "install"),
    ),
    "more threads than cores": (
        {"first": {"threads": 4}, "second": {"threads": 4}},
        ("threads", "warn", "1 workers with 4 threads on the 2 cores", "fewer workers"),
    ),
    "operators that use all cores": (
        {
            "first": ONE_HOST | {"torch_threads": 2, "environment": {}},
            "second": ONE_HOST | {"torch_threads": 2, "environment": {}},
        },
        ("OMP", "warn", "may use 4 threads on the 2 cores", "OMP_NUM_THREADS=1"),
    ),
    "limits above what the host has": (
        {
            "first": ONE_HOST | {"memory_limit_bytes": 12 * GIB},
            "second": ONE_HOST | {"memory_limit_bytes": 12 * GIB},
        },
        ("memory", "warn", "add up to 24.00 GiB", "--memory-limit 8.00 GiB"),
    ),
    "a worker that Dask has paused": (
        {"first": {"used_bytes": 7 * GIB}},
        ("memory", "fail", f"8.00 GiB on {FIRST}", "--memory-limit"),
    ),
    "little room for data": (
        {"first": {"memory_limit_bytes": 3 * GIB // 2}},
        ("memory", "warn", f"1.50 GiB on {FIRST}", "--memory-limit"),
    ),
    "no limit": (
        {"first": {"memory_limit_bytes": 0}},
        ("memory", "warn", f"no limit on {FIRST}", "--memory-limit auto"),
    ),
    "no room for the exchange anywhere": (
        {"first": ONE_HOST, "second": ONE_HOST | {"shared_free_bytes": 0, "scratch_free_bytes": 0}},
        ("shared memory", "fail", f"0 B free on {SECOND}", "--shm-size"),
    ),
    "little shared memory": (
        {"first": ONE_HOST, "second": ONE_HOST | {"shared_free_bytes": 1 << 20}},
        ("shared memory", "warn", f"1.00 MiB free on {SECOND}", "--shm-size"),
    ),
    "containers that do not share their network": (
        {"first": ONE_HOST, "second": ONE_HOST | {"network": "container"}},
        ("shared memory", "warn", "exchange by gloo", "--ipc=host"),
    ),
    "a scheduler elsewhere than its workers, without TLS": (
        {"first": ONE_HOST, "second": ONE_HOST},
        ("encryption", "warn", "none (tcp), and there are 2 hosts", "TLS"),
    ),
    "a client elsewhere than its cluster, without TLS": (
        {
            "first": ONE_HOST,
            "second": ONE_HOST,
            "scheduler": worker(SCHEDULER, **ONE_HOST),
            "client": ProcessFacts(versions=VERSIONS, machine="laptop", network="laptop"),
        },
        ("encryption", "warn", "none (tcp), and there are 2 hosts", "TLS"),
    ),
    "containers that do not share /dev/shm": (
        {"first": ONE_HOST, "second": ONE_HOST | {"shared_place": "host-2"}},
        ("shared memory", "warn", "exchange by gloo", "--ipc=host"),
    ),
    "another allocator": (
        {"second": {"allocator": "jemalloc"}},
        ("allocator", "warn", f"{SECOND} has jemalloc", "nothing has to be done"),
    ),
    "a client that computes other bits": (
        {"fingerprints": {FIRST: "aa", SECOND: "aa", "": "bb"}},
        ("bits", "warn", "not with this client", "ATEN_CPU_CAPABILITY"),
    ),
    "a worker that cannot compute": (
        {
            "fingerprints": {FIRST: "aa", "": "aa"},
            "fingerprint_errors": {SECOND: "RuntimeError: illegal instruction"},
        },
        ("bits", "fail", f"fails on {SECOND}: RuntimeError: illegal instruction", "mend PyTorch"),
    ),
    "a worker that does not answer in time": (
        {"fingerprints": {FIRST: "aa", "": "aa"}, "fingerprints_unknown": {SECOND: "hangs"}},
        ("bits", "warn", f"equal on 1 worker; not computed on {SECOND} (hangs)", "--timeout"),
    ),
    "a client that cannot import": (
        {"fingerprints": {}, "fingerprints_unknown": {"": "torch: no module"}},
        ("bits", "warn", "not computed: the client (torch: no module)", "torch"),
    ),
    "a client that cannot compute": (
        {"fingerprints": {FIRST: "aa", SECOND: "aa"}, "fingerprint_errors": {"": "no memory"}},
        ("bits", "warn", "equal on 2 workers; not computed on the client (no memory)", "logs"),
    ),
    "one direction that is blocked": (
        {
            "links": (
                Link(source=FIRST, target=SECOND, problem="no answer within 3 s"),
                Link(source=SECOND, target=FIRST, latency_s=1e-4),
            )
        },
        ("connections", "fail", f"{FIRST} cannot reach {SECOND}: no answer", "firewall"),
    ),
    "a slow network": (
        {"speeds": {(FIRST, SECOND): 1e6}},
        ("speed", "warn", f"({FIRST} to {SECOND})", "--interface"),
    ),
    "a transfer that does not end": (
        {"speeds": {(FIRST, SECOND): 0.0}},
        ("speed", "warn", "did not end in time", "--interface"),
    ),
    "a long way": (
        {"links": (Link(source=FIRST, target=SECOND, latency_s=0.02),)},
        ("speed", "warn", "latency at most 20.00 ms", "larger batches"),
    ),
    "a faster network that is not used": (
        {
            "first": {
                "interfaces": [
                    {"name": "eth0", "addresses": ["10.0.0.1"], "mbit_per_s": 1_000},
                    {"name": "ib0", "addresses": ["10.1.0.1"], "mbit_per_s": 100_000},
                ]
            }
        },
        ("interfaces", "warn", "eth0 with 1,000 Mbit/s, ib0 has 100,000", "--interface"),
    ),
    "a clock that is wrong": (
        {"clocks": {FIRST: Clock(offset_s=-30.0, error_s=0.1)}},
        ("clocks", "warn", f"{FIRST} by -30.0 s", "chrony"),
    ),
    "little time": (
        {"first": {"ends_at_s": {"--lifetime": 120.0}}},
        ("walltime", "warn", f"left on {FIRST} (--lifetime)", "walltime"),
    ),
    "a dashboard behind a firewall": (
        {"dashboard_problem": "timed out"},
        ("dashboard", "warn", "timed out", "ssh -L 8787:localhost:8787"),
    ),
    "no dashboard": ({"dashboard": ""}, ("dashboard", "warn", "has none", "bokeh")),
    "no workers": (
        {"registered": (), "workers": (), "links": (), "reached": {}},
        ("workers", "fail", "has none", "scale"),
    ),
    "data that cannot be read": (
        {"data": DataFacts(problem="y is missing")},
        ("blocks", "fail", "y is missing", "dask-nn train"),
    ),
    "blocks that are large for a worker": (
        {"data": DataFacts(lengths=(10, 10), num_blocks=2, row_bytes=200 << 20)},
        ("blocks", "warn", "a worker has room for 1.53 GiB", "at most 7 rows"),
    ),
    "fewer blocks than workers": (
        {"data": DataFacts(lengths=(10,), num_blocks=1, row_bytes=8)},
        ("blocks", "warn", "fewer than the 2 workers", "several blocks"),
    ),
    "a scheduler that does not tell where data lies": (
        {"data": DataFacts(lengths=(10, 10), num_blocks=2, places_problem="no answer")},
        ("placement", "warn", "not known: no answer", "--timeout"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    changes, (check, status, found, remedy) = FAULTS[fault]
    line = examine(cluster(**changes))[check]
    assert line.status == status
    assert found in line.found
    assert remedy in line.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cluster_that_does_not_start_has_a_remedy_of_its_own(kind):
    data = DataFacts(problem="there is no such folder")
    report = examine(ClusterFacts(address="none", not_started="no", kind=kind, data=data))
    line, blocks = report.lines
    assert (line.check, line.status, line.found) == ("cluster", "fail", "no")
    batch_systems = {"slurm", "pbs", "lsf", "sge", "oar", "htcondor"}
    assert ("batch system" in line.remedy) == (kind in batch_systems)
    assert (blocks.check, blocks.status) == ("blocks", "fail")


def test_a_loopback_address_among_several_hosts():
    local = replace(worker("tcp://127.0.0.1:1111"), machine="10.0.0.1")
    facts = cluster()
    facts = replace(facts, workers=(local, facts.workers[1]))
    line = examine(facts)["interfaces"]
    assert line.status == "fail"
    assert "tcp://127.0.0.1:1111: a loopback address" in line.found
    assert "--interface" in line.remedy


def test_a_clock_that_cannot_be_told_from_a_slow_answer_is_in_order():
    facts = cluster(clocks={FIRST: Clock(offset_s=2.0, error_s=1.5)})
    line = examine(facts)["clocks"]
    assert line.status == "ok"
    assert line.found.startswith(
        f"not known well enough, as the answer took too long: {FIRST} (1.5"
    )


def test_data_that_is_about_to_be_held_lies_nowhere_yet():
    data = DataFacts(lengths=(10, 10), num_blocks=2, rows_held={})
    line = examine(cluster(data=data))["placement"]
    assert (line.status, line.found) == ("ok", "nothing is held by workers yet")


def test_a_run_and_the_doctor_mean_the_same_by_a_host():
    facts = ProcessFacts(**asyncio.run(describe_process()))
    assert facts.host == _host_identity()


def test_builds_of_one_version_of_torch_are_the_same_version():
    facts = cluster(first={"versions": VERSIONS | {"torch": "2.13.0+cpu"}})
    line = examine(facts)["torch"]
    assert line.status == "ok"
    assert line.found == "2.13.0 in the client, 2.13.0+cpu elsewhere: fits"


def test_one_rank_on_a_host_needs_no_shared_memory():
    line = examine(cluster(first={"shared_free_bytes": 0}))["shared memory"]
    assert line.status == "ok"
    assert line.found == "not used: one rank a host"


def test_shared_memory_is_counted_as_the_exchange_lays_it_out():
    """Ten million float32 for two ranks: two slots and a result of 40 MB, flags and cells."""
    parameters = 10_000_000
    slots = 3 * -(-parameters * 4 // 4096) * 4096
    rest = needed_bytes(parameters, 2) - slots
    assert 8 << 20 < rest < 9 << 20


def test_a_report_is_as_bad_as_its_worst_line():
    good, mild, bad = ok("a", "fine"), warn("b", "hm", "do"), fail("c", "no", "mend")
    assert Report(scheduler="x", lines=(good,)).status == "ok"
    assert Report(scheduler="x", lines=(good, mild)).status == "warn"
    assert Report(scheduler="x", lines=(bad, good, mild)).status == "fail"


def test_a_report_names_the_checks_it_has():
    with pytest.raises(KeyError, match="no check 'b'; there are a"):
        _ = Report(scheduler="x", lines=(ok("a", "fine"),))["b"]


def test_a_report_as_text_and_as_json():
    report = Report(scheduler="x", lines=(ok("a", "fine", n=1), fail("long", "no", "mend it")))
    assert str(report) == ("ok    a     fine\nfail  long  no\n            -> mend it")
    found = json.loads(report.as_json())
    assert set(found) == {"scheduler", "status", "lines"}
    assert [set(line) for line in found["lines"]] == [
        {"check", "status", "found", "remedy", "details"}
    ] * 2
    assert found["lines"][0]["details"] == {"n": 1}


def test_of_many_the_first_are_named():
    assert some("abcde") == "a, b, c and 2 more"
    assert some("abc") == "a, b, c"
