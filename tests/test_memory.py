"""A stream takes the memory that docs/data.md says, and nothing is spilled or paused."""

from __future__ import annotations

import contextlib
import os
import threading
from functools import partial

import dask.array as da
import numpy as np
import psutil
import pytest
import torch
from torch import nn

import dask_nn
from dask_nn.clusters.local import local_cluster
from dask_nn.data.memory import Needs, windows_at_a_time

MIB, GIB = 1 << 20, 1 << 30
BLOCK_ROWS, WIDTH, BLOCKS = 8192, 4096, 120
BLOCK_BYTES = BLOCK_ROWS * WIDTH
# Of batches, activations, the allocator and whatever else a process does; less than a window.
SLACK_BYTES = 64 * MIB


class Peak:
    """The most memory that some processes take, while it runs."""

    def __init__(self, client) -> None:
        self._client = client
        self._processes = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        self.before = [process.memory_info().rss for process in self._processes]
        self.bytes = list(self.before)
        self.states: set[str] = set()
        self.spilled = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            with contextlib.suppress(psutil.Error):
                now = [process.memory_info().rss for process in self._processes]
                self.bytes = list(map(max, self.bytes, now))
            for worker in self._client.scheduler_info(n_workers=-1)["workers"].values():
                self.states.add(worker["status"])
                self.spilled += worker["metrics"].get("spilled_bytes", {}).get("disk", 0)


def rows(block, block_info=None):
    number = block_info[None]["chunk-location"][0]
    return np.full((BLOCK_ROWS, WIDTH), number % 251, "u1")


def halve(x: torch.Tensor) -> torch.Tensor:
    return x[:, :8].float() / 255


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("window", [4, 10])
def test_the_peak_is_what_the_formula_says(window):
    X = da.map_blocks(
        rows,
        da.zeros(BLOCK_ROWS * BLOCKS, chunks=BLOCK_ROWS, dtype="u1"),
        chunks=((BLOCK_ROWS,) * BLOCKS, (WIDTH,)),
        new_axis=1,
        dtype="u1",
        meta=np.empty((0, 0), "u1"),
    )
    y = np.zeros(len(X), "f4")
    preload = ("dask_nn.training.rank_main",)
    with local_cluster(2, memory_limit="3 GiB", preload=preload) as client:
        # Everything is imported, and every allocator warm, once a little has been trained.
        options = {
            "loss": nn.MSELoss(),
            "optimizer": partial(torch.optim.SGD, lr=0.0),
            "batch_size": 1024,
            "transform": halve,
            "memory": "stream",
            "window": window,
            "strategy": dask_nn.Synchronous(shards=2, threads_per_rank=1),
        }
        model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
        dask_nn.train(model, X[: 4 * BLOCK_ROWS], y[: 4 * BLOCK_ROWS], **options | {"window": 1})
        with Peak(client) as peak:
            result = dask_nn.train(model, X, y, **options)
    assert result.run.streamed
    size = BLOCK_BYTES + 4 * BLOCK_ROWS
    needs = Needs(rows_bytes=(size,) * BLOCKS, block_bytes=size)
    room = int(3 * GIB * 0.7) - max(peak.before)
    windows = windows_at_a_time(needs, window=window, shards=1, room_bytes=room)
    allowed = needs.total_bytes(window=result.run.window, shards=1, windows=windows)
    assert result.run.size_bytes > 5 * allowed  # or the test would show nothing
    grown = [most - before for most, before in zip(peak.bytes, peak.before, strict=True)]
    assert window * BLOCK_BYTES > SLACK_BYTES  # or one window more would not be seen
    assert max(grown) < allowed + SLACK_BYTES, [size / MIB for size in grown]
    assert peak.states == {"running"}
    assert not peak.spilled
