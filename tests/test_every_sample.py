"""Every sample once per epoch, with its own target, counted where they are used."""

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


class Model(nn.Module):
    """Gives the rows beside what it makes of them, so that the loss sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return torch.cat([self.layer(x), x], dim=1)


class Recorder(nn.Module):
    """A loss that writes down rows and their targets, in a file for each thread."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, output, target):
        pairs = torch.stack([output[:, 1], target], dim=1)
        with (Path(self.folder) / str(threading.get_ident())).open("ab") as file:
            file.write(pairs.detach().numpy().tobytes())
        return nn.functional.mse_loss(output[:, 0], target)


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
    """With 0 workers, in this process; the target of a row is its number, as the row is."""
    folder = tmp_path_factory.mktemp("seen")
    X, ids = blocks(lengths, known=known)
    # Made apart from X: nothing but the order of rows holds them together.
    y = blocks(lengths, known=known)[0][:, 0]
    ranks = max(1, workers)
    result = dask_nn.train(
        Model(),
        X,
        y,
        loss=Recorder(str(folder)),
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
    seen = Counter[tuple[float, float]]()
    for path in folder.iterdir():
        if path.name != str(threading.get_ident()):
            seen.update(map(tuple, np.fromfile(path, dtype="f4").reshape(-1, 2).tolist()))
    expected = Counter({(float(number), float(number)): EPOCHS for number in ids[:, 0]})
    # Every rank proves that it computes the same bits, with a shard's share of the first rows.
    expected.update({(float(number), float(number)): ranks for number in ids[:rows, 0]})
    assert seen == expected
