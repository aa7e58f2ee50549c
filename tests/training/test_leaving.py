"""How a rank ends that was told to."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.collectives.serial import SerialCommunicator
from dask_nn.config import settings
from dask_nn.controller.options import Options
from dask_nn.controller.preparation import prepare
from dask_nn.data.reader import MemoryReader
from dask_nn.errors import Aborted, TrainingInterrupted
from dask_nn.training import rank_main as rank_main_module
from dask_nn.training.orders import Orders
from dask_nn.training.rank_main import RankEnvironment, rank_main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS, BLOCKS = 64, 4
PATIENCE_S = 20.0
OPTIONS: dict[str, Any] = {
    "loss": nn.CrossEntropyLoss(),
    "optimizer": partial(SGD, lr=0.1),
    "epochs": 1,
    "batch_size": 4,
    "shuffle": False,
    "window": 1,
    "strategy": dask_nn.Synchronous(shards=1, threads_per_rank=1),
}
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
            memory="stream",
            transform=slowly,
            checkpoint=tmp_path / "run",
            callbacks=[Interrupt()],
            **OPTIONS,
        )
    assert came_in_time == [True]
    assert 0 < caught.value.result.steps < ROWS // 4


class SlowRows(MemoryReader):
    """Has all rows but those of the first block late."""

    def __init__(self, arrays: Any, may_come: threading.Event) -> None:
        super().__init__(arrays)
        self._may_come = may_come

    def read_many(self, blocks: Any) -> Any:
        if 0 not in blocks:
            assert self._may_come.wait(PATIENCE_S)
        return super().read_many(blocks)


def environment_of(reader: Any, **options: Any) -> tuple[Any, RankEnvironment]:
    """Prepare a run on one rank, with the reader that `reader` makes of its blocks."""
    X = da.ones((ROWS * BLOCKS, 3), chunks=(ROWS, 3), dtype=np.float32)
    y = np.zeros(ROWS * BLOCKS, np.int64)
    run = prepare(
        Options(model=nn.Linear(3, 2), **OPTIONS),
        X,
        y,
        client=None,
        settings=settings(),
        sample_weight=None,
        validation=None,
    )
    return run.spec, RankEnvironment(
        comm=SerialCommunicator(0, 1), reader=reader(run.blocks.arrays), **options
    )


def test_who_is_told_to_save_while_it_waits_for_rows_saves(tmp_path):
    may_come, orders, told = threading.Event(), Orders(), []
    orders.stop.set()
    spec, env = environment_of(
        partial(SlowRows, may_come=may_come),
        orders=orders,
        checkpoint=dask_nn.Checkpoint(tmp_path / "run"),
        keep=lambda _: threading.Timer(0.5, told_late).start(),
        on_event=lambda name, _: told.append(name),
    )

    def told_late() -> None:
        orders.finish()
        may_come.set()

    outcome = rank_main(spec, env)
    assert (outcome.status, outcome.steps) == ("stopped", 1)
    assert told == ["checkpoint"]


class GoneRows(MemoryReader):
    """Has lost all blocks but the first."""

    def read_many(self, blocks: Any) -> Any:
        if 0 not in blocks:
            message = "nobody has these blocks"
            raise Aborted(message)
        return super().read_many(blocks)


def test_a_step_is_completed_though_the_rows_of_the_next_are_gone():
    """A peer may have completed it already, and its state would be the newer one."""
    left: list[Any] = []
    outcome = rank_main(*environment_of(GoneRows, keep=left.append))
    assert (outcome.status, outcome.steps) == ("aborted", ROWS // 4)
    assert [each.snapshot.steps for each in left] == [ROWS // 4]


def test_peers_hear_of_a_failure_before_anything_else_is_done(monkeypatch):
    """Who publishes meanwhile completes the step alone."""
    heard: list[bool] = []
    tidy_up = rank_main_module.restored_generator

    @contextmanager
    def restored(**options: Any) -> Iterator[None]:
        with tidy_up(**options):
            try:
                yield
            finally:
                heard.append(env.comm.abort_event.is_set())

    monkeypatch.setattr(rank_main_module, "restored_generator", restored)
    spec, env = environment_of(GoneRows)
    assert rank_main(spec, env).status == "aborted"
    assert heard == [True]
