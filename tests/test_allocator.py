"""What workers do with freed memory, in processes with the nanny's setting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
import numpy as np
from dask_nn.allocator import keeping_freed_memory

def faults(times):
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(1 << 20, "u1")
    return (getrusage(RUSAGE_SELF).ru_minflt - before) / times

def resident_mib():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l)
    return int(line.split()[1]) / 1024

outside = faults(50)
base = resident_mib()
with keeping_freed_memory(lambda: LINGER):
    faults(1)
    inside = faults(50)
    many = [np.ones(1 << 20, "u1") for _ in range(200)]
    del many
between = resident_mib() - base
with keeping_freed_memory(lambda: LINGER):
    again = faults(50)
time.sleep(3 * LINGER)
print(outside, inside, between, again, resident_mib() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator and /proc")
@pytest.mark.parametrize("linger_s", [0, 0.5])
def test_memory_is_kept_while_it_is_used_and_given_back_then(linger_s):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("LINGER", str(linger_s))],
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    outside, inside, between, again, after = map(float, done.stdout.split())
    assert outside > 200, "1 MiB is 256 pages, faulted in each time"
    assert inside < 50
    assert after < 20
    if linger_s:
        assert between > 150
        assert again < 50
    else:
        assert between < 20
