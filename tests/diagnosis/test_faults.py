"""The doctor finds faults that were planted in real processes, names them, and says what to do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import dask.array as da
import pytest
from click.testing import CliRunner
from distributed import Client, wait

from dask_nn.cli.main import nn
from dask_nn.diagnosis.doctor import doctor
from dask_nn.diagnosis.read_data import read_data, with_places

# The report of all faults is made once, in the setup of the first test.
pytestmark = pytest.mark.timeout(400)
NOBODY = "tcp://127.0.0.1:9"


def test_another_version_of_torch(report, named):
    line = report["torch"]
    assert line.status == "fail"
    assert f"{named['other-torch']} has 2.0.0" in line.found
    assert line.remedy.startswith("install torch==")
    assert named["healthy"] not in line.found


def test_a_package_that_is_missing(report, named):
    line = report["dask-nn"]
    assert line.status == "fail"
    assert f"missing on {named['without-dask-nn']}" in line.found
    assert line.remedy.startswith("install dask-nn==")


def test_what_cannot_be_imported_is_told_once(report, named):
    """The shadowed torch lacks what a rank imports; the worker without dask-nn has its own line."""
    line = report["packages"]
    assert line.status == "fail"
    assert set(line.details["problems"]) == {named["other-torch"]}


def test_mixed_thread_counts(report, named):
    line = report["threads"]
    assert line.status == "warn"
    assert line.found == f"mixed: 1 on most workers, but {named['odd']} has 3"
    assert "same --nthreads" in line.remedy
    line = report["OMP"]
    assert line.status == "warn"
    assert f"{named['odd']} has 2" in line.found
    assert "OMP_NUM_THREADS=1" in line.remedy


@pytest.mark.usefixtures("_needs_namespaces")
def test_a_shared_memory_of_its_own(report, named):
    """A run counts the worker as another host."""
    line = report["shared memory"]
    assert line.status == "warn"
    assert "do not share one: they exchange by gloo" in line.found
    assert "--ipc=host" in line.remedy
    assert line.details["workers"][named["tiny-shared-memory"]]["bytes"] == 1 << 20


def test_a_shared_memory_that_is_too_small_for_two_workers(two_with_tiny_shared_memory):
    """The exchange still has the workers' folder."""
    line = doctor(client=two_with_tiny_shared_memory("true"), timeout_s=100)["shared memory"]
    assert line.status == "warn"
    assert "1.00 MiB free on tcp://127.0.0.1:" in line.found
    assert "but 10 million parameters need 122.70 MiB: the exchange uses a file" in line.found
    assert "--shm-size" in line.remedy
    assert [found["bytes"] for found in line.details["workers"].values()] == [1 << 20, 1 << 20]


def test_a_shared_memory_that_is_too_small_and_a_folder_that_is_too(
    two_with_tiny_shared_memory, tmp_path
):
    client = two_with_tiny_shared_memory(f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}'")
    line = doctor(client=client, timeout_s=100)["shared memory"]
    assert line.status == "fail"
    assert "1.00 MiB free on tcp://127.0.0.1:" in line.found
    assert "and the worker's folder has no room either" in line.found
    assert "--shm-size" in line.remedy


def test_a_memory_limit_that_is_too_low(report, named):
    """The worker lives on: PyTorch is not imported where its memory would end the process."""
    line = report["memory"]
    assert line.status == "fail"
    assert line.found == f"too low for Python with PyTorch: 286.10 MiB on {named['little-memory']}"
    assert "--memory-limit" in line.remedy
    assert named["little-memory"] in report["workers"].details["workers"]
    assert named["little-memory"] not in report["workers"].details["silent"]


def test_another_level_of_kernels(report, named):
    line = report["processor"]
    assert line.status == "warn"
    assert f"{named['odd']} has " in line.found
    assert "DEFAULT (ATEN_CPU_CAPABILITY=default)" in line.found
    assert "ATEN_CPU_CAPABILITY" in line.remedy


def test_other_bits(report, named):
    line = report["bits"]
    assert line.status == "fail"
    assert line.found.startswith(f"other bits on {named['odd']} than on ")
    assert "Synchronous(bitwise=False)" in line.remedy
    # The worker that computes as the client does says so.
    assert line.details["workers"][named["healthy"]] == line.details["client"]


def test_a_port_that_nobody_reaches(report, named):
    line = report["connections"]
    assert line.status == "fail"
    assert f"nobody reaches {NOBODY}: Connection refused (tried by " in line.found
    assert "--contact-address" in line.remedy
    pairs = {(broken["source"], broken["target"]) for broken in line.details["broken"]}
    assert (named["healthy"], NOBODY) in pairs
    assert {target for _, target in pairs} == {NOBODY}
    line = report["workers"]
    assert line.status == "fail"
    assert f"{NOBODY} (Connection refused)" in line.found


