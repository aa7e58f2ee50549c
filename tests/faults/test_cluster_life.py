"""Several trainings on one cluster; clusters that grow, shrink, or lose client or scheduler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import pytest
from distributed import Client
from distributed.core import Status

import dask_nn
from dask_nn.controller import watchdog
from dask_nn.controller.cluster import list_workers
from dask_nn.controller.leases import Leases
from dask_nn.controller.rank_group import RankGroup
from dask_nn.errors import ClusterError, WorkerLost
from dask_nn.testing.faults import Fault, clear_faults, install, slow_steps

if TYPE_CHECKING:
    from collections.abc import Callable

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE_S = 20.0


def slow_down(client: Any, folder: Path, seconds: float) -> None:
    install(
        client,
        [slow_steps(seconds)],
        folder,
    )


def states_kept() -> list[Any]:
    from dask_nn.controller import keeping

    return list(keeping._kept)


def ranks_at_work() -> int:
    from dask_nn.controller.rank_handles import _handles

    return sum(map(len, _handles.values()))


def test_two_trainings_take_turns(job, undisturbed, make_cluster, same_bits, heard_with, tmp_path):
    client = make_cluster(2)
    slow_down(client, tmp_path, 0.01)
    most = []

    class Count(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            most.append(max(client.run(ranks_at_work).values()))

    with Client(client.scheduler.address, set_as_default=False) as second:
        listeners = [heard_with(), heard_with()]
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(job.train, own, callbacks=[listener, Count()])
                for own, listener in zip((client, second), listeners, strict=True)
            ]
            results = [run.result(timeout=60) for run in runs]
    for result in results:
        same_bits(result, undisturbed)
    assert sum(bool(listener.named("queued")) for listener in listeners) == 1
    assert set(most) == {1}


def test_two_trainings_use_different_workers_where_there_are_enough(
    job, undisturbed, make_cluster, same_bits, heard_with
):
    client = make_cluster(2)
    listeners = [heard_with(), heard_with()]
    strategy = dask_nn.Synchronous(shards=1, threads_per_rank=1)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(job.train, client, strategy=strategy, callbacks=[listener])
            for listener in listeners
        ]
        first, second = (run.result(timeout=60) for run in runs)
    same_bits(first, second)
    assert not any(listener.named("queued") for listener in listeners)


def test_a_training_that_waits_too_long_says_for_what(job, make_cluster, dask_config):
    client = make_cluster(1)
    others = Leases(client, "another run")
    others.claim(client.scheduler_info(n_workers=-1)["workers"])
    with (
        dask_config({"dask-nn.queue-timeout": "1 s"}),
        pytest.raises(ClusterError, match="another training still runs on tcp://"),
    ):
        job.train(client)
    others.release()
    job.train(client, epochs=1)


def test_training_inside_a_task(job, undisturbed, make_cluster, same_bits):
    """The only worker has one thread, which the task itself holds."""
    client = make_cluster(1)
    result = client.submit(train_here, job, dask.config.get("dask-nn")).result(timeout=60)
    same_bits(result, undisturbed)
    assert result.run.num_workers == 1


def train_here(job: Any, config: dict[str, Any]) -> Any:
    with dask.config.set({"dask-nn": config}):
        return job.train(None)


@pytest.mark.usefixtures("quick_resizes")
def test_a_cluster_that_grows_and_shrinks(job, make_scalable, ledger, same_bits, heard, tmp_path):
    client = make_scalable(1)
    written = ledger(client)
    slow_down(client, tmp_path, 0.12)

    class Scale(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "first-step":
                client.cluster.scale(3)
            elif event.name == "resized" and event.details["ranks"] > 1:
                client.cluster.scale(1)
            elif event.name in {"resized", "recovered"}:
                clear_faults(client, ledger=False)

    result = job.train(client, epochs=4, callbacks=[heard, Scale()])
    same_bits(result, job.train(None, epochs=4))
    written.check(job.order(4))
    sizes = [e.details["ranks"] for e in heard.events if e.name in {"resized", "recovered"}]
    assert max(sizes) > 1
    assert sizes[-1] == 1


def test_adaptive_scaling_leaves_ranks_alone(job, undisturbed, make_scalable, same_bits, tmp_path):
    client = make_scalable(2)
    slow_down(client, tmp_path, 0.05)
    client.cluster.adapt(minimum=1, maximum=2, interval="200 ms", wait_count=2)
    same_bits(job.train(client), undisturbed)


async def hold_replicas(dask_scheduler: Any) -> None:
    dask_scheduler.held = dask_scheduler._replica_lock("retire-workers")
    await dask_scheduler.held.__aenter__()


async def let_go_of_replicas(dask_scheduler: Any) -> None:
    await dask_scheduler.held.__aexit__(None, None, None)


def test_gangs_form_while_a_worker_is_being_retired(job, undisturbed, make_cluster, same_bits):
    """The scheduler replicates nothing meanwhile, and to move its data may take long."""
    client = make_cluster(2)
    client.run_on_scheduler(hold_replicas)
    try:
        began = time.monotonic()
        same_bits(job.train(client), undisturbed)
        assert time.monotonic() - began < PATIENCE_S
    finally:
        client.run_on_scheduler(let_go_of_replicas)


async def begin_to_retire(address: str, dask_scheduler: Any) -> None:
    """Do what Dask begins with; it moves data then, which may take long, or not be possible."""
    await dask_scheduler.retire_workers(workers=[address], close_workers=False, remove=False)


def think_better_of_it(dask_worker: Any) -> None:
    dask_worker.status = Status.running


def test_a_worker_that_is_closing_gets_no_rank(job, undisturbed, make_cluster, same_bits, heard):
    client = make_cluster(2)
    address = min(client.run(os.getpid))
    client.run_on_scheduler(begin_to_retire, address)
    same_bits(job.train(client, callbacks=[heard]), undisturbed)
    assert not heard.named("resized")
    while any(client.has_what().values()):  # or nobody could take what it has
        time.sleep(0.05)
    client.run_on_scheduler(begin_to_retire, max(client.run(os.getpid)))
    with pytest.raises(ClusterError, match="no workers but 2 that are closing"):
        job.train(client)


def pause(dask_worker: Any) -> None:
    """Do what Dask does when a worker's memory is nearly full; this one has no limit."""
    dask_worker.status = Status.paused


