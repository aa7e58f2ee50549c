"""Who lives and computes keeps its state; who hangs is given up, whatever its part in the run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import pytest
from distributed import Client, WorkerPlugin

import dask_nn
from dask_nn.controller import gang_watch, regrouping, run
from dask_nn.controller.gang_watch import GangWatch
from dask_nn.controller.homecoming import Homecoming
from dask_nn.controller.leases import Leases
from dask_nn.controller.rank_group import RankGroup
from dask_nn.controller.scheduler_side import RANK_PREFIX
from dask_nn.data.randomness import own_generator
from dask_nn.errors import ClusterError, TrainingInterrupted, WorkerLost
from dask_nn.testing.faults import Fault, clear_faults, fail_at, install, pretend_cores, slow_steps
from dask_nn.testing.processes import DaskProcess

if TYPE_CHECKING:
    from pathlib import Path

    import torch

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE_S = 60.0


def wait_for(mark: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def pids(client: Any) -> dict[str, int]:
    return dict(client.run(os.getpid))


def test_a_survivor_that_computes_for_long_keeps_its_state(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    """Its shard takes three times the hang timeout, and looks at nothing meanwhile."""
    client = make_cluster(2)
    written = ledger(client)
    busy = Fault(point="forward", rank=0, step=30, action="compute", seconds=6.0)
    install(client, [busy, Fault(point="backward", rank=1, step=30)], tmp_path)
    recovery = dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    result = job.train(client, callbacks=[heard], recovery=recovery)
    same_bits(result, undisturbed)
    written.check(job.order())
    assert [event.details["rank"] for event in heard.named("worker-lost")] == [1]
    assert not heard.named("worker-hung")
    assert heard.named("recovered")[0].details["step"] >= 30


def test_a_resize_waits_for_the_step_under_way(job, make_scalable, same_bits, heard_with, tmp_path):
    """A step of 6 s, and a worker that joins in the middle of it: nobody is given up."""
    client = make_scalable(1)
    strategy = dask_nn.Synchronous(shards=8, threads_per_rank=1)
    slow = Fault(point="forward", action="sleep", seconds=0.75, every_time=True)
    install(client, [slow], tmp_path)
    heard = heard_with(
        first_step=lambda: client.cluster.scale(2), resized=lambda: clear_faults(client)
    )
    result = job.train(
        client,
        callbacks=[heard],
        strategy=strategy,
        epochs=1,
        recovery=dask_nn.Recovery(hang_timeout_s=2.5),
    )
    same_bits(result, job.train(None, strategy=strategy, epochs=1))
    (resized,) = heard.named("resized")
    assert resized.details["ranks"] == 2
    assert resized.details["step"] > 0
    assert not heard.named("worker-hung")


def test_a_stopped_worker_that_only_holds_blocks_is_given_up(
    job, make_cluster, same_bits, heard_with, tmp_path, monkeypatch
):
    # In several epochs ranks would fetch all blocks at the start; even so they read ahead.
    monkeypatch.setitem(dask.config.config["dask-nn"], "block-size", "1 kB")
    options = {"epochs": 1, "window": 1}
    undisturbed = job.train(None, **options)
    client = make_cluster(3)
    pretend_cores(client, 2)
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    processes = pids(client)

    def stop_the_third() -> None:
        busy = client.run(has_a_rank)
        (idle,) = [address for address in busy if not busy[address]]
        os.kill(processes[idle], signal.SIGSTOP)

    heard = heard_with(first_step=stop_the_third)
    recovery = dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    try:
        result = job.train(client, callbacks=[heard], recovery=recovery, **options)
    finally:
        for pid in processes.values():
            os.kill(pid, signal.SIGCONT)
    same_bits(result, undisturbed)
    (hung,) = heard.named("worker-hung")
    assert hung.details["rank"] == -1
    assert not heard.named("recovered"), "its ranks only waited"


def has_a_rank() -> bool:
    from dask_nn.controller.rank_handles import _handles

    return bool(_handles)


@pytest.mark.parametrize("both", [False, True])
def test_a_worker_that_dies_when_its_rank_has_ended(job, make_cluster, same_bits, heard, both):
    """Its outcome cannot be fetched any more; another rank has the same state, or nobody has."""
    client = make_cluster(2)
    first = sorted(pids(client))

    class Die(WorkerPlugin):
        name = "die-at-the-end"

        def setup(self, worker: Any) -> None:
            self.worker = worker

        def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
            victims = first if both else first[:1]
            if self.worker.address in victims and "dask-nn-rank" in str(key) and finish == "memory":
                os.kill(os.getpid(), signal.SIGKILL)

    client.register_plugin(Die())
    result = job.train(client, epochs=1, callbacks=[heard])
    same_bits(result, job.train(None, epochs=1))
    assert result.steps == 30


def test_a_replacement_at_the_same_address_is_another_worker(
    job, undisturbed, tmp_path, same_bits, heard
):
    """With fixed ports, as behind firewalls and in containers."""
    file = tmp_path / "scheduler.json"
    started: list[DaskProcess] = []
    port = str(20_000 + os.getpid() % 10_000)
    try:
        started.append(DaskProcess(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file),
        ))  # fmt: skip
        started.append(DaskProcess(
            "worker", "--scheduler-file", str(file), "--host", "127.0.0.1",
            "--worker-port", port, "--nthreads", "1", "--no-dashboard",
            "--local-directory", str(tmp_path),
        ))  # fmt: skip
        with Client(scheduler_file=str(file), set_as_default=False, timeout=60) as client:
            client.wait_for_workers(1, timeout=60)
            pretend_cores(client, 8)
            before = pids(client)
            fail_at(client, 0, 10, "forward", folder=tmp_path)
            result = job.train(client, callbacks=[heard])
            assert pids(client).keys() == before.keys()
            assert pids(client) != before
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait()
    same_bits(result, undisturbed)
    assert len(heard.named("worker-lost")) == 1
    assert heard.named("waiting")


def test_a_rank_that_waits_for_the_random_generator_is_not_given_up(job, make_cluster, heard_with):
    """Another training of its process may have it for long."""

    def keep_it() -> None:
        with own_generator():
            time.sleep(6)
            kept.set()

    kept = threading.Event()
    heard = heard_with(first_step=keep_it)
    client = make_cluster(2, processes=False)
    recovery = dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    result = job.train(client, epochs=10, callbacks=[heard], recovery=recovery)
    assert kept.is_set(), "it went on without waiting"
    assert {event.name for event in heard.events} <= {"first-step", "epoch"}
    assert result.steps == 300


def test_a_loss_is_named_whatever_comes_first(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, monkeypatch
):
    """Dask cancels the rank of a worker that is gone where nobody else has its payload."""
    client = make_cluster(1)
    ask_first = RankGroup.outcomes
    cancelled = []

    def ask_late(group: RankGroup) -> Any:
        time.sleep(0.1)  # the news of the loss and of the rank's task are both there
        known = ask_first(group)
        time.sleep(0.1)
        known = ask_first(group)
        cancelled.extend(outcome for outcome in known if "cancelled" in outcome.error)
        return known

    monkeypatch.setattr(RankGroup, "outcomes", ask_late)
    fail_at(client, 0, 10, "forward", folder=tmp_path)
    result = job.train(client, callbacks=[heard])
    same_bits(result, undisturbed)
    assert cancelled
    assert len(heard.named("worker-lost")) == 1
    assert not heard.named("gang-broken")


def test_ctrl_c_waits_for_a_long_step(job, make_cluster, heard, tmp_path):
    client = make_cluster(2)
    slow = Fault(point="forward", action="sleep", seconds=1.2, every_time=True)
    install(client, [slow], tmp_path)

    class Stop(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        job.train(client, callbacks=[heard, Stop()])
    assert caught.value.result.steps >= 1
    assert heard.named("stopping")


@pytest.mark.parametrize(
    ("how", "slow_ranks", "step_s", "wait_s", "steps"),
    [
        # Ranks agree to stop in the next step's exchange; what is ended at once has no next step.
        ("held down", [0, 1], 3.2, 8.0, {22}),
        ("twice", [0, 1], 3.2, 8.0, {20, 21}),
        ("twice", [1], 8.0, 7.0, {20, 21}),
    ],
)
def test_ctrl_c_in_a_long_step_loses_nothing(
    job,
    undisturbed,
    make_cluster,
    same_bits,
    heard,
    tmp_path,
    how,
    slow_ranks,
    step_s,
    wait_s,
    steps,
):
    """A key that is held down is one press. After two, a step is not waited for to its end.

    Ranks that come to their end late are still heard.
    """
    client = make_cluster(2)
    long = [
        Fault(point="before exchange", rank=rank, step=20, action="compute", seconds=step_s)
        for rank in slow_ranks
    ]
    mark = install(client, long, tmp_path)[0]
    over = threading.Event()

    def press() -> None:
        wait_for(mark)
        for _ in range(40 if how == "held down" else 2):
            os.kill(os.getpid(), signal.SIGINT)
            if over.wait(1 / 30 if how == "held down" else 1.0):
                return

    fingers = threading.Thread(target=press)
    fingers.start()
    saved = dask_nn.Checkpoint(tmp_path / "run", every=1000)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            job.train(client, checkpoint=saved, callbacks=[heard])
    finally:
        over.set()
        fingers.join()
    assert isinstance(caught.value, TrainingInterrupted)
    assert time.time() - float(mark.read_text()) < wait_s
    assert caught.value.result.steps in steps
    assert heard.named("checkpoint")[-1].details["steps"] == caught.value.result.steps
    same_bits(job.train(None, checkpoint=saved, resume=True), undisturbed)


def test_ctrl_c_while_lost_blocks_are_put_back(
    job, make_cluster, heard_with, tmp_path, monkeypatch
):
    """That may take for ever: the first press stops the ranks, the second leaves the blocks."""
    client = make_cluster(3)
    pretend_cores(client, 2)
    pause = slow_steps(0.05)
    install(client, [pause], tmp_path)
    processes = pids(client)
    pressed_at = []

    def take_long(*_: Any) -> None:
        pressed_at.append(time.time())
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

    def kill_the_third() -> None:
        busy = client.run(has_a_rank)
        (idle,) = [address for address in busy if not busy[address]]
        os.kill(processes[idle], signal.SIGKILL)

    monkeypatch.setattr(run, "_restore", take_long)
    monkeypatch.setattr(gang_watch, "RESTORE_AGAIN_S", 0.0)  # else all ranks may end before
    with pytest.raises(TrainingInterrupted) as caught:
        job.train(client, callbacks=[heard_with(first_step=kill_the_third)])
    assert time.time() - pressed_at[0] < 15
    assert len(pressed_at) == 2
    result = caught.value.result  # ranks without blocks come no further
    (stopping,) = [event for event in result.events if event.name == "stopping"]
    assert stopping.time_s < pressed_at[1]


def test_ctrl_c_when_all_is_done_keeps_the_result(
    job, undisturbed, make_cluster, same_bits, monkeypatch
):
    client = make_cluster(2)
    release = Leases.release

    def press(leases: Leases) -> None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        release(leases)

    monkeypatch.setattr(Leases, "release", press)
    with pytest.raises(KeyboardInterrupt) as caught:
        job.train(client)
    assert isinstance(caught.value, TrainingInterrupted)
    same_bits(caught.value.result, undisturbed)
    same_bits(job.train(client), undisturbed)  # the workers were given back


GANG_MOMENTS = ["a gang forms", "its ranks start", "one is let go of", "the state is fetched"]


@pytest.mark.parametrize("when", GANG_MOMENTS)
def test_ctrl_c_between_gangs_loses_nothing(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, monkeypatch, when
):
    client = make_cluster(2)
    job_steps = undisturbed.steps
    owner, name, step = {
        "a gang forms": (RankGroup, "send", 20),
        "its ranks start": (RankGroup, "start", 20),
        "one is let go of": (GangWatch, "end", 20),
        "the state is fetched": (Homecoming, "finish", job_steps),
    }[when]
    if step < job_steps:
        fail_at(client, 1, step, "forward", folder=tmp_path)
    real = getattr(owner, name)

    def press(self: Any, *arguments: Any) -> Any:
        if name == "start":
            real(self, *arguments)
        if owner is not RankGroup or self.generation == 1:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return None if name == "start" else real(self, *arguments)

    monkeypatch.setattr(owner, name, press)
    saved = dask_nn.Checkpoint(tmp_path / "run", every=1000)
    with pytest.raises(KeyboardInterrupt) as caught:
        job.train(client, checkpoint=saved, callbacks=[heard])
    assert isinstance(caught.value, TrainingInterrupted)
    reached = caught.value.result.steps
    assert reached >= step if name == "start" else reached == step
    assert heard.named("checkpoint")[-1].details["steps"] == reached
    same_bits(job.train(None, checkpoint=saved, resume=True), undisturbed)


def test_ctrl_c_saves_also_when_the_rank_that_writes_is_lost(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    pause = slow_steps(0.05)
    install(client, [pause, Fault(point="writing a checkpoint")], tmp_path)

    class Stop(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            if progress.step >= 10:
                raise KeyboardInterrupt

    saved = dask_nn.Checkpoint(tmp_path / "run", every=1000)
    with pytest.raises(TrainingInterrupted) as caught:
        job.train(client, checkpoint=saved, callbacks=[heard, Stop()])
    assert 10 <= caught.value.result.steps < 90
    (written,) = heard.named("checkpoint")
    assert written.details["steps"] == caught.value.result.steps
    same_bits(job.train(None, checkpoint=saved, resume=True), undisturbed)


@pytest.mark.parametrize("lasts", [True, False])
def test_lost_blocks_for_which_there_is_no_room(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, monkeypatch, lasts
):
    """The run waits for room; at last it is given up, with what it has reached."""
    client = make_cluster(2)
    fail_at(client, 1, 20, "forward", folder=tmp_path)
    restore = run._restore
    refusals = []

    def refuse(*arguments: Any) -> Any:
        if lasts or len(refusals) < 3:
            refusals.append(time.monotonic())
            raise ClusterError("no worker takes data or work")
        return restore(*arguments)

    monkeypatch.setattr(run, "_restore", refuse)
    monkeypatch.setattr(regrouping, "RESTORE_S", 1.0)
    if not lasts:
        same_bits(job.train(client, callbacks=[heard]), undisturbed)
        assert len(refusals) == 3
        return
    with pytest.raises(WorkerLost, match="blocks that were lost cannot be put back") as caught:
        job.train(client, callbacks=[heard])
    assert caught.value.result.steps == 20
    assert heard.named("gave-up")


def test_what_is_reached_is_saved_when_a_run_is_given_up(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    fail_at(client, 1, 40, "forward", folder=tmp_path)
    saved = dask_nn.Checkpoint(tmp_path / "run", every=1000)
    with pytest.raises(WorkerLost, match="max_failures=0") as caught:
        job.train(
            client,
            checkpoint=saved,
            callbacks=[heard],
            recovery=dask_nn.Recovery(max_failures=0),
        )
    assert caught.value.result.steps == 40
    assert [event.name for event in caught.value.events][-2:] == ["gave-up", "checkpoint"]
    same_bits(job.train(None, checkpoint=saved, resume=True), undisturbed)


MARK = "deadly"


def deadly_once(folder: str) -> Any:
    def transform(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            try:
                os.close(os.open(f"{folder}/{MARK}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return x

    return transform


def test_the_start_is_told_once_although_the_first_gang_dies_while_it_forms(
    job, make_cluster, heard, tmp_path
):
    client = make_cluster(2)
    told: list[str] = []

    class Told(dask_nn.Callback):
        def on_train_start(self, run: Any) -> None:
            told.append("start")

    result = job.train(
        client,
        epochs=1,
        transform=deadly_once(str(tmp_path)),
        callbacks=[heard, Told()],
        recovery=dask_nn.Recovery(elastic=False),
    )
    assert (tmp_path / MARK).exists()
    assert told == ["start"]
    assert len(heard.named("first-step")) == 1
    assert result.start_s > 0


def test_a_process_that_is_stopped_before_its_rank_says_a_word(
    job, undisturbed, make_cluster, same_bits, heard_with
):
    """Nor here is it given the two minutes that a gang has to form."""
    client = make_cluster(2)
    processes = pids(client)
    victim = max(processes)

    class Stop(WorkerPlugin):
        name = "stop-at-the-beginning"

        def setup(self, worker: Any) -> None:
            self.worker = worker

        def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
            about_to_run = "dask-nn-rank" in str(key) and finish == "executing"
            if about_to_run and self.worker.address == victim:
                os.kill(os.getpid(), signal.SIGSTOP)

    client.register_plugin(Stop())
    heard = heard_with(recovered=lambda: os.kill(processes[victim], signal.SIGCONT))
    began = time.monotonic()
    try:
        result = job.train(
            client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=2, elastic=False)
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[victim], signal.SIGCONT)
    assert time.monotonic() - began < PATIENCE_S
    same_bits(result, undisturbed)
    (hung,) = heard.named("worker-hung")
    assert hung.details["address"] == victim
    assert hung.details["reason"] == "does not answer"


def test_a_rank_that_falls_silent_while_it_copies_the_state(
    job, undisturbed, make_cluster, same_bits, heard_with, tmp_path
):
    """It need not be given the two minutes that a gang has to form."""
    client = make_cluster(3)
    pretend_cores(client, 2)
    kill = Fault(point="forward", rank=1, step=20)
    stop = Fault(point="copying state", action="stop")
    install(client, [kill, stop], tmp_path)
    processes = pids(client)

    def wake_up() -> None:
        for pid in processes.values():
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue

    heard = heard_with(recovered=wake_up)
    began = time.monotonic()
    result = job.train(
        client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    )
    assert time.monotonic() - began < PATIENCE_S
    same_bits(result, undisturbed)
    assert len(heard.named("worker-lost") + heard.named("worker-hung")) >= 2


def test_a_scheduler_that_is_busy_for_a_while_is_waited_for(
    job, undisturbed, dask_processes, same_bits, heard, tmp_path
):
    """All signs of life come through it: it does not answer for twice the hang timeout."""
    scheduler, _, address = dask_processes(2)

    was_busy = threading.Event()

    def be_busy() -> None:
        scheduler.send_signal(signal.SIGSTOP)
        time.sleep(4)
        scheduler.send_signal(signal.SIGCONT)
        was_busy.set()

    class Busy(dask_nn.Callback):
        def on_epoch_end(self, record: Any) -> None:
            if record["epoch"] == 0:
                threading.Thread(target=be_busy).start()

    recovery = dask_nn.Recovery(hang_timeout_s=2)
    with Client(address, set_as_default=False) as client:
        pause = slow_steps(0.08)
        install(client, [pause], tmp_path)
        result = job.train(client, callbacks=[heard, Busy()], recovery=recovery)
    same_bits(result, undisturbed)
    assert was_busy.is_set()
    assert {event.name for event in heard.events} <= {"first-step", "epoch"}


def test_a_scheduler_that_is_busy_when_the_ranks_end_is_waited_for(
    job, undisturbed, dask_processes, same_bits, heard, monkeypatch
):
    """How they ended is fetched through it: nobody is given up for that."""
    scheduler, _, address = dask_processes(2)
    gather: Any = Client._gather
    asked: list[float] = []
    answered: list[float] = []

    def go_on() -> None:
        time.sleep(5)
        scheduler.send_signal(signal.SIGCONT)

    async def gather_later(client: Client, futures: Any, *more: Any, **options: Any) -> Any:
        if not any(str(getattr(future, "key", "")).startswith(RANK_PREFIX) for future in futures):
            return await gather(client, futures, *more, **options)
        if not asked:
            scheduler.send_signal(signal.SIGSTOP)
            threading.Thread(target=go_on).start()
        asked.append(time.monotonic())
        found = await gather(client, futures, *more, **options)
        answered.append(time.monotonic())
        return found

    monkeypatch.setattr(Client, "_gather", gather_later)
    recovery = dask_nn.Recovery(hang_timeout_s=2, max_failures=0)
    with Client(address, set_as_default=False) as client:
        result = job.train(client, callbacks=[heard], recovery=recovery)
    same_bits(result, undisturbed)
    assert answered[0] - asked[0] > 4
    assert {event.name for event in heard.events} <= {"first-step", "epoch"}


def test_one_is_killed_and_the_other_one_stopped(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    """Who hangs in a gang that is broken already is given up, too."""
    client = make_cluster(2)
    stop = Fault(point="forward", rank=1, step=30, action="stop")
    install(client, [stop, Fault(point="before exchange", rank=0, step=30)], tmp_path)
    stopped = list(pids(client).values())
    began = time.monotonic()
    try:
        result = job.train(client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=2))
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - began < PATIENCE_S
    same_bits(result, undisturbed)
    (lost,), (hung,) = heard.named("worker-lost"), heard.named("worker-hung")
    assert (lost.details["rank"], hung.details["rank"]) == (0, 1)


def test_a_stopped_scheduler_ends_the_run(job, dask_processes, tmp_path, monkeypatch):
    """It holds its connections, and answers nothing."""
    monkeypatch.setattr("dask_nn.controller.cluster.LIST_S", 1.5)
    monkeypatch.setattr("dask_nn.controller.cluster.SILENT_S", 3.0)
    scheduler, _, address = dask_processes(2)

    class Stop(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "first-step":
                scheduler.send_signal(signal.SIGSTOP)

    client = Client(address, set_as_default=False)
    try:
        pause = slow_steps(0.05)
        install(client, [pause], tmp_path)
        began = time.monotonic()
        with pytest.raises(ClusterError, match="did not answer within"):
            job.train(
                client,
                epochs=10_000,
                callbacks=[Stop()],
                recovery=dask_nn.Recovery(hang_timeout_s=2),
            )
        assert time.monotonic() - began < PATIENCE_S
    finally:
        scheduler.send_signal(signal.SIGCONT)
        client.close()


def test_a_scheduler_that_dies_while_a_run_waits_for_another(job, dask_processes):
    scheduler, _, address = dask_processes(1)
    killed_at = []

    class Kill(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "queued":
                killed_at.append(time.monotonic())
                scheduler.kill()

    with Client(address, set_as_default=False) as client:
        Leases(client, "another run").claim(client.scheduler_info(n_workers=-1)["workers"])
        with pytest.raises(ClusterError, match="scheduler"):
            job.train(client, callbacks=[Kill()])
        assert time.monotonic() - killed_at[0] < 15  # and not Dask's thirty
