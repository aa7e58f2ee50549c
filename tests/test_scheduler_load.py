"""What a training asks of the cluster grows with blocks, not with steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pytest
from distributed import SchedulerPlugin, wait
from torch import nn
from torch.optim import SGD

import dask_nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

ROWS, BLOCK, WIDTH = 480, 40, 2_000


class Count(SchedulerPlugin):
    """Counts the tasks that are sent to workers."""

    name = "count-tasks"

    def __init__(self) -> None:
        self.sent = 0

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        self.sent += finish == "processing"


@pytest.fixture
def counted(client: Client) -> Iterator[Client]:
    client.register_plugin(Count())
    yield client
    client.unregister_scheduler_plugin(Count.name)


def tasks(dask_scheduler: Any) -> int:
    return int(dask_scheduler.plugins[Count.name].sent)


def sent_bytes(client: Client) -> int:
    """Count the bytes that workers sent to each other."""
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


def train(X: da.Array, client: Client, **options: Any) -> None:
    dask_nn.train(
        partial(nn.Linear, WIDTH, 1),
        X,
        X[:, :1],
        client=client,
        loss=nn.MSELoss(),
        optimizer=partial(SGD, lr=0.0),
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
        **options,
    )


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_more_steps_and_epochs_are_no_more_tasks(memory, counted):
    X = da.ones((ROWS, WIDTH), chunks=(BLOCK, WIDTH), dtype="f4")
    found = []
    for options in ({"batch_size": 240}, {"batch_size": 4}, {"batch_size": 240, "epochs": 4}):
        before = counted.run_on_scheduler(tasks)
        train(X, counted, memory=memory, **options)
        found.append(counted.run_on_scheduler(tasks) - before)
    assert found[0] > 0
    # A task of a rank or two more or less: 118 steps more per epoch are not seen.
    assert max(found) - min(found) < 10


@pytest.mark.parametrize("shuffle", [True, "within"])
def test_a_block_travels_at_most_once_for_a_window(shuffle, client):
    """However many steps take rows from it."""
    rows = np.arange(ROWS * WIDTH, dtype="f4").reshape(ROWS, WIDTH)
    X = client.persist(da.from_array(rows, chunks=(BLOCK, WIDTH)) + 0)
    wait(X)
    before = sent_bytes(client)
    epochs = 3
    train(X, client, batch_size=4, epochs=epochs, shuffle=shuffle, window=1, memory="resident")
    blocks = ROWS // BLOCK + 1  # one lies between two shards
    # Beside the blocks, targets and what is looked at are small.
    assert sent_bytes(client) - before < (epochs * blocks + 1) * BLOCK * WIDTH * 4
