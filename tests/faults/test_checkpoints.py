"""Runs that are cut short, and go on from what was saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import dask_nn
from dask_nn.controller import rank_handles
from dask_nn.errors import CheckpointError, ConfigurationError, TrainingInterrupted, WorkerLost
from dask_nn.testing.faults import Fault, arm, clear_faults, disarm, install, slow_steps

cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS_PER_EPOCH = 30
EPOCHS = 3
NEXT_GANG = ("resized", "recovered")


class StopAt(dask_nn.Callback):
    """Ctrl-C after some epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, record: dict[str, float]) -> None:
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_goes_on_with_any_number_of_workers(
    job, undisturbed, make_cluster, ledger, same_bits, tmp_path, workers
):
    folder = tmp_path / "run"
    saved = dask_nn.Checkpoint(folder, every=7, keep=2)
    client = make_cluster(2)
    with pytest.raises(TrainingInterrupted):
        job.train(client, checkpoint=saved, callbacks=[StopAt(1)])
    assert len(names(folder)) <= 2
    newest = names(folder)[-1]
    steps = int(newest.rsplit("-", 1)[1])
    assert 2 * STEPS_PER_EPOCH <= steps < 3 * STEPS_PER_EPOCH
    again = make_cluster(workers) if workers else None
    written = ledger(again) if workers else None
    result = job.train(again, checkpoint=saved, resume=True)
    same_bits(result, undisturbed)
    if written is not None:
        # Nothing before the checkpoint was computed, or even read, again.
        order = {place: rows for place, rows in job.order().items() if place[0] >= steps}
        assert written.check(order)["repeated"] == 0


def test_the_middle_of_an_epoch(job, undisturbed, same_bits, tmp_path):
    class Stop(dask_nn.Callback):
        done = False

        def on_event(self, event: Any) -> None:
            if event.name == "checkpoint" and event.details["steps"] >= 40 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    saved = dask_nn.Checkpoint(tmp_path / "run", every=8)
    arm([(slow_steps(0.02), "")])
    try:
        with pytest.raises(TrainingInterrupted) as caught:
            job.train(None, checkpoint=saved, callbacks=[Stop()])
    finally:
        disarm()
    assert caught.value.result.steps < 90
    result = job.train(None, checkpoint=saved, resume=True)
    same_bits(result, undisturbed)


def test_a_finished_run_goes_on_with_more_epochs(job, same_bits, tmp_path):
    longer = job.train(None, epochs=5)
    job.train(None, checkpoint=tmp_path / "run")
    result = job.train(None, epochs=5, checkpoint=tmp_path / "run", resume=True)
    same_bits(result, longer)


def tell_unless_first(order: str) -> None:
    """Give the ranks of this worker an order, but never the one that saves."""
    for handles in rank_handles._handles.values():
        for handle in handles:
            if handle.rank:
                handle.obey(order)


