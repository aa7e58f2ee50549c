"""Many kills at random times in one run; ``make storm`` makes it a hundred."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

import dask_nn
from dask_nn.testing.faults import Fault, install

cloudpickle.register_pickle_by_value(sys.modules[__name__])

KILLS = int(os.environ.get("DASK_NN_STORM_KILLS", "8"))
WORKERS = 3
EPOCHS_PER_KILL = 4
PAUSE_S = 0.02
GROWN_UP_S = 0.25
# Of this process, per recovery: a few hundred KiB are histories and events of the longer run.
GROWTH_KIB = 4096


def usage() -> dict[str, int]:
    """Count what a worker, or this process, holds."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "kib": int(resident.split()[1]),
    }


def check_remains(client: Any, family: set[psutil.Process]) -> None:
    """Check that ranks and workers that were killed leave nothing behind."""
    left = [path.name for path in Path("/dev/shm").iterdir() if "dask-nn" in path.name]  # noqa: S108
    assert not left, "shared memory"
    assert len(client.run(os.getpid)) <= WORKERS
    children = set(psutil.Process().children(recursive=True)) - family
    assert len(children) <= 2 * WORKERS + 2, "processes"


@pytest.mark.timeout(120 + 30 * KILLS)
def test_a_storm_of_kills(
    job, make_scalable, ledger, dask_config, same_bits, heard, tmp_path, record_property, capsys
):
    epochs = EPOCHS_PER_KILL * KILLS
    reference = job.train(None, epochs=epochs)
    family = set(psutil.Process().children(recursive=True))
    with dask_config({"distributed.deploy.lost-worker-timeout": "1 s"}):
        client = make_scalable(WORKERS)
    written = ledger(client)
    pause = Fault(point="applied", action="sleep", seconds=PAUSE_S, every_time=True)
    install(client, [pause], tmp_path)
    job.train(client, epochs=1)  # what is loaded once is no leak
    before = usage()
    chance = random.Random(11)
    killed: list[float] = []
    over = threading.Event()

    seen: dict[int, float] = {}

    def victims() -> list[int]:
        """Give the workers that a nanny has seen start: it gives up one that dies before."""
        pids = sorted(client.run(os.getpid, on_error="ignore").values())
        now = time.monotonic()
        return [pid for pid in pids if now - seen.setdefault(pid, now) > GROWN_UP_S]

    def storm() -> None:
        while len(killed) < KILLS and not over.wait(chance.uniform(0.3, 3.0)):
            # The cluster's own children: nannies' workers that are alive now.
            with contextlib.suppress(Exception):
                # A nanny whose worker dies while it starts gives up; a cluster manager would not.
                client.cluster.scale(WORKERS)
                if pids := victims():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)
                        killed.append(time.time())

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        result = job.train(
            client,
            epochs=epochs,
            callbacks=[heard],
            checkpoint=dask_nn.Checkpoint(tmp_path / "run", every=25),
            recovery=dask_nn.Recovery(max_failures=None),
        )
    finally:
        over.set()
        thread.join()
    same_bits(result, reference)
    counts = written.check(job.order(epochs))
    recovered = [event.details["seconds"] for event in heard.named("recovered")]
    after = usage()
    with capsys.disabled():
        growth = (after["kib"] - before["kib"]) / max(1, len(recovered))
        print(  # noqa: T201  (the figures of the reliability table)
            f"\n{len(killed)} kills, {len(recovered)} recoveries, median "
            f"{sorted(recovered)[len(recovered) // 2] if recovered else 0:.2f} s, longest "
            f"{max(recovered, default=0):.2f} s; {counts['repeated']} of {counts['computed']} "
            f"shards computed again; descriptors {before['descriptors']} -> "
            f"{after['descriptors']}, threads {before['threads']} -> {after['threads']}, memory "
            f"{growth:+.0f} KiB per recovery"
        )
    assert len(killed) == KILLS
    assert recovered
    assert after["descriptors"] < before["descriptors"] + 40
    assert after["threads"] < before["threads"] + 10
    assert growth < GROWTH_KIB
    check_remains(client, family)
