from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from torch import nn
from torch.optim import SGD

from dask_nn.controller.failure_policy import Recovery
from dask_nn.controller.options import Options
from dask_nn.controller.placement import WorkerFacts
from dask_nn.controller.preparation import _default_shards
from dask_nn.training.strategies import Synchronous

OPTIONS = Options(
    model=nn.Linear(1, 1),
    loss=nn.MSELoss(),
    optimizer=partial(SGD, lr=0.1),
    epochs=1,
    batch_size=128,
    metrics=(),
    strategy=Synchronous(),
    engine="spmd",
    transform=None,
    lr_scheduler=None,
    lr_scheduler_every="epoch",
    clip_grad_norm=None,
    seed=0,
    shuffle=True,
    window=None,
    callbacks=(),
    device="cpu",
    checkpoint=None,
    resume=False,
    recovery=Recovery(),
)


def workers(number: int, *, cores: int, hosts: int = 1) -> tuple[WorkerFacts, ...]:
    return tuple(
        WorkerFacts(
            address=f"tcp://10.0.0.{host}:{port}",
            host=f"host{host}",
            process=port,
            machine="x86_64",
            cores=cores,
            threads=2,
            memory_bytes=0,
            num_gpus=0,
            versions={},
        )
        for host in range(hosts)
        for port in range(number)
    )


@pytest.mark.parametrize(
    ("given", "batch_size", "shards"),
    [
        (workers(2, cores=2), 128, 2),
        (workers(4, cores=2), 128, 2),  # four shards on two ranks would only cost time
        (workers(4, cores=8), 128, 4),
        (workers(3, cores=8), 128, 2),
        (workers(4, cores=2, hosts=3), 96, 6),
        (workers(8, cores=8), 4, 4),
        ((), 128, 1),
    ],
)
def test_by_default_there_is_a_shard_for_each_worker_that_can_train(given, batch_size, shards):
    assert _default_shards(replace(OPTIONS, batch_size=batch_size), given) == shards