@pytest.mark.parametrize(("order", "disk_s"), [("leave", 0.0), ("finish", 0.5)])
def test_what_is_reached_is_saved_whoever_is_told_to_leave(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, order, disk_s
):
    """The rank that saves may hear last that a job ends or a client is gone, and then too late."""
    client = make_cluster(2)
    slow_disk = Fault(point="writing a checkpoint", action="sleep", seconds=disk_s)
    install(client, [slow_steps(0.2), slow_disk], tmp_path)

    class Leave(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "first-step":
                client.run(tell_unless_first, order)
            elif event.name in {"checkpoint", *NEXT_GANG}:
                clear_faults(client, ledger=False)

    saved = dask_nn.Checkpoint(tmp_path / "run", every=1_000_000)
    same_bits(job.train(client, checkpoint=saved, callbacks=[heard, Leave()]), undisturbed)
    first, *_ = (event.details["steps"] for event in heard.named("checkpoint"))
    assert 0 < first < EPOCHS * STEPS_PER_EPOCH
    if order == "finish":  # which waits for the disk; after the other a gang may be there before
        names = [event.name for event in heard.events]
        assert names.index("checkpoint") < min(names.index(n) for n in NEXT_GANG if n in names)


def test_all_workers_at_once_go_on_from_the_last_checkpoint(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    written = ledger(client)
    folder = tmp_path / "run"
    victims = sorted(client.run(os.getpid).values())
    install(client, [slow_steps(0.02)], tmp_path)

    class Kill(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "checkpoint" and event.details["steps"] >= 40:
                while victims:
                    os.kill(victims.pop(), signal.SIGKILL)

    saved = dask_nn.Checkpoint(folder, every=10)
    result = job.train(client, checkpoint=saved, callbacks=[heard, Kill()])
    same_bits(result, undisturbed)
    written.check(job.order())
    (resumed,) = heard.named("resumed")
    assert resumed.details["steps"] >= 40
    (recovered, *_) = heard.named("recovered")
    assert recovered.details["step"] == resumed.details["steps"]


@pytest.mark.parametrize("action", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_refuses_costs_a_warning(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, action, workers
):
    folder = tmp_path / "run"
    client = make_cluster(2) if workers else None
    broken = Fault(point="writing a checkpoint", step=60, action=action, every_time=True)
    if client is not None:
        install(client, [broken], tmp_path)
    else:
        arm([(broken, str(tmp_path / "mark"))])
    try:
        result = job.train(client, checkpoint=folder, callbacks=[heard])
    finally:
        if client is None:
            disarm()
    same_bits(result, undisturbed)
    assert [event.details["steps"] for event in heard.named("checkpoint-failed")] == [60, 90]
    assert names(folder) == ["epoch-0001-step-000000030"]
    resumed = job.train(None, checkpoint=folder, resume=True)
    same_bits(resumed, undisturbed)


def test_kill_while_writing(job, undisturbed, make_cluster, same_bits, heard, tmp_path):
    client = make_cluster(2)
    install(client, [Fault(point="writing a checkpoint", step=60), slow_steps(0.02)], tmp_path)
    folder = tmp_path / "run"
    result = job.train(client, checkpoint=folder, callbacks=[heard])
    same_bits(result, undisturbed)
    assert heard.named("worker-lost")
    # The gang that took over saved what the first one could not, wherever it began.
    assert [name[:10] for name in names(folder)] == ["epoch-0001", "epoch-0002", "epoch-0003"]
    assert names(folder)[-1] == "epoch-0003-step-000000090"
    same_bits(job.train(None, checkpoint=folder, resume=True), undisturbed)


def test_a_rank_that_was_given_up_writes_no_checkpoint_when_it_wakes_up(
    job, undisturbed, make_cluster, ledger, same_bits, heard_with, tmp_path
):
    """Nothing of it takes the place of what its successor saves, and nobody is told of it."""
    client = make_cluster(2)
    written = ledger(client)
    stopped = dict(client.run(os.getpid))
    processes = [psutil.Process(pid) for pid in stopped.values()]
    stop = Fault(point="forward", rank=0, step=30, action="stop")
    pause = slow_steps(0.05)
    install(client, [stop, pause], tmp_path)

    def wake_up() -> None:
        for process in processes:
            process.send_signal(signal.SIGCONT)

    heard = heard_with(recovered=wake_up)
    folder = tmp_path / "run"
    result = job.train(
        client,
        checkpoint=dask_nn.Checkpoint(folder, every=20, keep=None),
        callbacks=[heard],
        recovery=dask_nn.Recovery(hang_timeout_s=2, elastic=False),
    )
    same_bits(result, undisturbed)
    written.check(job.order())
    (hung,) = heard.named("worker-hung")
    (evicted,) = [p for p in processes if p.pid == stopped[hung.details["address"]]]
    evicted.wait(timeout=40)  # until then it might write
    steps = [int(name.rsplit("-", 1)[1]) for name in names(folder)]
    assert [step for step in steps if step % 20] == []
    assert [event.details["steps"] for event in heard.named("checkpoint")] == steps
    same_bits(job.train(None, checkpoint=folder, resume=True), undisturbed)


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "flip a bit"])
def test_a_damaged_checkpoint_is_passed_over(
    job, undisturbed, same_bits, heard, tmp_path, file, harm
):
    folder = tmp_path / "run"
    job.train(None, epochs=2, checkpoint=folder)
    target = folder / names(folder)[-1] / file
    data = bytearray(target.read_bytes())
    if harm == "truncate":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 4
    target.write_bytes(data)
    result = job.train(None, checkpoint=folder, resume=True, callbacks=[heard])
    same_bits(result, undisturbed)
    (refused,) = heard.named("checkpoint-refused")
    assert names(folder)[1] in refused.details["path"]
    assert heard.named("resumed")[0].details["steps"] == STEPS_PER_EPOCH


def test_no_valid_checkpoint_is_an_error_before_any_work(job, tmp_path):
    folder = tmp_path / "run"
    job.train(None, epochs=1, checkpoint=folder)
    (folder / names(folder)[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints.*model\.safetensors"):
        job.train(None, checkpoint=folder, resume=True)


def test_a_new_run_does_not_overwrite_an_old_one(job, tmp_path):
    job.train(None, epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="already has checkpoints; go on with resume"):
        job.train(None, epochs=1, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"batch_size": 128}, "batch_size was 64 and is now 128"),
        ({"seed": 5}, "seed was 0 and is now 5"),
        ({"strategy": dask_nn.Synchronous(shards=2)}, "shards was 4 and is now 2"),
        (
            {"optimizer": partial(SGD, lr=0.1, momentum=0.9)},
            r"optimizer was 'SGD.*lr=0\.05.*lr=0\.1",
        ),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss was"),
        ({"lr_scheduler": partial(StepLR, step_size=1)}, "lr_scheduler was 'none'"),
    ],
)
def test_a_run_that_would_go_on_with_other_bits_is_refused(job, tmp_path, other, named):
    job.train(None, epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(ConfigurationError, match=named):
        job.train(None, checkpoint=tmp_path / "run", resume=True, **other)


def test_a_run_that_came_further_already_is_refused(job, tmp_path):
    """Not given back as if it had so few epochs, and not trained any more."""
    saved = dask_nn.Checkpoint(tmp_path / "run", every=40, keep=9)
    job.train(None, epochs=2, checkpoint=saved)
    with pytest.raises(ConfigurationError, match="has come to epoch 2 already, and epochs=1"):
        job.train(None, epochs=1, checkpoint=saved, resume=True)
    assert len(job.train(None, epochs=2, checkpoint=saved, resume=True).history) == 2


def test_shards_are_taken_from_the_checkpoint(job, undisturbed, same_bits, tmp_path):
    job.train(None, epochs=1, checkpoint=tmp_path / "run")
    result = job.train(
        None, checkpoint=tmp_path / "run", resume=True, strategy=dask_nn.Synchronous()
    )
    same_bits(result, undisturbed)


def test_the_best_checkpoint_must_be_judged_by_something_known(job, tmp_path):
    saved = dask_nn.Checkpoint(tmp_path / "run", best="val_loss")
    with pytest.raises(ConfigurationError, match="give validation="):
        job.train(None, checkpoint=saved)


def test_a_place_that_cannot_be_written_is_found_out_first(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run"):
        job.train(None, checkpoint=tmp_path / "file" / "run")


def test_before_a_slurm_job_ends(job, undisturbed, make_cluster, same_bits, heard, tmp_path):
    """One worker's job ends soon; the run is saved once more, and goes on."""
    client = make_cluster(2)
    job.train(client, epochs=1)  # what workers import now, they need not later
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    last = max(client.run(os.getpid))

    def tell(seconds: float) -> None:
        import math
        import time

        os.environ["SLURM_JOB_END_TIME"] = str(math.ceil(time.time() + seconds))

    client.run(tell, 62, workers=[last])
    saved = dask_nn.Checkpoint(tmp_path / "run", every=1000, before_walltime_s=60)
    result = job.train(client, checkpoint=saved, callbacks=[heard])
    same_bits(result, undisturbed)
    (written,) = heard.named("checkpoint")
    assert 10 <= written.details["steps"] < 90


def test_workers_that_are_told_to_end_save_first(
    job, undisturbed, make_scalable, same_bits, heard, tmp_path
):
    """All workers are asked to close at once, as at the end of a SLURM job."""
    client = make_scalable(2)
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    folder = tmp_path / "run"
    recovery = dask_nn.Recovery(workers_timeout_s=3)

    def end() -> None:
        client.cluster.scale(0)

    class End(dask_nn.Callback):
        told = False

        def on_progress(self, progress: Any) -> None:
            if not self.told and progress.step > 10:
                self.told = True
                threading.Thread(target=end).start()

    with pytest.raises((WorkerLost, TrainingInterrupted)):
        job.train(
            client,
            checkpoint=dask_nn.Checkpoint(folder, every=1000),
            recovery=recovery,
            callbacks=[heard, End()],
        )
    assert names(folder)
    result = job.train(None, checkpoint=folder, resume=True)
    same_bits(result, undisturbed)
