"""How a rank ends that was told to."""

from __future__ import annotations

import threading
import time
from functools import partial

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.errors import TrainingInterrupted

ROWS, BLOCKS = 64, 4
PATIENCE_S = 20.0
rows_are_awaited, rows_may_come = threading.Event(), threading.Event()
came_in_time: list[bool] = []


def block(number: int) -> np.ndarray:
    if number:
        rows_are_awaited.set()
        came_in_time.append(rows_may_come.wait(PATIENCE_S))
    return np.full((ROWS, 3), number, np.float32)


def slowly(rows: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return rows


def test_what_is_reached_is_saved_before_rows_on_their_way_have_come(tmp_path):
    """They may take longer than a batch system leaves to a job that it ends."""

    class Interrupt(dask_nn.Callback):
        def on_train_start(self, run):
            assert rows_are_awaited.wait(PATIENCE_S)
            raise KeyboardInterrupt

        def on_event(self, event):
            if event.name == "checkpoint":
                rows_may_come.set()

    parts = [dask.delayed(block, pure=False)(number) for number in range(BLOCKS)]
    X = da.concatenate([da.from_delayed(part, (ROWS, 3), dtype=np.float32) for part in parts])
    torch.manual_seed(0)
    with pytest.raises(TrainingInterrupted) as caught:
        dask_nn.train(
            nn.Linear(3, 2),
            X,
            da.zeros(ROWS * BLOCKS, chunks=ROWS, dtype=np.int64),
            loss=nn.CrossEntropyLoss(),
            optimizer=partial(SGD, lr=0.1),
            epochs=1,
            batch_size=4,
            shuffle=False,
            window=1,
            memory="stream",
            transform=slowly,
            strategy=dask_nn.Synchronous(shards=1, threads_per_rank=1),
            checkpoint=tmp_path / "run",
            callbacks=[Interrupt()],
        )
    assert came_in_time == [True]
    assert 0 < caught.value.result.steps < ROWS // 4
