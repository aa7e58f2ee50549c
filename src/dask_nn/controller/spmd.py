"""The spmd engine: gang after gang of rank tasks, until the run is done."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers
from dask_nn.controller.failure_policy import Recovery, Situation, decide
from dask_nn.controller.heartbeats import Heartbeats
from dask_nn.controller.keeping import Position, StateSource
from dask_nn.controller.listening import Listener, RankMessages
from dask_nn.controller.membership import Membership
from dask_nn.controller.rank_group import RankGroup, choose_collective
from dask_nn.controller.worker_side import forget_run
from dask_nn.errors import ClusterError, IncompatibleWorkers, WorkerLost
from dask_nn.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distributed import Client

    from dask_nn.controller.failure_policy import Cause
    from dask_nn.controller.placement import Seating, WorkerFacts
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.snapshot import Snapshot

__all__ = ["Listener", "run_spmd"]

POLL_S = 0.2
# Once a gang breaks, its ranks get so long to say how they ended.
AFTERMATH_S = 5.0
# Ctrl-C waits so long for the ranks to reach a step boundary.
STOP_S = 1.5
# However the run ended, ranks that still work get so long to notice.
END_S = 2.0
# A gang is resized at most so often: each time costs a fraction of a second.
RESIZE_EVERY_S = 5.0
CATCH_UP_EVERY_S = 1.0
# A look that comes so late finds silence that is this process's own fault.
LATE_S = 3.0


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
        If the scheduler is gone.
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
        with run.listening():
            return run.train(seating)


@dataclass
class _GangEnd:
    """How a gang ended: with the run's end if there is no cause."""

    outcomes: list[RankOutcome]
    cause: Cause | None = None
    lost: list[tuple[str, int]] = field(default_factory=list)
    reason: str = ""
    interrupted: bool = False
    deadline: float | None = None


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
        self._canary = b""
        self._source: StateSource | None = None
        self._generation = 0
        self._failures = 0
        self._failures_at: Counter[Position | None] = Counter()
        self._states: dict[str, StateSource] = {}
        self._broken: tuple[float, _GangEnd] | None = None
        self._ranks = 0
        self._started = False
        self._resized = self._looked = self._caught_up = time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Any:
        """Hear the ranks for the length of a block, and let the workers forget them after it."""
        self._messages.subscribe()
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # what ended the run says more
                self._messages.unsubscribe()
                present = self._client.scheduler_info(n_workers=-1)["workers"]
                ask_workers(
                    self._client, forget_run, list(present), self._run_id, timeout_s=1.0
                ).result(2.0)

    def train(self, seating: Seating) -> tuple[list[RankOutcome], bool]:
        """Run gang after gang."""
        while True:
            end = self._run_gang(seating)
            if end.cause is None:
                return end.outcomes, end.interrupted
            self._find_newest(end)
            found = self._next_seating(seating, end)
            if found is None:
                return end.outcomes, True
            seating = found
            self._generation += 1

    def _run_gang(self, seating: Seating) -> _GangEnd:
        self._heartbeats.clear()
        self._messages.generation = self._generation
        self._ranks = len(seating.workers)
        self._started = False
        if self._generation and self._source is None:
            self._payload = replace(self._payload, start=self._reload())
        group = RankGroup(
            self._client,
            run_id=self._run_id,
            generation=self._generation,
            seating=seating,
            collective=choose_collective(seating, device=self._payload.spec.device),
            changed=self._changed,
            source=self._source,
            canary=self._canary,
        )
        try:
            try:
                group.start(self._payload)
            except Exception as error:
                self._membership.catch_up()
                gone = group.lost(self._membership.removed)
                if not gone:
                    raise
                lost = [(seat.address, seat.rank) for seat in gone]
                return _GangEnd([], cause="lost", lost=lost, reason=str(error))
            return self._watch(group)
        finally:
            self._end(group)
            group.release()

    def _watch(self, group: RankGroup) -> _GangEnd:
        """Follow a gang until all its ranks have ended, or those that did not are given up."""
        end = _GangEnd([])
        while True:
            try:
                self._changed.wait(POLL_S)
                self._changed.clear()
                self._look_around()
                if self._has_ended(group, end):
                    return end
            except KeyboardInterrupt:
                if end.interrupted:
                    raise
                end.interrupted = True
                end.deadline = time.monotonic() + STOP_S
                group.signal("stop", self._membership.removed)

    def _look_around(self) -> None:
        """Learn what happened since the last look."""
        now = time.monotonic()
        if self._client.status != "running":
            message = (
                f"the connection to the scheduler is {self._client.status}; without it nobody can "
                "say what became of the workers. A checkpoint= resumes on another cluster"
            )
            raise ClusterError(message)
        if now - self._looked > LATE_S:  # this process slept: nobody else is to blame
            self._heartbeats.forgive(now)
        if now - self._caught_up > CATCH_UP_EVERY_S:
            self._membership.catch_up()
            self._caught_up = time.monotonic()
        self._looked = time.monotonic()
        self._messages.deliver()
        for address, reason in self._membership.refused().items():
            self._tell("worker-refused", address=address, rank=-1, step=-1, reason=reason)

    def _has_ended(self, group: RankGroup, end: _GangEnd) -> bool:
        """Judge a gang, and act on it; True when nothing more can be learnt from it."""
        removed = self._membership.removed
        at_work = group.running(removed)  # before the outcomes: those are complete then
        end.outcomes = [outcome for outcome in group.outcomes() if outcome is not None]
        if end.cause in {None, "resize"} and not end.interrupted:
            self._look_for_trouble(group, end)
        if not at_work:
            self._judge(end)
            self._name_the_lost(group, end)
            return True
        if end.cause is None and self._wants_resize(group):
            self._set_cause(end, "resize", AFTERMATH_S + self._recovery.hang_timeout_s)
            group.signal("stop", removed)
        elif end.cause not in {None, "resize"}:
            group.signal("abort", removed)  # again and again: one may just be starting
        if end.deadline is None or time.monotonic() < end.deadline:
            return False
        if not end.interrupted:
            end.cause, end.reason = "hung", "did not end when asked to"
            end.lost += [(seat.address, seat.rank) for seat in at_work]
            for seat in at_work:
                self._membership.evict(seat.address, end.reason)
        return True

    def _set_cause(self, end: _GangEnd, cause: Cause, patience_s: float) -> None:
        now = time.monotonic()
        end.cause, end.deadline = cause, now + patience_s
        self._broken = (now, end)

    def _look_for_trouble(self, group: RankGroup, end: _GangEnd) -> None:
        """Set the cause if the gang cannot finish what it began."""
        removed = self._membership.removed
        gone = group.lost(removed)
        if gone:
            end.lost = [(seat.address, seat.rank) for seat in gone]
            end.reason = "left the cluster"
            self._set_cause(end, "lost", AFTERMATH_S)
            return
        seats = {seat.rank: seat for seat in group.running(removed)}
        hung = self._heartbeats.hung(seats, time.monotonic())
        for rank, silent_s in hung.items():
            address = seats[rank].address
            end.lost.append((address, rank))
            end.reason = f"gave no sign of life for {silent_s:.0f} s"
            self._membership.evict(address, end.reason)
        if hung:
            self._set_cause(end, "hung", AFTERMATH_S)
        elif any(outcome.status in {"failed", "aborted"} for outcome in end.outcomes):
            self._set_cause(end, "broken", AFTERMATH_S)

    def _judge(self, end: _GangEnd) -> None:
        """Decide what the outcomes of a gang that has ended mean for the run."""
        failed = [outcome for outcome in end.outcomes if outcome.status == "failed"]
        refused = [o for o in failed if isinstance(o.exception, IncompatibleWorkers)]
        if refused and self._generation:
            error = refused[0].exception
            end.cause = "refused"
            end.reason = str(error)
            for address in getattr(error, "addresses", ()):
                self._membership.exclude(address, end.reason)
                end.lost.append((address, -1))
            return
        done = {outcome.status for outcome in end.outcomes}
        leader = any(o.rank == 0 and o.state for o in end.outcomes)
        # An exception of the user's code would come again; so would a loss that is not finite.
        if failed or "non_finite" in done or end.interrupted:
            end.cause = None
        elif end.cause == "resize":
            end.cause = None if done == {"finished"} and leader else "resize"
        elif end.cause is None and not (leader and done <= {"finished", "stopped"}):
            end.cause = "broken"

    def _name_the_lost(self, group: RankGroup, end: _GangEnd) -> None:
        """Add workers that were lost after the gang broke, or were the reason that it did."""
        if end.cause is None:
            return
        named = {address for address, _ in end.lost}
        later = [seat for seat in group.lost(self._membership.removed) if seat.address not in named]
        end.lost += [(seat.address, seat.rank) for seat in later]
        if later and end.cause in {"broken", "resize"}:
            end.cause, end.reason = "lost", "left the cluster"

    def _wants_resize(self, group: RankGroup) -> bool:
        now = time.monotonic()
        if now - self._resized < RESIZE_EVERY_S or not self._started:
            return False
        members = {seat.address for seat in group.seats}
        if members & self._messages.leaving:
            for address in self._messages.leaving:
                self._membership.exclude(address, "it is closing")
            self._resized = now
            return True
        if not self._recovery.elastic:
            return False
        seating = self._seating()
        if seating is not None and len(seating.workers) > len(group.seats):
            self._resized = now
            return True
        return False

    def _find_newest(self, end: _GangEnd) -> None:
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

    def _next_seating(self, before: Seating, end: _GangEnd) -> Seating | None:
        """Wait until there are workers to go on with; None after Ctrl-C."""
        cause = end.cause or "broken"
        position = None if self._source is None else self._source.position
        if cause != "resize":
            self._failures += 1
            same_step = self._failures_at[position] + 1
            self._failures_at = Counter({position: same_step})
        broken = self._broken[0] if self._broken is not None else time.monotonic()
        steps = max((outcome.steps for outcome in end.outcomes), default=0)
        for address, rank in end.lost:
            self._tell(f"worker-{cause}", address=address, rank=rank, step=steps, reason=end.reason)
        if cause == "broken":
            errors = sorted({o.error for o in end.outcomes if o.error})
            self._tell("gang-broken", step=steps, reason="; ".join(errors))
        while True:
            self._look_around()
            seating = self._seating()
            action = decide(
                Situation(
                    cause=cause,
                    failures=self._failures,
                    same_step=self._failures_at[position],
                    ranks=len(before.workers),
                    able=0 if seating is None else len(seating.workers),
                    waited_s=time.monotonic() - broken,
                ),
                self._recovery,
            )
            if action.name == "give_up":
                address, rank = end.lost[0] if end.lost else ("", -1)
                raise WorkerLost(address, rank, action.reason)
            if action.name == "go_on" and seating is not None:
                break
            try:
                self._changed.wait(POLL_S)
                self._changed.clear()
            except KeyboardInterrupt:
                end.interrupted = True
                return None
        if cause != "resize":
            self._membership.settle()
            self._restore_blocks()
        return seating

    def _seating(self) -> Seating | None:
        spec = self._payload.spec
        return self._membership.seating(
            shards=spec.shards, threads_per_rank=spec.threads_per_rank, device=spec.device
        )

    def _end(self, group: RankGroup) -> None:
        """End ranks that are still at work: a cancelled task would go on in its thread."""
        deadline = time.monotonic() + END_S
        removed = self._membership.removed
        while self._client.status == "running" and group.running(removed):
            if time.monotonic() > deadline:
                return
            group.signal("abort", removed)
            self._changed.wait(POLL_S)
            self._changed.clear()

    def _tell(self, name: str, **details: Any) -> None:
        self._listener.on_event(Event(name=name, time_s=time.time(), details=details))

    def _note_start(self, time_s: float, details: dict[str, Any]) -> None:
        canary = details["canary"]
        self._started = True
        self._heartbeats.note_start(self._ranks, time.monotonic())
        if not self._generation:
            self._canary = canary
            self._listener.on_start()
            self._listener.on_event(Event(name="first-step", time_s=time_s))
            return
        self._canary = self._canary or canary
        seconds, end = 0.0, None
        if self._broken is not None:
            seconds, end = time.monotonic() - self._broken[0], self._broken[1]
        self._tell(
            "resized" if end is not None and end.cause == "resize" else "recovered",
            lost=[address for address, _ in end.lost] if end is not None else [],
            ranks=self._ranks,
            step=details["steps"],
            seconds=seconds,
        )