def before_start(monkeypatch: pytest.MonkeyPatch, then: Callable[[RankGroup], Any]) -> None:
    """Let something happen between the choice of a gang and its start."""
    send = RankGroup.send

    def send_late(group: RankGroup, *arguments: Any) -> Any:
        then(group)
        return send(group, *arguments)

    monkeypatch.setattr(RankGroup, "send", send_late)


def test_a_paused_worker_gets_no_rank(
    job, undisturbed, make_cluster, same_bits, heard, monkeypatch
):
    client = make_cluster(2, memory_limit=None)
    client.run(pause, workers=[min(client.run(os.getpid))])
    same_bits(job.train(client, callbacks=[heard]), undisturbed)
    assert not heard.named("resized")

    before_start(monkeypatch, lambda _: client.run(pause))
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="no memory is left to start a task on tcp://"):
        job.train(client, recovery=dask_nn.Recovery(workers_timeout_s=1))
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("how", ["about to be retired", "retired", "paused"])
def test_a_worker_that_starts_no_tasks_when_its_gang_forms(
    job, undisturbed, make_cluster, same_bits, heard, monkeypatch, how
):
    """The gang is called back: nobody waits for its rank, and that is no failure."""
    client = make_cluster(2, memory_limit=None)
    address = max(client.run(os.getpid))

    def hinder(group: RankGroup) -> None:
        if group.generation == 0:
            assert address in {seat.address for seat in group.seats}
            if how == "retired":
                client.retire_workers([address])
            elif how == "about to be retired":
                client.run_on_scheduler(begin_to_retire, address)
            else:
                client.run(pause, workers=[address])

    monkeypatch.setattr("dask_nn.controller.gang_watch.BEGIN_S", 1.0)
    before_start(monkeypatch, hinder)
    began = time.monotonic()
    result = job.train(client, callbacks=[heard], recovery=dask_nn.Recovery(max_failures=0))
    assert time.monotonic() - began < PATIENCE_S
    same_bits(result, undisturbed)
    (resized,) = heard.named("resized")
    assert resized.details["ranks"] == 1
    assert not heard.named("gang-broken")


