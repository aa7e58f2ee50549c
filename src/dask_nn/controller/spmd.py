"""The spmd engine: gang after gang of rank tasks, until the run is done."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers
from dask_nn.controller.failure_policy import Recovery, Situation, decide
from dask_nn.controller.gang_watch import GangEnd, GangWatch
from dask_nn.controller.heartbeats import Heartbeats
from dask_nn.controller.keeping import Position, StateSource
from dask_nn.controller.leases import Leases
from dask_nn.controller.listening import Listener, RankMessages
from dask_nn.controller.membership import Membership
from dask_nn.controller.rank_group import RankGroup, choose_again
from dask_nn.controller.worker_side import forget_run
from dask_nn.errors import WorkerLost
from dask_nn.events import Event
from dask_nn.training.checkpointing import LastSave

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from distributed import Client

    from dask_nn.controller.failure_policy import Cause
    from dask_nn.controller.placement import Seating, WorkerFacts
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.snapshot import Snapshot

__all__ = ["Listener", "run_spmd"]

# A gang is resized at most so often: each time costs a fraction of a second.
RESIZE_EVERY_S = 5.0


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
) -> tuple[list[RankOutcome], bool]:
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

    Returns
    -------
    list of RankOutcome
        Of all ranks of the last gang that could still say how they ended, by rank.
    bool
        Whether Ctrl-C ended the run.

    Raises
    ------
    WorkerLost
        If workers were lost and `recovery` says not to go on.
    ClusterError
        If the scheduler is gone, or other trainings keep the workers for too long.
    """
    changed = threading.Event()
    with Membership(client, workers, changed) as membership:
        run = _Run(
            payload,
            client=client,
            membership=membership,
            changed=changed,
            listener=listener,
            recovery=recovery,
            restore_blocks=restore_blocks,
            reload=reload,
        )
        with run.at_work():
            return run.train(seating)


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
    ) -> None:
        self._payload = payload
        self._client = client
        self._membership = membership
        self._changed = changed
        self._listener = listener
        self._recovery = recovery
        self._restore_blocks = restore_blocks
        self._reload = reload
        self._run_id = uuid.uuid4().hex[:12]
        self._leases = Leases(client, self._run_id)
        self._heartbeats = Heartbeats(
            hang_timeout_s=recovery.hang_timeout_s,
            start_timeout_s=payload.settings.start_timeout_s,
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
        self._watch = GangWatch(
            client,
            membership=membership,
            heartbeats=self._heartbeats,
            messages=self._messages,
            recovery=recovery,
            changed=changed,
            listener=listener,
            wants_resize=self._wants_resize,
        )
        self._canary = b""
        self._source: StateSource | None = None
        self._generation = 0
        self._failures = 0
        self._failures_at: Counter[int] = Counter()
        self._states: dict[str, StateSource] = {}
        self._last_end: GangEnd | None = None
        self._ranks = 0
        self._started = False
        self._told_of_encryption = False
        self._started_at = 0
        self._resized = time.monotonic()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Hear the ranks for the length of a block; nothing of the run stays after it."""
        self._messages.subscribe()
        try:
            yield
        finally:
            if self._client.status == "running":
                self._forget()
            del self._watch, self._messages

    def _forget(self) -> None:
        with contextlib.suppress(Exception):  # what ended the run says more
            self._messages.unsubscribe()
            self._leases.release()
            present = self._client.scheduler_info(n_workers=-1)["workers"]
            ask_workers(
                self._client, forget_run, list(present), self._run_id, timeout_s=1.0
            ).result(2.0)

    def train(self, seating: Seating) -> tuple[list[RankOutcome], bool]:
        """Run gang after gang."""
        try:
            seating = self._take_turns(seating)
        except KeyboardInterrupt:
            return [], True
        while True:
            end = self._run_gang(seating)
            if end.cause is None:
                return end.outcomes, end.interrupted
            self._last_end = end
            self._find_newest(end)
            found = self._next_seating(seating, end)
            if found is None:
                return end.outcomes, True
            seating = found
            self._generation += 1

    def _take_turns(self, seating: Seating) -> Seating:
        """Get workers that no other run has: others of as many, where there are some, or wait."""
        if not self._leases.claim(seating.addresses):
            return seating
        free = self._seating(self._leases.taken())
        enough = free is not None and len(free.workers) >= len(seating.workers)
        if free is not None and enough and not self._leases.claim(free.addresses):
            return free
        self._leases.wait_for(
            seating.addresses,
            self._payload.settings.queue_timeout_s,
            lambda others: self._tell("queued", workers=sorted(others)),
        )
        return seating

    def _run_gang(self, seating: Seating) -> GangEnd:
        self._heartbeats.clear()
        self._messages.generation = self._generation
        self._ranks = len(seating.workers)
        self._started = False
        if self._generation:
            self._prepare_next_gang()
        collective = choose_again(
            seating,
            device=self._payload.spec.device,
            wanted=self._payload.settings.collective,
        )
        self._tell_of_encryption(seating, collective)
        group = RankGroup(
            self._client,
            run_id=self._run_id,
            generation=self._generation,
            seating=seating,
            collective=collective,
            changed=self._changed,
            source=self._source,
            canary=self._canary,
        )
        try:
            try:
                group.start(self._payload)
            except (OSError, KeyError) as error:  # Dask's for a worker that leaves meanwhile
                if self._client.status != "running":
                    raise
                self._membership.catch_up()
                gone = group.lost(self._membership.removed)
                lost = [(seat.address, seat.rank) for seat in gone]
                return GangEnd(
                    cause="lost" if lost else "broken",
                    lost=lost,
                    reason=f"left the cluster ({error!r})",
                )
            return self._watch.follow(group)
        finally:
            self._watch.end(group)
            group.release()

    def _tell_of_encryption(self, seating: Seating, collective: str) -> None:
        """Say once that gradients do not take the fastest way, and why."""
        encrypted = any(worker.encrypted for worker in seating.workers)
        if encrypted and collective.endswith("dask") and not self._told_of_encryption:
            self._told_of_encryption = True
            hosts = sorted({worker.host for worker in seating.workers})
            self._tell("encrypted-exchange", collective=collective, hosts=len(hosts))

    def _prepare_next_gang(self) -> None:
        """Tell the ranks where to start, and what is saved already."""
        if self._source is None:
            self._payload = replace(self._payload, start=self._reload())
            self._messages.note_start_from(self._payload.start)
        epoch, steps, since = self._messages.saved
        saved = LastSave(epoch=epoch, steps=steps, age_s=time.monotonic() - since)
        self._payload = replace(self._payload, last_save=saved)

    def _wants_resize(self, group: RankGroup) -> bool:
        now = time.monotonic()
        if now - self._resized < RESIZE_EVERY_S or not self._started:
            return False
        members = {seat.address for seat in group.seats}
        wanted = bool(members & self._messages.leaving)
        if not wanted and self._recovery.elastic:
            self._exclude_leaving()
            seating = self._seating()
            wanted = seating is not None and len(seating.workers) > len(members)
            if wanted:
                seating = self._seating(self._leases.taken())
                wanted = seating is not None and len(seating.workers) > len(members)
        if wanted:
            self._resized = now
        return wanted

    def _exclude_leaving(self) -> None:
        for address in self._messages.leaving:
            self._membership.exclude(address, "it is closing")

    def _find_newest(self, end: GangEnd) -> None:
        """Take the newest state that a rank of the gang has left as the truth."""
        alive = [
            outcome
            for outcome in end.outcomes
            if outcome.has_state and outcome.address not in self._membership.removed
        ]
        for outcome in alive:
            self._states[outcome.address] = StateSource(
                address=outcome.address,
                generation=self._generation,
                position=Position(*outcome.position),
            )
        for address in self._membership.removed & self._states.keys():
            del self._states[address]
        self._source = max(self._states.values(), key=lambda source: source.position, default=None)

    def _next_seating(self, before: Seating, end: GangEnd) -> Seating | None:
        """Wait until there are workers to go on with; None after Ctrl-C."""
        cause = end.cause or "broken"
        same_step = self._count_failure(cause)
        self._tell_of_losses(end)
        while True:
            seating = self._find_seating()
            action = decide(
                Situation(
                    cause=cause,
                    failures=self._failures,
                    same_step=same_step,
                    ranks=len(before.workers),
                    able=0 if seating is None else len(seating.workers),
                    waited_s=time.monotonic() - end.broken_at,
                ),
                self._recovery,
            )
            if action.name == "give_up":
                address, rank = end.lost[0] if end.lost else ("", -1)
                raise WorkerLost(address, rank, action.reason)
            try:
                if action.name != "go_on" or seating is None:
                    self._watch.wait()
                elif cause == "resize" or self._have_all_blocks():
                    return seating
            except KeyboardInterrupt:
                return None

    def _have_all_blocks(self) -> bool:
        """Put back blocks that were lost; False if more workers leave meanwhile."""
        self._membership.settle()
        try:
            self._restore_blocks()
        except (OSError, KeyError):
            if self._client.status != "running":
                raise
            return False
        return True

    def _count_failure(self, cause: Cause) -> int:
        """Give how many gangs in a row have now ended at the same step."""
        if cause == "resize":
            return 0
        self._failures += 1
        # Where nobody is left to say how far it came, look at where it began.
        steps = self._started_at if self._source is None else self._source.position.steps
        if self._started:
            self._failures_at = Counter({steps: self._failures_at[steps] + 1})
        return self._failures_at[steps]

    def _tell_of_losses(self, end: GangEnd) -> None:
        steps = max((outcome.steps for outcome in end.outcomes), default=0)
        for address, rank in end.lost:
            self._tell(
                f"worker-{end.cause}", address=address, rank=rank, step=steps, reason=end.reason
            )
        if end.cause == "broken":
            errors = sorted({o.error for o in end.outcomes if o.error}) or [end.reason]
            self._tell("gang-broken", step=steps, reason="; ".join(errors))

    def _find_seating(self) -> Seating | None:
        """Choose and claim the workers of the next gang among those that are there now."""
        self._watch.look_around()
        self._exclude_leaving()
        seating = self._seating(self._leases.taken())
        return None if seating is None or self._leases.claim(seating.addresses) else seating

    def _seating(self, taken: Collection[str] = ()) -> Seating | None:
        spec = self._payload.spec
        return self._membership.seating(
            shards=spec.shards,
            threads_per_rank=spec.threads_per_rank,
            device=spec.device,
            taken=taken,
        )

    def _tell(self, name: str, **details: Any) -> None:
        self._listener.on_event(Event(name=name, time_s=time.time(), details=details))

    def _note_start(self, time_s: float, details: dict[str, Any]) -> None:
        canary = details["canary"]
        self._started = True
        self._started_at = details["steps"]
        self._heartbeats.note_start(self._ranks, time.monotonic())
        if not self._generation:
            self._canary = canary
            self._listener.on_start()
            self._listener.on_event(Event(name="first-step", time_s=time_s))
            return
        self._canary = self._canary or canary
        end = self._last_end
        self._tell(
            "resized" if end is not None and end.cause == "resize" else "recovered",
            lost=[address for address, _ in end.lost] if end is not None else [],
            ranks=self._ranks,
            step=details["steps"],
            seconds=0.0 if end is None else time.monotonic() - end.broken_at,
        )
