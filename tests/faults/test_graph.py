"""The graph engine: what the scheduler heals, what dask-nn heals, and what nobody tries again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import cloudpickle
import dask.array as da
import pytest
import torch
from distributed import WorkerPlugin, get_worker

import dask_nn
from dask_nn.controller.graph_watch import WorkerWatch
from dask_nn.errors import IncompatibleWorkers, RankFailed, WorkerLost

cloudpickle.register_pickle_by_value(sys.modules[__name__])

RECOVERY = dask_nn.Recovery(hang_timeout_s=3)


def on_worker() -> bool:
    try:
        get_worker()
    except ValueError:
        return False
    return True


def once(mark: str) -> bool:
    """Tell one process of all that it is the one."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def harm(what: str, mark: str, row: int, x: torch.Tensor) -> torch.Tensor:
    """Do something to the worker that computes with a row of the job, the first time."""
    if not (on_worker() and (x[:, 0] == row).any() and (what == "raise" or once(mark))):
        return x
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(120)
        case "raise":
            raise FileNotFoundError(2, "No such file or directory", "table.csv")
    return x


def row_of(job: Any, step: int, shard: int) -> int:
    """Give a row that the canary does not see, and step and shard meet first."""
    return next(row for row in job.order()[step, shard] if row > 200)


@pytest.mark.parametrize("what", ["kill", "stop", "sleep"])
def test_a_worker_that_dies_or_hangs_in_a_step(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, what
):
    client = make_cluster(2)
    before = dict(client.run(os.getpid))
    transform = partial(harm, what, str(tmp_path / "mark"), row_of(job, 10, 2))

    result = job.train(
        client, engine="graph", transform=transform, callbacks=[heard], recovery=RECOVERY
    )
    same_bits(result, undisturbed)
    assert (tmp_path / "mark").exists(), "the fault never happened"
    (lost,) = heard.named("worker-lost" if what == "kill" else "worker-hung")
    assert lost.details["address"] in before
    assert 0 <= lost.details["step"] <= 30
    (recovered, *_) = heard.named("recovered")
    assert recovered.details["lost"] == [lost.details["address"]]
    assert lost.details["address"] not in client.scheduler_info(n_workers=-1)["workers"]


