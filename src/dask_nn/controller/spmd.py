"""The spmd engine: gang after gang of rank tasks, until the run is done."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers, scheduler_lost
from dask_nn.controller.gang_end import GangEnd
from dask_nn.controller.gang_run import run_gang
from dask_nn.controller.gang_watch import GangWatch
from dask_nn.controller.heartbeats import Heartbeats
from dask_nn.controller.homecoming import Homecoming
from dask_nn.controller.kept_states import KeptStates
from dask_nn.controller.leases import Leases
from dask_nn.controller.listening import Listener, RankMessages
from dask_nn.controller.lost_blocks import LostBlocks
from dask_nn.controller.membership import Membership
from dask_nn.controller.rank_group import RankGroup, choose_again
from dask_nn.controller.regrouping import Regrouping
from dask_nn.controller.seats import Seats
from dask_nn.controller.worker_side import forget_older, forget_run, forget_runs_but
from dask_nn.errors import CheckpointError, ClusterError, WorkerLost
from dask_nn.events import Event
from dask_nn.training.checkpointing import LastSave
from dask_nn.training.outcome import RunEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.keeping import StateSource
    from dask_nn.controller.placement import Seating, WorkerFacts
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.presses import Presses
    from dask_nn.training.snapshot import Snapshot

__all__ = ["Listener", "run_spmd"]

# A gang grows at most so often: each time costs a fraction of a second.
RESIZE_EVERY_S = 5.0
# So many gangs in a row may be called back before their first step without being a failure.
MOST_RECALLS = 3
FORGET_S = 1.0


def run_spmd(
    payload: RankPayload,
    *,
    client: Client,
    workers: Sequence[WorkerFacts],
    seating: Seating,
    listener: Listener,
    recovery: Recovery,
    restore_blocks: Callable[[], None],
    reload: Callable[[], Snapshot | None],
    presses: Presses,
) -> RunEnd:
    """Train, with as many gangs as it takes.

    Parameters
    ----------
    payload : RankPayload
        What the ranks are sent.
    client : Client
        Of the cluster.
    workers : sequence of WorkerFacts
        All workers of the cluster.
    seating : Seating
        The first gang's workers.
    listener : Listener
        Told of starts, progress, epochs and events.
    recovery : Recovery
        How to go on when workers are lost, hang or join.
    restore_blocks : callable
        Puts blocks that only the client can make again back on the cluster.
    reload : callable
        Gives the newest checkpoint's state where all ranks were lost; None for the beginning.
    presses : Presses
        Of Ctrl-C; those that come when all is done stay pending.

    Returns
    -------
    RunEnd
        Also where workers were lost and `recovery` says not to go on.

    Raises
    ------
    ClusterError
        If the scheduler is gone, or other trainings keep the workers for too long.
    """
    changed = threading.Event()
    with (
        _naming_the_scheduler(client),
        Membership(client, workers, changed, payload.checkpoint) as membership,
    ):
        run = _Run(
            payload,
            client=client,
            membership=membership,
            changed=changed,
            listener=listener,
            recovery=recovery,
            restore_blocks=restore_blocks,
            reload=reload,
            presses=presses,
        )
        with run.at_work():
            return run.train(seating)


@contextlib.contextmanager
def _naming_the_scheduler(client: Client) -> Iterator[None]:
    """Turn what Dask raises without a scheduler into the error that says so."""
    try:
        yield
    except (OSError, KeyError, CancelledError) as error:
        if client.status == "running":
            raise
        raise scheduler_lost(client) from error


class _Run:
    def __init__(
        self,
        payload: RankPayload,
        *,
        client: Client,
        membership: Membership,
        changed: threading.Event,
        listener: Listener,
        recovery: Recovery,
        restore_blocks: Callable[[], None],
        reload: Callable[[], Snapshot | None],
        presses: Presses,
    ) -> None:
        self._presses = presses
        self._payload = payload
        self._client = client
        self._membership = membership
        self._changed = changed
        self._listener = listener
        self._recovery = recovery
        self._reload = reload
        self._run_id = uuid.uuid4().hex[:12]
        self._leases = Leases(client, self._run_id)
        self._seats = Seats(membership, self._leases, payload.spec)
        self._heartbeats = Heartbeats(
            hang_timeout_s=recovery.hang_timeout_s,
            start_timeout_s=payload.settings.start_timeout_s,
            exchange_timeout_s=payload.settings.exchange_timeout_s,
        )
        self._messages = RankMessages(
            client,
            f"dask-nn-{self._run_id}",
            changed,
            heartbeats=self._heartbeats,
            listener=listener,
            on_start=self._note_start,
        )
        self._messages.note_start_from(payload.start)
        blocks = LostBlocks(client, membership, restore_blocks)
        self._watch = GangWatch(
            client,
            membership=membership,
            heartbeats=self._heartbeats,
            messages=self._messages,
            recovery=recovery,
            changed=changed,
            listener=listener,
            wants_resize=self._wants_resize,
            blocks=blocks,
            presses=presses,
        )
        self._canary = b""
        self._told_start = False
        self._kept = KeptStates()
        self._home = Homecoming(
            client,
            self._run_id,
            kept=self._kept,
            checkpoint=payload.checkpoint,
            configuration=payload.configuration,
            saved=lambda: self._messages.saved[:2],
            on_event=lambda name, details: self._tell(name, **details),
            presses=presses,
        )
        self._generation = 0
        self._regrouping = Regrouping(
            recovery,
            seats=self._seats,
            membership=membership,
            watch=self._watch,
            blocks=blocks,
            tell=self._tell,
        )
        self._last_end: GangEnd | None = None
        self._ranks = 0
        self._told_of_encryption = False
        self._started_at = 0
        self._resized = time.monotonic()
        self._recalls = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Hear the ranks for the length of a block; nothing of the run stays after it."""
        self._messages.subscribe()
        try:
            yield
        finally:
            if self._client.status == "running":
                self._forget()
            del self._regrouping, self._watch, self._messages, self._home

    def _forget(self) -> None:
        with contextlib.suppress(Exception):  # what ended the run says more
            self._messages.unsubscribe()
            self._leases.release()
            self._ask_all(forget_run, self._run_id).result(2 * FORGET_S)

    def _ask_all(self, function: Callable[..., None], *arguments: Any) -> Future[dict[str, Any]]:
        present = self._membership.present
        return ask_workers(self._client, function, present, *arguments, timeout_s=FORGET_S)

    def train(self, seating: Seating) -> RunEnd:
        """Run gang after gang."""
        try:
            with self._presses.heard():
                seating = self._seats.claim_first(
                    seating,
                    queue_timeout_s=self._payload.settings.queue_timeout_s,
                    on_queued=lambda others: self._tell("queued", workers=sorted(others)),
                )
                seating = self._look_again(seating)
                self._forget_others()
        except KeyboardInterrupt:
            return RunEnd(outcomes=[], interrupted=True)
        except WorkerLost as error:
            return RunEnd(outcomes=[], lost=error)
        while True:
            end = self._run_gang(seating)
            self._note_kept(end)
            try:
                with self._presses.heard():
                    self._messages.deliver()
                    if end.cause is None:
                        outcomes = self._home.finish(end, self._generation)
                        if outcomes is not None:
                            return RunEnd(outcomes=outcomes, interrupted=end.interrupted)
                        end.break_off("broken", "no rank is left to say how it ended")
                    self._count_recalls(end)
                    self._last_end = end
                    seating = self._next_seating(seating, end)
            except KeyboardInterrupt:
                self._presses.is_another()
                self._deliver_anyway()
                outcomes = self._home.salvage(end, self._generation)
                return RunEnd(outcomes=outcomes, interrupted=True)
            except WorkerLost as error:
                outcomes = self._home.salvage(end, self._generation)
                return RunEnd(outcomes=outcomes, lost=error)
            self._generation += 1

    def _deliver_anyway(self) -> None:
        """Pass on all that the ranks have said, also to callbacks that interrupt each time."""
        while True:
            try:
                self._messages.deliver()
            except KeyboardInterrupt:  # that message was passed on
                continue
            return

    def _note_kept(self, end: GangEnd) -> None:
        removed = self._membership.removed
        self._kept.note(end.outcomes, generation=self._generation, removed=removed)

    def _look_again(self, seating: Seating) -> Seating:
        """Choose anew if workers of the first gang have left, or start no tasks, by now."""
        self._membership.catch_up()
        known = self._membership.known
        if all(a in known and self._membership.starts_tasks(a) for a in seating.addresses):
            return seating
        return self._next_seating(seating, GangEnd(cause="resize"))

    def _count_recalls(self, end: GangEnd) -> None:
        """Take it for a failure if gang after gang could not begin."""
        if self._heartbeats.have_started or end.cause != "resize":
            self._recalls = 0
            return
        self._recalls += 1
        self._resized = time.monotonic()
        if self._recalls > MOST_RECALLS:
            end.break_off("broken", f"{self._recalls} gangs in a row could not begin")

    def _forget_others(self) -> None:
        """Let the workers forget what the runs of clients that were killed have left there."""
        try:
            runs = self._leases.runs()
        except ClusterError:  # it is tidied up another time
            if self._client.status != "running":
                raise
            return
        self._ask_all(forget_runs_but, runs)

    def _run_gang(self, seating: Seating) -> GangEnd:
        self._heartbeats.clear()
        self._messages.generation = self._generation
        self._membership.engaged = frozenset(seating.addresses)
        self._ranks = len(seating.workers)
        collective = choose_again(
            seating,
            device=self._payload.spec.device,
            wanted=self._payload.settings.collective,
        )
        try:
            with self._presses.heard():
                if self._generation:
                    self._prepare_next_gang()
                self._tell_of_encryption(seating, collective)
        except KeyboardInterrupt:
            return GangEnd(interrupted=True)
        group = RankGroup(
            self._client,
            run_id=self._run_id,
            generation=self._generation,
            seating=seating,
            collective=collective,
            changed=self._changed,
            source=self._kept.newest,
            canary=self._canary,
            hang_timeout_s=self._recovery.hang_timeout_s,
        )
        end = run_gang(
            group,
            self._payload,
            client=self._client,
            membership=self._membership,
            watch=self._watch,
            presses=self._presses,
        )
        self._membership.engaged = ()
        return end

    def _tell_of_encryption(self, seating: Seating, collective: str) -> None:
        """Say once that gradients do not take the fastest way, and why."""
        encrypted = any(worker.encrypted for worker in seating.workers)
        if encrypted and collective.endswith("dask") and not self._told_of_encryption:
            self._told_of_encryption = True
            hosts = sorted({worker.host for worker in seating.workers})
            self._tell("encrypted-exchange", collective=collective, hosts=len(hosts))

    def _prepare_next_gang(self) -> None:
        """Tell the ranks where to start, and what is saved already."""
        kept = self._kept.newest
        if kept is None or kept.position < self._messages.saved[:2]:
            start = self._reload_beyond(kept)
            if kept is None or start is not None:
                self._kept.pass_over()
                self._payload = replace(self._payload, start=start)
                self._messages.note_start_from(start)
        if self._kept.newest is not None:  # else it would be sent to all for nothing
            self._payload = replace(self._payload, start=None)
        epoch, steps, since = self._messages.saved
        saved = LastSave(epoch=epoch, steps=steps, age_s=time.monotonic() - since)
        self._payload = replace(self._payload, last_save=saved)

    def _reload_beyond(self, kept: StateSource | None) -> Snapshot | None:
        """Read the newest checkpoint, if it is newer than what a worker still has."""
        try:
            found = self._reload()
        except (CheckpointError, OSError):
            if kept is None:
                raise
            return None
        newer = found is not None and (kept is None or found.position > kept.position)
        return found if newer else None

    def _wants_resize(self, group: RankGroup) -> bool:
        if not self._heartbeats.have_started:
            return False
        now = time.monotonic()
        members = {seat.address for seat in group.seats}
        # A worker that closes waits for a few seconds only; growing can wait.
        wanted = bool(members & self._membership.closing) or (
            self._recovery.elastic
            and now - self._resized >= RESIZE_EVERY_S
            and self._seats.more_than(len(members))
        )
        if wanted:
            self._resized = now
        return wanted

    def _next_seating(self, before: Seating, end: GangEnd) -> Seating:
        newest = self._kept.newest
        # Where nobody is left to say how far it came, look at where it began.
        steps = self._started_at if newest is None else newest.position.steps
        return self._regrouping.next_seating(before, end, steps=steps)

    def _tell(self, name: str, **details: Any) -> None:
        self._listener.on_event(Event(name=name, time_s=time.time(), details=details))

    def _note_start(self, time_s: float, details: dict[str, Any]) -> None:
        canary = details["canary"]
        self._started_at = details["steps"]
        self._home.bitwise = self._home.bitwise and details["bitwise"]
        self._heartbeats.note_start(self._ranks, time.monotonic())
        self._canary = self._canary or canary
        if not self._told_start:
            self._told_start = True
            self._listener.on_start()
            self._listener.on_event(Event(name="first-step", time_s=time_s))
        self._drop_older_states()
        end = self._last_end
        if end is None:
            return
        self._tell(
            "resized" if end.cause == "resize" else "recovered",
            lost=[loss.address for loss in end.losses],
            ranks=self._ranks,
            step=details["steps"],
            seconds=time.monotonic() - end.broken_at,
        )

    def _drop_older_states(self) -> None:
        """Keep one state that was left earlier, if it is of use when the whole gang is lost."""
        self._kept.drop_older(members=self._membership.engaged, saved=self._messages.saved[:2])
        if self._generation:
            addresses = [a for a in self._membership.present if a not in self._kept.addresses]
            ask_workers(
                self._client,
                forget_older,
                addresses,
                self._run_id,
                self._generation,
                timeout_s=FORGET_S,
            )
