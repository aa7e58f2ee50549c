"""Storage that is slower than the run: nobody is given up for waiting, and nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.errors import CheckpointError, ClusterError, TrainingInterrupted, WorkerLost
from dask_nn.testing.faults import Fault, install, slow_steps

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Two files are written for each checkpoint, and the fault sleeps after each of them.
SLOW_S = 2.5
WRITE_S = 2 * SLOW_S
HANG_S = 3.0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def slow(step: int | None = None) -> Fault:
    return Fault(
        point="writing a checkpoint", step=step, action="sleep", seconds=SLOW_S, every_time=True
    )


def test_the_last_checkpoint_is_waited_for(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    """A rank that waits for its disk shows signs of life, however long it takes."""
    client = make_cluster(2)
    install(client, [slow(step=90)], tmp_path)
    recovery = dask_nn.Recovery(hang_timeout_s=WRITE_S - 2)
    result = job.train(client, checkpoint=tmp_path / "run", callbacks=[heard], recovery=recovery)
    same_bits(result, undisturbed)
    assert names(tmp_path / "run")[-1] == "epoch-0003-step-000000090"
    assert heard.named("saving")
    assert not heard.named("worker-hung")
    assert [event.details["steps"] for event in heard.named("checkpoint")] == [30, 60, 90]


def test_storage_that_never_answers_is_given_up_with_a_warning(
    job, undisturbed, same_bits, heard, tmp_path, monkeypatch
):
    from dask_nn.testing.faults import arm, disarm
    from dask_nn.training import checkpointing

    monkeypatch.setattr(checkpointing, "FINISH_S", 1.0)
    arm([(slow(step=90), str(tmp_path / "mark"))])
    try:
        result = job.train(None, checkpoint=tmp_path / "run", callbacks=[heard])
    finally:
        disarm()
    same_bits(result, undisturbed)
    (failed,) = heard.named("checkpoint-failed")
    assert failed.details["steps"] == 90
    assert "within 1 s" in failed.details["reason"]


def test_a_peer_that_dies_does_not_wait_for_the_disk_of_another(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    written = ledger(client)
    kill = Fault(point="forward", rank=1, step=35)
    pause = slow_steps(0.02)
    install(client, [slow(step=30), kill, pause], tmp_path)
    result = job.train(client, checkpoint=tmp_path / "run", callbacks=[heard])
    same_bits(result, undisturbed)
    written.check(job.order())
    assert not heard.named("worker-hung")
    assert len(heard.named("worker-lost")) == 1
    assert heard.named("recovered")[0].details["seconds"] < SLOW_S
    # What the first gang's rank was still writing is there too, or its successor wrote it.
    assert names(tmp_path / "run")[-1] == "epoch-0003-step-000000090"


@pytest.mark.parametrize("engine", ["spmd", "graph"])
def test_ctrl_c_waits_until_it_is_saved(
    job, undisturbed, make_cluster, same_bits, tmp_path, engine
):
    client = make_cluster(2)
    pause = slow_steps(0.02)
    if engine == "spmd":
        install(client, [slow(), pause], tmp_path)

    class Stop(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            if progress.epoch == 1:
                raise KeyboardInterrupt

    folder = tmp_path / "run"
    saved = dask_nn.Checkpoint(folder, every=1000)
    with pytest.raises(TrainingInterrupted) as caught:
        job.train(client, checkpoint=saved, callbacks=[Stop()], engine=engine)
    assert caught.value.result is not None
    steps = caught.value.result.steps
    assert 30 < steps < 90
    assert names(folder) == [f"epoch-{steps // 30:04d}-step-{steps:09d}"]
    same_bits(job.train(None, checkpoint=saved, resume=True), undisturbed)


def block(number: int) -> np.ndarray:
    """Give rows of 8 blocks, of which the first and the fifth are there at once."""
    if number % 4:
        time.sleep(3 * HANG_S)
    return np.ones((64, 3), np.float32)


def slowly(rows: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return rows


def test_who_leaves_while_rows_are_on_their_way_is_not_given_up(make_cluster, heard):
    class Stop(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            raise KeyboardInterrupt

    client = make_cluster(2)
    before = set(client.scheduler_info(n_workers=-1)["workers"])
    parts = [dask.delayed(block, pure=False)(number) for number in range(8)]
    X = da.concatenate([da.from_delayed(part, (64, 3), dtype=np.float32) for part in parts])
    with pytest.raises(TrainingInterrupted) as caught:
        dask_nn.train(
            nn.Linear(3, 2),
            X,
            da.zeros(512, chunks=64, dtype=np.int64),
            loss=nn.CrossEntropyLoss(),
            optimizer=partial(SGD, lr=0.1),
            epochs=1,
            batch_size=4,
            shuffle=False,
            window=1,
            memory="stream",
            transform=slowly,
            strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
            client=client,
            recovery=dask_nn.Recovery(hang_timeout_s=HANG_S),
            callbacks=[heard, Stop()],
        )
    assert 0 < caught.value.result.steps < 32
    assert not heard.named("worker-hung")
    assert set(client.scheduler_info(n_workers=-1)["workers"]) == before


def test_steps_until_the_next_checkpoint_count_over_all_gangs(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    client = make_cluster(3)
    kills = [Fault(point="forward", step=step) for step in (25, 45, 70)]
    install(client, kills, tmp_path)
    saved = dask_nn.Checkpoint(tmp_path / "run", every=50)
    result = job.train(client, checkpoint=saved, callbacks=[heard])
    same_bits(result, undisturbed)
    assert len(heard.named("recovered")) == len(kills)
    assert [event.details["steps"] for event in heard.named("checkpoint")] == [50]


def test_a_folder_that_workers_do_not_share(job, make_cluster):
    with pytest.raises(CheckpointError, match="another place on tcp://"):
        job.train(make_cluster(2), checkpoint="memory://dask-nn-test/not-shared")


def test_nothing_to_resume_is_said(job, heard, tmp_path):
    job.train(None, epochs=1, checkpoint=tmp_path / "run", resume=True, callbacks=[heard])
    (event,) = heard.named("no-checkpoint")
    assert event.details["path"] == str(tmp_path / "run")


def test_workers_that_are_terminated_save_first(
    job, undisturbed, dask_processes, same_bits, heard, tmp_path
):
    """SIGTERM to every worker, as SLURM and Kubernetes send it; the disk takes its time."""
    _, workers, address = dask_processes(2)
    folder = tmp_path / "run"

    class Terminate(dask_nn.Callback):
        told = False

        def on_progress(self, progress: Any) -> None:
            if not self.told and progress.step > 10:
                self.told = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)

    with Client(address, set_as_default=False) as client:
        pause = slow_steps(0.05)
        install(client, [slow(), pause], tmp_path)
        with pytest.raises(WorkerLost):
            job.train(
                client,
                checkpoint=dask_nn.Checkpoint(folder, every=1000),
                recovery=dask_nn.Recovery(workers_timeout_s=3),
                callbacks=[heard, Terminate()],
            )
        for worker in workers:
            worker.wait(timeout=30)
    (newest,) = names(folder)
    assert 10 <= int(newest.rsplit("-", 1)[1]) < 90
    same_bits(job.train(None, checkpoint=folder, resume=True), undisturbed)


def test_the_graph_engine_saves_in_the_middle_and_when_its_scheduler_is_killed(
    job, same_bits, dask_processes, tmp_path
):
    scheduler, _, address = dask_processes(2)
    folder = tmp_path / "run"

    class Kill(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "checkpoint" and event.details["steps"] >= 32:
                threading.Thread(target=kill).start()

    def kill() -> None:
        time.sleep(0.3)
        scheduler.kill()

    saved = dask_nn.Checkpoint(folder, every=20, keep=None)
    with Client(address, set_as_default=False) as client, pytest.raises(ClusterError):
        job.train(client, epochs=400, checkpoint=saved, engine="graph", callbacks=[Kill()])
    steps = [int(name.rsplit("-", 1)[1]) for name in names(folder)]
    assert any(step % 30 for step in steps), "nothing was saved in the middle of an epoch"
    epochs = steps[-1] // 30 + 2
    same_bits(
        job.train(None, epochs=epochs, checkpoint=saved, resume=True),
        job.train(None, epochs=epochs),
    )