def test_a_walltime_that_is_over(report, named):
    line = report["walltime"]
    assert line.status == "fail"
    assert line.found.startswith(f"over: {named['odd']} 60m")
    assert "(SLURM_JOB_END_TIME)" in line.found
    assert "longer walltime" in line.remedy


def test_what_is_in_order_is_said_to_be(report):
    fine = {"scheduler", "python", "dask", "distributed", "numpy", "interfaces", "clocks"}
    assert {report[check].status for check in fine} == {"ok"}
    assert report["dashboard"].status == "ok"


def test_the_command_says_the_same_and_fails(faulty, faulty_client, report):
    """After the report: what is imported already is not imported again."""
    done = CliRunner().invoke(
        nn, ["doctor", "--json", "--timeout", "100", "--scheduler", faulty.address]
    )
    assert done.exit_code == 1, done.output
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["status"] == "fail"
    statuses = {line["check"]: line["status"] for line in found["lines"]}
    expected = {line.check: line.status for line in report.lines}
    measured = {"speed", "clocks"}
    assert {c: s for c, s in statuses.items() if c not in measured} == {
        c: s for c, s in expected.items() if c not in measured
    }


def test_workers_that_hang_or_import_for_ever_are_named_and_the_doctor_ends(
    faulty, faulty_client, launcher, named, report, tmp_path
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(1000)\n")
    launcher.worker(faulty, "importing", PYTHONPATH=str(tmp_path))
    faulty_client.wait_for_workers(len(faulty.workers), timeout=120)
    importing = faulty.addresses(faulty_client)["importing"]
    process = faulty.workers["healthy"]
    os.kill(process.pid, signal.SIGSTOP)
    try:
        found = doctor(client=faulty_client, timeout_s=3)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    line = found["workers"]
    assert line.status == "fail"
    assert f"{named['healthy']} (hangs: no answer within 3 s)" in line.found
    assert found["packages"].status == "fail"
    problems = found["packages"].details["problems"]
    assert problems[importing] == {"PyTorch": "import hangs: no answer within 3 s"}
    # The others are still looked at.
    assert found["walltime"].status == "fail"


def test_blocks_on_one_worker(client):
    """The rows of all blocks lie on one of two workers."""
    first, second = sorted(client.scheduler_info(n_workers=-1)["workers"])
    X = client.persist(da.ones((400, 3), chunks=(100, 3)), workers=[first])
    wait(X)
    line = doctor(X, client=client)["placement"]
    assert line.status == "warn"
    assert line.found == f"skewed: 400 of 400 rows lie on {first}"
    assert "client.rebalance()" in line.remedy
    assert line.details["rows_held"] == {first: 400, second: 0}
    silent = SimpleNamespace(scheduler=SimpleNamespace(who_has=_never))
    facts = asyncio.run(with_places(read_data(X), X, silent, 0.01))
    assert facts.rows_held is None
    assert facts.places_problem == "no answer of the scheduler within 0.01 s"


async def _never(keys):
    await asyncio.Event().wait()


class _Refusing:
    """A function that a worker cannot compute."""

    def __reduce__(self):
        return eval, ("lambda: 1 / 0",)


def test_what_computing_the_test_batch_raises_is_the_reason(client, monkeypatch):
    monkeypatch.setattr("dask_nn.diagnosis.canary.standard_fingerprint", _Refusing())
    line = doctor(client=client)["bits"]
    assert line.status == "fail"
    assert "division by zero" in line.found


def test_blocks_of_very_different_lengths(client):
    X = da.ones((1_000, 3), chunks=((50, 50, 50, 50, 800), 3))
    line = doctor(X, client=client)["blocks"]
    assert line.status == "warn"
    assert "5 of up to 800 rows" in line.found
    assert "half of them have 50 or fewer" in line.found
    assert "X.rechunk({0: 200})" in line.remedy


def test_a_block_that_no_worker_has_room_for(client):
    """Nothing of the data is computed to say so."""
    X = da.zeros((1 << 20, 1 << 20), chunks=(1 << 19, 1 << 20))
    line = doctor(X, client=client)["blocks"]
    assert line.status == "fail"
    assert "rechunk to at most" in line.remedy


def test_a_dead_scheduler(lonely_scheduler):
    """One clear line, from the client that was connected and from the command."""
    address = lonely_scheduler.address
    with Client(address, set_as_default=False, timeout=60) as client:
        lonely_scheduler.scheduler.kill()
        lonely_scheduler.scheduler.wait()
        began = time.monotonic()
        found = doctor(client=client, timeout_s=2)
        assert time.monotonic() - began < 60
    assert [line.check for line in found.lines] == ["scheduler"]
    (line,) = found.lines
    assert line.status == "fail"
    assert line.found == f"{address} does not answer: Connection refused"
    assert "dask scheduler" in line.remedy
    command = [sys.executable, "-m", "dask_nn.cli.main", "doctor", "--timeout", "2"]
    done = subprocess.run(
        [*command, "--scheduler", address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "does not answer: Connection refused" in done.stdout
    assert "This cluster cannot train." in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
