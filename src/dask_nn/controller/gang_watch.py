"""Following one gang to its end, whatever that is."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import is_busy, scheduler_lost
from dask_nn.controller.gang_end import GangEnd, Loss
from dask_nn.controller.reachability import ask_for_reach, judge, largest_reachable
from dask_nn.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from distributed import Client

    from dask_nn.controller.failure_policy import Cause, Recovery
    from dask_nn.controller.heartbeats import Heartbeats
    from dask_nn.controller.listening import Listener, RankMessages
    from dask_nn.controller.lost_blocks import LostBlocks
    from dask_nn.controller.membership import Membership
    from dask_nn.controller.rank_group import RankGroup
    from dask_nn.controller.worker_side import Seat
    from dask_nn.presses import Presses

__all__ = ["GangWatch"]

POLL_S = 0.2
# Once a gang breaks, tasks of ranks that have not begun yet are waited for so long.
BEGIN_S = 5.0
# After Ctrl-C the user is told for what the ranks are waited for; after a second one they get so
# long, after a third none, and are left.
STOP_S = 1.5
# However the run ended, ranks that still work get so long to notice.
END_S = 2.0
CATCH_UP_EVERY_S = 1.0
# Blocks that could not be put back are tried again after so long: each time it may take long, and
# meanwhile nobody is found to hang.
RESTORE_EVERY_S = 15.0
# After a Ctrl-C ranks that need none of them may end first.
RESTORE_AGAIN_S = 3.0
# A look that comes so late finds silence that is the fault of this process, which slept, or of the
# scheduler, which did not answer: all signs of life come through it.
LATE_S = 3.0


class GangWatch:
    """Follows gang after gang of one run.

    Parameters
    ----------
    client : Client
        Of the cluster.
    membership : Membership
        Who is there.
    heartbeats : Heartbeats
        Who lives.
    messages : RankMessages
        What the ranks say.
    recovery : Recovery
        What the user wants.
    changed : threading.Event
        Set whenever something happened.
    listener : Listener
        Told of workers that take no part.
    wants_resize : callable
        Tells whether a gang should make room for another one, of other workers.
    blocks : LostBlocks
        Put back while the ranks are at work.
    presses : Presses
        Of Ctrl-C.
    """

    def __init__(
        self,
        client: Client,
        *,
        membership: Membership,
        heartbeats: Heartbeats,
        messages: RankMessages,
        recovery: Recovery,
        changed: threading.Event,
        listener: Listener,
        wants_resize: Callable[[RankGroup], bool],
        blocks: LostBlocks,
        presses: Presses,
    ) -> None:
        self._client = client
        self._membership = membership
        self._heartbeats = heartbeats
        self._messages = messages
        self._recovery = recovery
        self._changed = changed
        self._listener = listener
        self._wants_resize = wants_resize
        self._blocks = blocks
        self._inquiry: Future[dict[str, Any]] | None = None
        self._inquire_at = 0.0
        self._presses = presses
        self._restore_at = 0.0
        self._left_at: float | None = None
        self._told_of_stopping = False
        self._looked = self._caught_up = time.monotonic()

    def follow(self, group: RankGroup) -> GangEnd:
        """Watch a gang until all its ranks have ended, or those that did not are given up."""
        end = GangEnd()
        self._inquiry, self._left_at, self._told_of_stopping = None, None, False
        while True:
            try:
                with self._presses.heard():
                    self.wait()
                    self.look_around()
            except KeyboardInterrupt:
                self._note_interrupt(end)
            # Also where callbacks interrupt every look: the ranks have to hear of it.
            try:
                if self._has_ended(group, end):
                    return end
            except KeyboardInterrupt:  # of a callback
                self._note_interrupt(end)

    def _note_interrupt(self, end: GangEnd) -> None:
        """Stop the gang; at the second time, soon; at the third, do not wait for it at all."""
        if not self._presses.is_another():
            return
        now = time.monotonic()
        if self._left_at is not None:
            self._left_at = now
        elif end.interrupted:
            self._left_at = now + STOP_S
        end.interrupted = True

    def _stop(self, group: RankGroup, end: GangEnd) -> None:
        """Do as Ctrl-C wants: stop at a step boundary; at the second time, at once."""
        removed = self._membership.removed
        seats = group.running(removed)
        if seats and not self._told_of_stopping:
            self._told_of_stopping = True
            self._tell("stopping", ranks=len(seats))
        order = "finish" if self._left_at is None else "abort"
        end.save_ordered |= order == "finish" and any(seat.rank == 0 for seat in seats)
        self._signal(group, order)  # again and again: one may just be starting

    def wait(self) -> None:
        """Wait until something happens, or a moment."""
        self._changed.wait(POLL_S)
        self._changed.clear()

    def look_around(self, *, at_once: bool = False) -> None:
        """Learn what happened since the last look.

        Parameters
        ----------
        at_once : bool, default False
            Whether to ask the scheduler even if it was asked a moment ago.

        Raises
        ------
        ClusterError
            If the scheduler is gone, or does not answer for long.
        """
        if self._client.status != "running":
            raise scheduler_lost(self._client)
        if at_once or time.monotonic() - self._caught_up > CATCH_UP_EVERY_S:
            self._membership.catch_up()
            self._caught_up = time.monotonic()
        now = time.monotonic()
        if now - self._looked > min(LATE_S, self._recovery.hang_timeout_s / 2):
            self._heartbeats.forgive(now)
            self._inquiry = None
        self._looked = now
        self._messages.deliver()
        # The scheduler's next list knows better: a worker that shall leave may stay after all.
        self._membership.closing |= self._messages.leaving
        self._messages.leaving.clear()
        for address, reason in self._membership.refused().items():
            self._tell("worker-refused", address=address, rank=-1, step=-1, reason=reason)

    def end(self, group: RankGroup) -> bool:
        """End ranks that are still at work: a cancelled task would go on in its thread.

        Returns
        -------
        bool
            Whether there was a Ctrl-C meanwhile. The second one cuts it short.
        """
        deadline = time.monotonic() + END_S
        removed = self._membership.removed
        presses = 0
        while self._client.status == "running" and group.unknown(removed):
            if time.monotonic() > deadline or presses > 1:
                break
            try:
                with self._presses.heard():
                    group.signal("abort", removed)
                    self.wait()
                    group.outcomes()
            except KeyboardInterrupt:
                presses += self._presses.is_another()
        return presses > 0

    def _has_ended(self, group: RankGroup, end: GangEnd) -> bool:
        """Judge a gang, and act on it; True when nothing more can be learnt from it."""
        removed = self._membership.removed
        end.outcomes = group.outcomes()
        self._look_for_trouble(group, end)
        unknown = group.unknown(removed)
        if not unknown or self._are_left(unknown, end):
            end.judge(self._messages.generation)
            for loss in end.losses:
                if loss.cause == "refused":
                    self._membership.exclude(loss.address, loss.reason)
            if end.cause == "broken":
                self._blame_the_network(group, end)
            return True
        if end.is_broken or end.recalled:
            self._signal(group, "abort")  # again and again: one may just be starting
        elif end.interrupted:
            self._stop(group, end)
        elif end.cause is None and self._wants_resize(group):
            # It goes on until it comes to a step boundary, however long that takes.
            end.break_off("resize")
            self._signal(group, "stop")
        if self._messages.save_wanted and not end.interrupted:
            self._messages.save_wanted = False
            self._signal(group, "save")
        self._put_back(group, end)
        return False

    def _signal(self, group: RankGroup, order: str) -> None:
        """Give the ranks an order; waiting for those that hang is no lateness of the scheduler."""
        began = time.monotonic()
        group.signal(order, self._membership.removed)
        self._looked += time.monotonic() - began

    def _are_left(self, seats: list[Seat], end: GangEnd) -> bool:
        """Tell whether ranks are not waited for any more that have neither ended nor hang."""
        now = time.monotonic()
        if self._left_at is not None and now >= self._left_at:
            return True
        begun = any(self._heartbeats.has_spoken(seat.rank) for seat in seats)
        over = end.is_broken or end.recalled
        return over and not begun and now > end.broken_at + BEGIN_S

    def _look_for_trouble(self, group: RankGroup, end: GangEnd) -> None:
        """Set the cause if the gang cannot finish what it began."""
        removed = self._membership.removed
        for seat in group.lost(removed):
            if seat.address not in removed:
                self._give_up(end, seat, "hung", "did not hand over how its rank ended")
            elif not self._may_leave(group, end, seat):
                end.lose([_loss(seat, "lost", "left the cluster")])
            elif end.cause is None and not self._heartbeats.have_started:
                end.recall()
            elif end.cause is None:
                # Its rank comes to a step boundary, and makes the others stop there.
                end.break_off("resize")
                self._signal(group, "stop")
        seats = {seat.rank: seat for seat in group.running(removed)}
        now = time.monotonic()
        for rank, silent_s in self._heartbeats.hung(seats, now).items():
            if (end.is_broken or end.recalled) and not self._heartbeats.has_spoken(rank):
                continue  # it has not begun, and shall not
            reason = f"gave no sign of life for {silent_s:.0f} s"
            self._give_up(end, seats[rank], "hung", reason)
        self._look_at_the_network(group, end, seats)
        if end.has_failed:
            end.break_off("broken")
        self._recall(group, end)

    def _put_back(self, group: RankGroup, end: GangEnd) -> None:
        """Put blocks back that were lost with workers outside the gang, which may need them.

        Also after Ctrl-C: without them no rank may come to its step boundary.
        """
        members = {seat.address for seat in group.seats}
        gone = self._blocks.lost_with() - members
        wanted = gone and not (end.is_broken or end.recalled) and self._left_at is None
        if not wanted or time.monotonic() < self._restore_at:
            return
        again_s = RESTORE_AGAIN_S
        try:
            with self._presses.heard():
                if not self._blocks.put_back():
                    again_s = max(RESTORE_EVERY_S, 1.5 * self._recovery.hang_timeout_s)
        finally:
            self._restore_at = time.monotonic() + again_s

    def _may_leave(self, group: RankGroup, end: GangEnd, seat: Seat) -> bool:
        """Tell whether a retired worker's rank stops with the others, as far as one can see."""
        if not self._membership.is_retired(seat.address) or end.has_failed or end.is_broken:
            return False
        others = end.outcomes or group.unknown(self._membership.removed)
        # Before the first step nothing can be lost with it.
        return bool(others) or not self._heartbeats.have_started

    def _recall(self, group: RankGroup, end: GangEnd) -> None:
        """Call back a gang that cannot begin: a worker starts no tasks, because it leaves, say."""
        if end.cause is not None or self._heartbeats.have_started:
            return
        for seat in group.running(self._membership.removed):
            able = self._membership.starts_tasks(seat.address)
            if not able and not self._heartbeats.has_spoken(seat.rank):
                end.recall()

    def _look_at_the_network(self, group: RankGroup, end: GangEnd, seats: dict[int, Seat]) -> None:
        """Ask workers whether they reach each other, where something does not come.

        Ranks wait for their peers or for blocks, or have not said their first word.
        """
        now = time.monotonic()
        standstill_s = self._heartbeats.standstill(seats)
        holders = self._heartbeats.holders(seats) - self._membership.removed
        if self._inquiry is None:
            late = standstill_s or holders or self._heartbeats.unheard(seats, now)
            if late and not end.is_broken and now >= self._inquire_at:
                asked = holders | {seat.address for seat in seats.values()}
                self._inquiry = ask_for_reach(self._client, asked, self._recovery.hang_timeout_s)
                self._inquiry.add_done_callback(lambda _: self._changed.set())
            return
        if not self._inquiry.done():
            return
        answers, self._inquiry = self._inquiry.result(), None
        self._inquire_at = now + self._recovery.hang_timeout_s
        if self._give_up_unreachable(group, end, answers) or not standstill_s:
            return
        # The next gang connects anew, and waits longer before it is suspected of the same.
        self._heartbeats.note_wait(standstill_s)
        end.break_off("broken", f"no rank heard of its peers for {standstill_s:.0f} s")

    def _blame_the_network(self, group: RankGroup, end: GangEnd) -> None:
        """Find out whether a gang that broke without anyone to blame could not connect."""
        members = [seat.address for seat in group.seats]
        if len(set(members)) < 2 or self._client.status != "running":
            return
        timeout_s = self._recovery.hang_timeout_s
        asked = ask_for_reach(self._client, members, timeout_s)
        with self._presses.heard():
            answers = asked.result(4 * timeout_s)
            busy = is_busy(self._client)
        if not busy:
            self._give_up_unreachable(group, end, answers)

    def _give_up_unreachable(self, group: RankGroup, end: GangEnd, answers: dict[str, Any]) -> bool:
        """Let go of workers that do not answer, or that the most do not reach; True if any."""
        removed = self._membership.removed
        findings = judge({a: answer for a, answer in answers.items() if a not in removed})
        seats = {seat.address: seat for seat in group.seats}
        found = [address for address in answers if address not in removed]
        for address in findings.silent:
            self._give_up_worker(end, seats, address, "hung", "does not answer")
        # Ranks stay rather than workers that only hold blocks, and low ranks rather than high ones.
        order = [address for address in seats if address in found]
        order += [address for address in found if address not in seats]
        order = [address for address in order if address not in findings.silent]
        stays = largest_reachable(order, findings.cut)
        for address in set(order) - set(stays):
            others = sorted({a for pair in findings.cut if address in pair for a in pair})
            others.remove(address)
            reason = f"is cut off from {', '.join(others)}"
            self._give_up_worker(end, seats, address, "lost", reason)
        return len(stays) < len(found)

    def _give_up_worker(
        self, end: GangEnd, seats: dict[str, Seat], address: str, cause: Cause, reason: str
    ) -> None:
        if address in seats:
            self._give_up(end, seats[address], cause, reason)
            return
        self._membership.evict(address, reason)
        self._tell(f"worker-{cause}", address=address, rank=-1, step=-1, reason=reason)

    def _give_up(self, end: GangEnd, seat: Seat, cause: Cause, reason: str) -> None:
        self._membership.evict(seat.address, reason)
        end.lose([_loss(seat, cause, reason)])

    def _tell(self, name: str, **details: Any) -> None:
        self._listener.on_event(Event(name=name, time_s=time.time(), details=details))


def _loss(seat: Seat, cause: Cause, reason: str) -> Loss:
    return Loss(address=seat.address, rank=seat.rank, cause=cause, reason=reason)