def test_gang_after_gang_that_cannot_begin_is_a_failure(job, make_cluster, heard, monkeypatch):
    client = make_cluster(1, memory_limit=None)
    monkeypatch.setattr("dask_nn.controller.rank_group.TAKE_S", 0.2)
    started = []
    send = RankGroup.send

    def send_late(group: RankGroup, *arguments: Any) -> Any:
        started.append(group.generation)
        client.run(pause)
        deadline = time.monotonic() + PATIENCE_S
        while not all(worker.is_paused for worker in list_workers(client).values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            return send(group, *arguments)
        finally:
            client.run(think_better_of_it)

    monkeypatch.setattr(RankGroup, "send", send_late)
    with pytest.raises(WorkerLost, match="max_failures=1"):
        job.train(client, callbacks=[heard], recovery=dask_nn.Recovery(max_failures=1))
    assert started == list(range(5))
    assert [e.details["reason"] for e in heard.named("gang-broken")] == [
        f"{number} gangs in a row could not begin" for number in (4, 5)
    ]


@pytest.mark.usefixtures("quick_resizes")
def test_a_worker_that_stays_after_all_takes_part_again(
    job, make_scalable, ledger, same_bits, heard, tmp_path
):
    """Dask gives a retirement up where nobody else can hold the worker's data."""
    client = make_scalable(2)
    written = ledger(client)
    slow_down(client, tmp_path, 0.1)
    address = min(client.run(os.getpid))

    class Hesitate(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "first-step":
                client.run_on_scheduler(begin_to_retire, address)
            elif event.name == "resized" and event.details["ranks"] == 1:
                client.run(think_better_of_it, workers=[address])
            elif event.name == "resized":
                clear_faults(client, ledger=False)

    result = job.train(
        client,
        epochs=5,
        callbacks=[heard, Hesitate()],
        recovery=dask_nn.Recovery(max_failures=0),
    )
    same_bits(result, job.train(None, epochs=5))
    written.check(job.order(5))
    assert [event.details["ranks"] for event in heard.named("resized")] == [1, 2]


@pytest.mark.usefixtures("quick_resizes")
def test_adaptive_scaling_in_both_directions(
    job, make_scalable, ledger, same_bits, heard, tmp_path
):
    """It grows for other work, the run takes part of that, and it leaves when it has to."""
    client = make_scalable(1)
    written = ledger(client)
    slow_down(client, tmp_path, 0.1)
    client.cluster.adapt(minimum=1, maximum=1, interval="200 ms", wait_count=1)
    others: list[Any] = []

    class Adapt(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "first-step":
                client.cluster.adapt(minimum=1, maximum=2, interval="200 ms", wait_count=1)
                others.extend(client.map(time.sleep, [0.2] * 100, pure=False))
            elif event.name == "resized" and event.details["ranks"] == 2:
                for other in others:
                    other.cancel()
                client.cluster.adapt(minimum=1, maximum=1, interval="200 ms", wait_count=1)
            elif event.name in {"resized", "recovered"}:
                clear_faults(client, ledger=False)

    result = job.train(client, epochs=5, callbacks=[heard, Adapt()])
    same_bits(result, job.train(None, epochs=5))
    written.check(job.order(5))
    sizes = [e.details["ranks"] for e in heard.events if e.name in {"resized", "recovered"}]
    assert sizes == [2, 1]


CLIENT = """
import sys
sys.path.insert(0, sys.argv[3])
import dask
from conftest import BLOCK_ROWS, make_job
from distributed import Client
import dask_nn

class Tell(dask_nn.Callback):
    def on_epoch_end(self, record):
        print("epoch", flush=True)

def main():
    with dask.config.set({"dask-nn.block-size": f"{BLOCK_ROWS * 32} B"}):
        make_job().train(Client(sys.argv[1]), epochs=100_000, callbacks=[Tell()],
                         checkpoint=dask_nn.Checkpoint(sys.argv[2], every=1_000_000))

if __name__ == "__main__":
    main()
"""


def resumed_epochs(folder: Path) -> int:
    """Give a number of epochs above what is saved."""
    newest = max(path.parent.name for path in folder.glob("epoch-*/manifest.json"))
    return int(newest.rsplit("-", 1)[1]) // 30 + 2


def wait_for(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_a_client(client: Any, folder: Path, until: Callable[[Any], None]) -> Path:
    """Let another process train and be killed; give what its ranks saved, once they are gone."""
    script = folder / "client.py"
    script.write_text(CLIENT)
    saved = folder / "run"
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, str(script), client.scheduler.address, str(saved), here],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            until(process.stdout)
        finally:
            process.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(client.run(ranks_at_work).values()))
    # Written by a thread that they left.
    wait_for(lambda: list(saved.glob("epoch-*/manifest.json")))
    return saved


def check_saved(job: Any, folder: Path, written: Any) -> int:
    """Check that the steps before what is saved were made, and no other; give their number."""
    (saved,) = folder.glob("epoch-*")
    steps = int(saved.name.rsplit("-", 1)[1])
    order = job.order(steps // 30 + 1)
    done = {place: rows for place, rows in order.items() if place[0] < steps}
    last = {place: rows for place, rows in order.items() if place[0] == steps}
    assert written.check(done, cut_short=last)["repeated"] == 0
    return steps


def test_a_client_that_is_killed(job, undisturbed, make_cluster, ledger, same_bits, tmp_path):
    """The gang saves and frees its workers; what it saved goes on, and so does the cluster."""
    client = make_cluster(2)
    written = ledger(client)
    slow_down(client, tmp_path, 0.02)

    def until(said: Any) -> None:
        assert said.readline().startswith("epoch")

    folder = kill_a_client(client, tmp_path, until)
    assert not any(client.run(states_kept).values()), "a state that nobody will ask for"
    check_saved(job, folder, written)
    epochs = resumed_epochs(folder)
    resumed = job.train(None, epochs=epochs, checkpoint=folder, resume=True)
    same_bits(resumed, job.train(None, epochs=epochs))
    same_bits(job.train(client), undisturbed)


def test_a_client_that_is_killed_while_a_rank_is_late(job, make_cluster, ledger, tmp_path):
    """Its peer waits for it no longer, and saves: it must not complete the step for itself."""
    client = make_cluster(2)
    written = ledger(client)
    client.run(lambda: vars(watchdog).update(ORPHAN_S=0.5))
    late = Fault(rank=1, step=10, point="before exchange", action="sleep", seconds=6.0)
    (mark,) = install(client, [late], tmp_path)

    folder = kill_a_client(client, tmp_path, lambda _: wait_for(mark.exists))
    assert check_saved(job, folder, written) == 10


def test_a_scheduler_that_is_killed_and_started_again(job, same_bits, dask_processes, tmp_path):
    """Client and ranks end within the deadline; the run goes on at the scheduler's next life."""
    scheduler, workers, address = dask_processes(2)
    folder = tmp_path / "run"

    class Kill(dask_nn.Callback):
        def on_event(self, event: Any) -> None:
            if event.name == "checkpoint":
                scheduler.kill()

    with Client(address, set_as_default=False) as client:
        slow_down(client, tmp_path, 0.01)
        began = time.monotonic()
        with pytest.raises(ClusterError, match="connection to the scheduler"):
            job.train(client, epochs=10_000, checkpoint=folder, callbacks=[Kill()])
        assert time.monotonic() - began < 60
    for worker in workers:
        worker.wait(timeout=2 * PATIENCE_S)
    epochs = resumed_epochs(folder)
    assert epochs < 60, "the run went on for too long after its scheduler"
    scheduler.wait(timeout=PATIENCE_S)
    _, _, again = dask_processes(2, port=int(address.rsplit(":", 1)[1]))
    assert again == address
    with Client(again, set_as_default=False) as client:
        resumed = job.train(client, epochs=epochs, checkpoint=folder, resume=True)
    same_bits(resumed, job.train(None, epochs=epochs))


def test_a_replacement_with_more_threads(
    job, undisturbed, dask_processes, ledger, same_bits, heard_with, tmp_path
):
    """The threads of a rank are part of the run; those of its worker are not."""
    _, workers, address = dask_processes(2)

    def replace() -> None:
        dask_processes.start_worker(address, threads=4)

    heard = heard_with(first_step=workers[0].kill, worker_lost=replace)
    with Client(address, set_as_default=False) as client:
        written = ledger(client)
        slow_down(client, tmp_path, 0.02)
        # It goes on only once the other one is there.
        recovery = dask_nn.Recovery(replacement_timeout_s=100)
        result = job.train(client, callbacks=[heard], recovery=recovery)
        threads = client.run(lambda dask_worker: dask_worker.state.nthreads)
    same_bits(result, undisturbed)
    assert result.bitwise
    written.check(job.order())
    assert sorted(threads.values()) == [1, 4]
    assert heard.named("recovered")[-1].details["ranks"] == 2
    assert not heard.named("worker-refused")


def test_nothing_of_a_run_stays_on_the_scheduler(job, make_cluster):
    client = make_cluster(2)
    job.train(client, epochs=1)

    def look(dask_scheduler: Any) -> Any:
        held, waiting = dask_scheduler.dask_nn_leases
        return held, waiting, list(dask_scheduler.tasks)

    held, waiting, tasks = client.run_on_scheduler(look)
    assert not held
    assert not waiting
    deadline = time.monotonic() + 5
    while client.run_on_scheduler(look)[2]:
        assert time.monotonic() < deadline, tasks
        time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name.startswith("dask-nn")]
