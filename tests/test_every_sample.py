"""Every sample once per epoch, counted by the module that sees them, on any number of workers."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import dask.array as da
import numpy as np
import pytest
import torch
from dask.delayed import delayed
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dask_nn
from dask_nn.testing.faults import pretend_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

EPOCHS = 2


class Recorder(nn.Module):
    """Writes down the rows that it is trained on, in a file for each thread."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        if self.training:
            with (Path(self.folder) / str(threading.get_ident())).open("ab") as file:
                file.write(x.detach().numpy().tobytes())
        return self.layer(x)[:, 0]


@pytest.fixture(scope="module")
def eight(_quiet_dask: None) -> Iterator[Client]:
    """Connect to eight workers of one thread, each of which may run a rank."""
    with (
        LocalCluster(
            n_workers=8, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        pretend_cores(client, 8)
        yield client


def blocks(lengths: list[int], *, known: bool) -> tuple[da.Array, np.ndarray]:
    """Make an array of numbered rows with such blocks, whose lengths Dask may know."""
    starts = np.cumsum([0, *lengths])
    ids = np.arange(starts[-1], dtype="f4")[:, None]
    parts = [
        da.from_delayed(
            delayed(ids[start : start + rows]),
            (rows if known else np.nan, 1),
            dtype="f4",
            meta=ids[:0],
        )
        for start, rows in zip(starts[:-1], lengths, strict=True)
    ]
    return da.concatenate(parts, allow_unknown_chunksizes=True), ids


layouts = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda c: sum(c) >= 16)


@settings(
    max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=layouts,
    known=st.booleans(),
    memory=st.sampled_from(["resident", "stream"]),
    window=st.integers(1, 4),
    workers=st.integers(0, 8),
    rows=st.integers(1, 2),
)
def test_every_sample_once_per_epoch(
    lengths, known, memory, window, workers, rows, eight, tmp_path_factory
):
    """With 0 workers, in this process."""
    folder = tmp_path_factory.mktemp("seen")
    X, ids = blocks(lengths, known=known)
    ranks = max(1, workers)
    result = dask_nn.train(
        Recorder(str(folder)),
        X,
        X[:, 0] * 0,
        loss=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        batch_size=ranks * rows,
        epochs=EPOCHS,
        window=window,
        strategy=dask_nn.Synchronous(shards=ranks, threads_per_rank=1),
        memory=memory,
        client=eight if workers else None,
    )
    assert result.run.world_size == ranks
    # What the client tries on a few rows before the start was seen by this thread.
    seen = Counter[float]()
    for path in folder.iterdir():
        if path.name != str(threading.get_ident()):
            seen.update(np.fromfile(path, dtype="f4").tolist())
    expected = Counter({float(number): EPOCHS for number in ids[:, 0]})
    # Every rank proves that it computes the same bits, with a shard's share of the first rows.
    expected.update({float(number): ranks for number in ids[:rows, 0]})
    assert seen == expected
