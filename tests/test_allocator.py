"""What workers do with freed memory, in processes with the nanny's setting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import threading
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from dask_nn.allocator import keeping_freed_memory

linger_s, size = float(sys.argv[1]), int(sys.argv[2])

def faults(times):
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(times):
        b"x" * size
    return (getrusage(RUSAGE_SELF).ru_minflt - before) / times

def resident_mib():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l)
    return int(line.split()[1]) / 1024

def main():
    # Of large arrays, one fills a thread's heap, so that the next lies in a heap of its own.
    held = b"x" * size
    outside = faults(50)
    base = resident_mib()
    with keeping_freed_memory(lambda: linger_s):
        held = b"x" * size
        faults(1)
        inside = faults(50)
        many = [b"x" * size for _ in range((200 << 20) // size)]
        del many
    between = resident_mib() - base
    with keeping_freed_memory(lambda: linger_s):
        again = faults(50)
    time.sleep(3 * linger_s)
    print(outside, inside, between, again, resident_mib() - base)

thread = threading.Thread(target=main)
thread.run() if sys.argv[3] == "main" else thread.start()
"""
PAGE = 4096


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator and /proc")
@pytest.mark.parametrize("linger_s", [0, 0.5])
@pytest.mark.parametrize("size", [1 << 20, 40 << 20])
@pytest.mark.parametrize("thread", ["main", "another"])
def test_memory_is_kept_while_it_is_used_and_given_back_then(thread, size, linger_s):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(linger_s), str(size), thread],
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    outside, inside, between, again, after = map(float, done.stdout.split())
    pages = size / PAGE
    assert outside > 0.8 * pages, "faulted in each time"
    assert inside < 0.2 * pages
    # Of a heap of another thread than the one that gives back, the end stays.
    stays = size / 2**20 if linger_s and thread == "another" else 0
    assert after < 20 + stays
    if linger_s:
        assert between > 150
        assert again < 0.2 * pages
    else:
        assert between < 20
