"""Real signals to real worker processes; the weights are those of the undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import cloudpickle
import pytest
from distributed import WorkerPlugin

import dask_nn
from dask_nn.controller import worker_side
from dask_nn.controller.rank_group import outcome_of_error
from dask_nn.errors import Aborted, RankFailed, WorkerLost
from dask_nn.testing.faults import Fault, fail_at, install, slow_steps

cloudpickle.register_pickle_by_value(sys.modules[__name__])

IN_A_STEP = (
    "reading",
    "forward",
    "backward",
    "before exchange",
    "between fold and gather",
    "in the optimizer",
)
STEPS = 90


def pids(client: Any) -> dict[str, int]:
    return dict(client.run(os.getpid))


@pytest.mark.parametrize("point", IN_A_STEP)
@pytest.mark.parametrize("rank", [0, 1])
def test_kill_at_each_point_of_a_step(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path, point, rank
):
    client = make_cluster(2)
    written = ledger(client)
    mark = fail_at(client, rank, 40, point, folder=tmp_path)
    result = job.train(client, callbacks=[heard])
    assert mark.exists(), "the fault never happened"
    same_bits(result, undisturbed)
    assert written.check(job.order())["repeated"] <= 2 * 4
    (lost,) = heard.named("worker-lost")
    assert lost.details["rank"] == rank
    (recovered, *_) = heard.named("recovered")
    assert 39 <= recovered.details["step"] <= 41
    assert recovered.details["seconds"] < 3


def test_all_but_one_at_once(job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path):
    client = make_cluster(3)
    written = ledger(client)
    pause = slow_steps(0.02)
    install(client, [pause], tmp_path)
    victims = sorted(pids(client).values())[:2]

    class Kill(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            while victims:
                os.kill(victims.pop(), signal.SIGKILL)

    result = job.train(client, callbacks=[heard, Kill()])
    same_bits(result, undisturbed)
    written.check(job.order())
    assert len(heard.named("worker-lost")) == 2
    assert len(heard.named("recovered")) <= 2


def test_all_at_once_without_a_checkpoint_begins_anew(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    install(client, [Fault(point="backward", rank=r, step=50) for r in (0, 1)], tmp_path)
    result = job.train(client, callbacks=[heard])
    same_bits(result, undisturbed)
    assert heard.named("recovered")[0].details["step"] == 0
    # The replacements are not asked to reach those that they replace.
    assert not heard.named("worker-refused")


def test_a_stopped_process_is_given_up_and_changes_nothing_when_it_wakes_up(
    job, undisturbed, make_cluster, ledger, same_bits, heard_with, tmp_path
):
    client = make_cluster(2)
    written = ledger(client)
    stopped = pids(client)

    def wake_up() -> None:
        for pid in stopped.values():
            os.kill(pid, signal.SIGCONT)

    # It wakes up while the others train on.
    stop = Fault(point="forward", rank=1, step=30, action="stop")
    pause = Fault(point="applied", step=45, action="sleep", seconds=1.0)
    install(client, [stop, pause], tmp_path)
    heard = heard_with(recovered=wake_up)
    began = time.monotonic()
    result = job.train(
        client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    )
    assert time.monotonic() - began < 60
    same_bits(result, undisturbed)
    assert written.check(job.order())["repeated"] <= 2 * 4
    (hung,) = heard.named("worker-hung")
    assert hung.details["rank"] == 1


def test_a_dead_lock_in_the_users_code_is_given_up(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    """And another worker takes the place of that one."""
    client = make_cluster(2)
    written = ledger(client)
    before = pids(client)
    fail_at(client, 1, 30, "forward", action="sleep", seconds=60, folder=tmp_path)
    result = job.train(
        client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=2, elastic=False)
    )
    same_bits(result, undisturbed)
    written.check(job.order())
    assert heard.named("worker-hung")
    client.wait_for_workers(2, timeout=30)
    assert len(set(pids(client).values()) - set(before.values())) == 1


def test_a_slow_worker_is_waited_for(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    client = make_cluster(2)
    written = ledger(client)
    slow = Fault(point="forward", rank=1, action="sleep", seconds=0.02, every_time=True)
    install(client, [slow], tmp_path)
    result = job.train(
        client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=3, elastic=False)
    )
    same_bits(result, undisturbed)
    assert written.check(job.order())["repeated"] == 0
    assert not heard.named("worker-hung")
    assert not heard.named("recovered")


def test_a_slow_worker_is_given_up_past_the_deadline(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    """A rank gets five times its own longest step besides; what takes longer is given up."""
    client = make_cluster(2)
    written = ledger(client)
    slow = Fault(point="forward", rank=1, action="sleep", seconds=0.02, every_time=True)
    slower = Fault(point="forward", rank=1, step=40, action="sleep", seconds=100)
    install(client, [slow, slower], tmp_path)
    result = job.train(
        client, callbacks=[heard], recovery=dask_nn.Recovery(hang_timeout_s=3, elastic=False)
    )
    same_bits(result, undisturbed)
    written.check(job.order())
    (hung,) = heard.named("worker-hung")
    assert hung.details["rank"] == 1
    assert hung.details["step"] == 40


def test_the_nanny_ends_a_worker_that_takes_too_much_memory(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path
):
    # A worker that only imported torch takes half a GiB and more, by the system's count.
    client = make_cluster(2, memory_limit="3 GiB")
    written = ledger(client)
    fail_at(client, 1, 30, "forward", action="memory", folder=tmp_path)
    result = job.train(client, callbacks=[heard])
    same_bits(result, undisturbed)
    written.check(job.order())
    assert heard.named("worker-lost") or heard.named("worker-hung")


@pytest.mark.parametrize("slow", [0, 1])
def test_a_worker_that_is_retired(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path, slow
):
    client = make_cluster(2)
    written = ledger(client)
    address = min(pids(client))
    # Dask lets go of the worker at once; the other one is in the middle of a step then.
    where = {"point": "between fold and gather", "action": "sleep", "every_time": True}
    install(client, [Fault(rank=slow, seconds=0.05, **where)], tmp_path)

    class Retire(dask_nn.Callback):
        done = False

        def on_progress(self, progress: Any) -> None:
            if not self.done and progress.step > 3:
                self.done = True
                client.retire_workers([address])

    result = job.train(
        client, callbacks=[heard, Retire()], recovery=dask_nn.Recovery(max_failures=0)
    )
    same_bits(result, undisturbed)
    # Its rank reached a step boundary: nothing was begun in vain, and nothing failed.
    counts = written.check(job.order())
    assert (counts["repeated"], counts["reapplied"]) == (0, 0)
    assert heard.named("resized")
    assert not heard.named("worker-lost")
    assert address not in pids(client)


def test_a_replacement_takes_its_shards_from_a_peer(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path, unhurried
):
    client = make_cluster(2)
    written = ledger(client)
    install(
        client,
        [
            Fault(point="forward", rank=1, step=10),
            unhurried,
        ],
        tmp_path,
    )
    result = job.train(client, callbacks=[heard])
    same_bits(result, undisturbed)
    written.check(job.order())
    (resized, *_) = heard.named("resized")
    assert resized.details["ranks"] == 2
    assert 10 <= resized.details["step"] < STEPS


@pytest.mark.parametrize(("workers", "point"), [(2, "copying state"), (3, "serving state")])
def test_a_worker_dies_while_a_state_is_copied(
    job, undisturbed, make_cluster, ledger, same_bits, heard, tmp_path, unhurried, workers, point
):
    """The one that joins, and the peer that serves it."""
    client = make_cluster(workers)
    written = ledger(client)
    install(
        client, [Fault(point="forward", rank=1, step=10), Fault(point=point), unhurried], tmp_path
    )
    result = job.train(client, callbacks=[heard])
    same_bits(result, undisturbed)
    written.check(job.order())
    assert len(heard.named("worker-lost")) >= 2


def test_an_exception_of_the_users_code_is_not_tried_again(job, make_cluster, heard, tmp_path):
    client = make_cluster(2)
    fault = Fault(point="forward", rank=1, step=20, action="raise", every_time=True)
    install(client, [fault], tmp_path)
    with pytest.raises(RankFailed, match="broken on purpose") as caught:
        job.train(client, callbacks=[heard])
    assert (caught.value.rank, caught.value.step) == (1, 20)
    assert not heard.named("recovered")


def test_too_many_failures(job, make_cluster, tmp_path):
    client = make_cluster(2)
    install(client, [Fault(point="forward", step=s) for s in (5, 10, 15)], tmp_path)
    with pytest.raises(WorkerLost, match="max_failures=1"):
        job.train(client, recovery=dask_nn.Recovery(max_failures=1))


def test_too_few_workers(job, make_cluster, heard, tmp_path):
    client = make_cluster(2)
    fail_at(client, 1, 5, "forward", folder=tmp_path)
    recovery = dask_nn.Recovery(min_workers=3, workers_timeout_s=1)
    with pytest.raises(WorkerLost, match="min_workers=3") as caught:
        job.train(client, recovery=recovery, callbacks=[heard])
    names = [event.name for event in heard.events]
    assert names[-3:] == ["worker-lost", "waiting", "gave-up"]
    assert [event.name for event in caught.value.events] == names


@pytest.mark.parametrize("bitwise", [True, False])
def test_a_worker_that_computes_other_bits_is_left_out_by_name_or_marks_the_run(
    job, undisturbed, make_cluster, same_bits, heard, tmp_path, bitwise, unhurried
):
    client = make_cluster(2)
    first = set(pids(client))

    class OtherProcessor(WorkerPlugin):
        name = "other-processor"

        def setup(self, worker: Any) -> None:
            if worker.address not in first:
                import dask_nn.training.rank_main as module

                module.fingerprint = lambda *_, **__: b"other bits".ljust(32)

    client.register_plugin(OtherProcessor())
    install(
        client,
        [
            Fault(point="forward", rank=1, step=10),
            # The foreign worker is gone again when the run ends.
            *([] if bitwise else [Fault(point="forward", rank=1, step=86)]),
            unhurried,
        ],
        tmp_path,
    )
    strategy = dask_nn.Synchronous(shards=4, threads_per_rank=1, bitwise=bitwise)
    result = job.train(client, callbacks=[heard], strategy=strategy)
    assert result.bitwise is bitwise
    if not bitwise:
        assert not heard.named("worker-refused")
        assert [event.details["ranks"] for event in heard.named("resized")][:1] == [2]
        assert heard.named("recovered")[-1].details["ranks"] == 1
        return
    same_bits(result, undisturbed)
    refused = heard.named("worker-refused")
    assert {event.details["address"] for event in refused} <= set(pids(client)) - first
    assert refused


def test_a_rank_is_not_started_twice(job, undisturbed, make_cluster, same_bits, heard, tmp_path):
    """The same seat is submitted again while its rank is at work; that one goes on."""
    client = make_cluster(2)
    pause = slow_steps(0.02)
    install(client, [pause], tmp_path)
    twins: list[Any] = []

    def seat_here(dask_worker: Any) -> Any:
        from dask_nn.controller.rank_handles import _handles

        ((run_id, generation),) = _handles
        ((handle,),) = _handles.values()
        return worker_side.Seat(
            run_id=run_id,
            generation=generation,
            rank=handle.rank,
            world_size=2,
            address=dask_worker.address,
            leader=dask_worker.address,
            collective="shared_memory",
        )

    class Repeat(dask_nn.Callback):
        def on_progress(self, progress: Any) -> None:
            if not twins:
                for address, seat in client.run(seat_here).items():
                    twins.append(
                        client.submit(
                            worker_side.run_rank, b"", seat, workers=[address], pure=False
                        )
                    )

    same_bits(job.train(client, callbacks=[heard, Repeat()]), undisturbed)
    assert len(twins) == 2
    for twin in twins:
        with pytest.raises(Aborted, match="running already"):
            twin.result(timeout=10)
        # Where it is the controller's own task that was started twice, its gang begins anew.
        outcome = outcome_of_error(SEAT, twin.exception(timeout=10))
        assert outcome.status == "aborted"
        assert not outcome.has_state
    assert not heard.named("recovered")


SEAT = worker_side.Seat(
    run_id="run",
    generation=0,
    rank=1,
    world_size=2,
    address="tcp://a:1",
    leader="tcp://a:1",
    collective="serial",
)


def test_a_task_that_fails_by_itself_is_told_from_one_whose_worker_is_to_blame():
    assert outcome_of_error(SEAT, LookupError("no torch here")).status == "failed"
    assert outcome_of_error(SEAT, OSError("gone")).status == "aborted"
    assert outcome_of_error(SEAT, None).status == "aborted"
