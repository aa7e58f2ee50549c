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
from dask_nn.testing.faults import install, slow_steps

cloudpickle.register_pickle_by_value(sys.modules[__name__])

KILLS = int(os.environ.get("DASK_NN_STORM_KILLS", "5"))
WORKERS = 3
EPOCHS_PER_KILL = 4
PAUSE_S = 0.02
GROWN_UP_S = 0.25
# Of this process, per recovery: a few hundred KiB are histories and events of the longer run.
GROWTH_KIB = 4096
# Of the worker that holds most. It may have been through few of the recoveries, and no heap gives
# all back: what is looked for is a state, or a mapped file, that stays after each of them.
WORKER_GROWTH_KIB = 8192


def usage() -> dict[str, int]:
    """Count what this process holds."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "kib": int(resident.split()[1]),
    }


def usage_of_workers(client: Any) -> dict[str, int]:
    """Count what the worker holds that holds most."""
    found = client.run(usage, on_error="ignore").values()
    return {name: max(each[name] for each in found) for name in ("descriptors", "threads", "kib")}


def shown(before: dict[str, int], after: dict[str, int], recoveries: int) -> str:
    """Say what grew."""
    growth = (after["kib"] - before["kib"]) / max(1, recoveries)
    return (
        f"descriptors {before['descriptors']} -> {after['descriptors']}, threads "
        f"{before['threads']} -> {after['threads']}, memory {growth:+.0f} KiB per recovery"
    )


def check_growth(before: dict[str, int], after: dict[str, int], most_kib: float) -> None:
    assert after["descriptors"] < before["descriptors"] + 40
    assert after["threads"] < before["threads"] + 10
    assert after["kib"] - before["kib"] < most_kib


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
    pause = slow_steps(PAUSE_S)
    install(client, [pause], tmp_path)
    job.train(client, epochs=1)  # what is loaded once is no leak
    written = ledger(client)
    before, workers_before = usage(), usage_of_workers(client)
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
    after, workers_after = usage(), usage_of_workers(client)
    with capsys.disabled():
        print(  # noqa: T201  (the figures of the reliability table)
            f"\n{len(killed)} kills, {len(recovered)} recoveries, median "
            f"{sorted(recovered)[len(recovered) // 2] if recovered else 0:.2f} s, longest "
            f"{max(recovered, default=0):.2f} s; {counts['repeated']} of {counts['computed']} "
            f"shards computed again; this process: {shown(before, after, len(recovered))}; the "
            f"workers: {shown(workers_before, workers_after, len(recovered))}"
        )
    assert len(killed) == KILLS
    assert recovered
    check_growth(before, after, GROWTH_KIB * len(recovered))
    check_growth(workers_before, workers_after, WORKER_GROWTH_KIB * len(recovered))
    check_remains(client, family)