def test_a_worker_that_dies_while_workers_are_compared(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    """Before there is any state; the sample's first row is the job's first."""
    client = make_cluster(2)
    transform = partial(harm, "kill", str(tmp_path / "mark"), 0)
    result = job.train(
        client, engine="graph", transform=transform, callbacks=[heard], recovery=RECOVERY
    )
    same_bits(result, undisturbed)
    assert heard.named("worker-lost")


@pytest.fixture(scope="module")
def quiet_client():
    """Two workers that no test of this module harms."""
    from dask_nn.clusters.local import local_cluster

    with local_cluster(2, dashboard_address="127.0.0.1:0") as client:
        yield client


def test_an_oserror_of_the_users_code_is_raised_once_with_its_place(job, quiet_client, heard):
    transform = partial(harm, "raise", "", row_of(job, 40, 1))
    with pytest.raises(RankFailed, match=r"FileNotFoundError.*table\.csv") as caught:
        job.train(quiet_client, engine="graph", transform=transform, callbacks=[heard])
    # Its row is met once in every epoch: in the first, wherever the plan of that puts it.
    row = row_of(job, 40, 1)
    places = [place for place, rows in job.order(1).items() if row in rows]
    assert [(caught.value.step, caught.value.rank)] == places
    assert "in harm" in caught.value.traceback
    assert not heard.named("recovered")


def break_block(block: Any) -> Any:
    if on_worker():
        raise ConnectionError("the table's server is down")
    return block


def read_late(block: Any) -> Any:
    if on_worker() and (block[:, 0] == 1000).any():
        time.sleep(3 * RECOVERY.hang_timeout_s)
    return block


def streamed(job: Any, X: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return dask_nn.train(
        torch.nn.Linear(8, 3),
        X,
        da.from_array(job.y, chunks=120),
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        batch_size=64,
        window=2,
        memory="stream",
        strategy=dask_nn.Synchronous(shards=4, threads_per_rank=1),
        **options,
    )


def test_a_block_that_is_read_slowly_is_waited_for(job, quiet_client, same_bits, heard):
    X = da.from_array(job.X, chunks=(120, 8)).map_blocks(read_late, meta=job.X[:0])
    options = {"engine": "graph", "callbacks": [heard], "recovery": RECOVERY}
    result = streamed(job, X, client=quiet_client, **options)
    same_bits(result, streamed(job, X, client=None))
    assert not heard.named("worker-hung")


def test_an_oserror_of_a_streamed_block_is_raised_once_with_its_place(job, quiet_client, heard):
    """Reading fails in a task of its own, which must not look like the cluster's failure."""
    X = da.from_array(job.X, chunks=(120, 8))
    late = da.concatenate([X[:960], X[960:].map_blocks(break_block, meta=job.X[:0])])
    with pytest.raises(RankFailed, match="server is down") as caught:
        streamed(job, late, engine="graph", client=quiet_client, callbacks=[heard])
    assert caught.value.rank in range(4)
    assert caught.value.step >= 0
    assert "in break_block" in caught.value.traceback
    assert not heard.named("recovered")


def test_runs_of_both_engines_take_turns(job, undisturbed, quiet_client, same_bits, heard_with):
    listeners = [heard_with(), heard_with()]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(job.train, quiet_client, engine=engine, callbacks=[listener])
            for engine, listener in zip(("graph", "spmd"), listeners, strict=True)
        ]
        for run in runs:
            same_bits(run.result(timeout=100), undisturbed)
    assert sum(bool(listener.named("queued")) for listener in listeners) == 1


def test_workers_of_another_kind_are_refused_at_resume(job, make_cluster, tmp_path):
    job.train(None, epochs=1, checkpoint=tmp_path / "run")
    client = make_cluster(1)

    class OtherProcessor(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            del worker
            import dask_nn.controller.graph_tasks as graph
            import dask_nn.training.rank_main as spmd

            graph.fingerprint = spmd.fingerprint = lambda *_, **__: b"other bits".ljust(32)

    client.register_plugin(OtherProcessor())
    (address,) = client.scheduler_info(n_workers=-1)["workers"]
    for engine in ("graph", "spmd"):
        with pytest.raises(IncompatibleWorkers, match=f"{address}.* than when the run was saved"):
            job.train(client, engine=engine, checkpoint=tmp_path / "run", resume=True)
    strategy = dask_nn.Synchronous(shards=4, threads_per_rank=1, bitwise=False)
    for epochs, engine in ((2, "graph"), (3, "spmd")):
        result = job.train(
            client,
            engine=engine,
            epochs=epochs,
            checkpoint=tmp_path / "run",
            resume=True,
            strategy=strategy,
        )
        assert not result.bitwise


def always_kill(x: torch.Tensor) -> torch.Tensor:
    if on_worker() and (x[:, 0] == 1919).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_a_step_that_ends_every_worker_is_given_up(job, make_cluster, heard):
    """The scheduler gives a task up after so many dead workers; dask-nn gives the step up."""
    client = make_cluster(2)
    client.run_on_scheduler(forgive_nothing)
    recovery = dask_nn.Recovery(max_failures=1)
    options = {"engine": "graph", "transform": always_kill, "recovery": recovery}
    with pytest.raises(WorkerLost, match="max_failures=1"):
        job.train(client, callbacks=[heard], **options)
    assert heard.named("worker-lost")


def forgive_nothing(dask_scheduler: Any) -> None:
    dask_scheduler.allowed_failures = 0


def test_tasks_that_are_only_slow_are_waited_for(quiet_client):
    """A worker is judged by what its own tasks took before."""
    from dask_nn.controller.cluster import inspect_workers

    losses: list[Any] = []
    watch = WorkerWatch(
        quiet_client,
        inspect_workers(quiet_client),
        "run",
        hang_timeout_s=2.0,
        start_timeout_s=60.0,
        on_loss=losses.append,
    )
    with watch:
        assert watch._complaint((50.0, 0.0)) == ""  # its first task may import much
        assert watch._complaint((11.0, 2.0)) == ""
        assert "has not ended after 13 s" in watch._complaint((13.0, 2.0))
        assert watch._complaint(OSError()) == ""
        assert "no sign of life" in watch._complaint(TimeoutError())
        watch.look()
    assert not losses
    assert not [t for t in threading.enumerate() if t.name == "dask-nn-graph"]
