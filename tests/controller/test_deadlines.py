"""Nothing of a run waits for Dask without a deadline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dask_nn.controller

# Client methods that wait for a worker or the scheduler as long as it takes, and futures likewise.
ENDLESS = re.compile(
    r"client\.(run|run_on_scheduler|gather|scatter|scheduler_info|who_has|has_what|submit"
    r"|nthreads|ncores|processing|cancel|replicate|rebalance)\("
    r"|\.(result|exception)\(\)"
)
# What does not wait.
HARMLESS = re.compile(
    r"client\.submit\(|(fetch|_inquiry|future|results?\[0\])\.(result|exception)\(\)"
)
FILES = (
    "admission",
    "cluster",
    "gang_watch",
    "homecoming",
    "leases",
    "listening",
    "membership",
    "rank_group",
    "reachability",
    "spmd",
)


@pytest.mark.parametrize("name", FILES)
def test_the_client_waits_for_nobody_without_a_deadline(name):
    path = Path(next(iter(dask_nn.controller.__path__)), f"{name}.py")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(lines, start=1)
        if ENDLESS.search(HARMLESS.sub("", line))
    ]
    assert not found
