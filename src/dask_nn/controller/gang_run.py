"""One gang from its start until its ranks are let go of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.controller.gang_end import GangEnd, Loss
from dask_nn.controller.rank_group import NobodyTakes, Unanswered

if TYPE_CHECKING:
    from distributed import Client

    from dask_nn.controller.gang_watch import GangWatch
    from dask_nn.controller.membership import Membership
    from dask_nn.controller.rank_group import RankGroup
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.presses import Presses

__all__ = ["run_gang"]


def run_gang(
    group: RankGroup,
    payload: RankPayload,
    *,
    client: Client,
    membership: Membership,
    watch: GangWatch,
    presses: Presses,
) -> GangEnd:
    """Start a gang, follow it to its end, and end what its ranks still do then.

    Parameters
    ----------
    group : RankGroup
        The gang.
    payload : RankPayload
        What its ranks are sent.
    client : Client
        Of the cluster.
    membership : Membership
        Who is there.
    watch : GangWatch
        Follows it.
    presses : Presses
        Of Ctrl-C.

    Returns
    -------
    GangEnd
        Also where its workers could not be sent their work, and after Ctrl-C.

    Raises
    ------
    OSError, KeyError, ClusterError
        If the scheduler is gone.
    """
    try:
        end = _start(group, payload, client=client, membership=membership, presses=presses)
        if end is None:
            end = watch.follow(group)
    finally:
        interrupted = watch.end(group)
        # Also of ranks that were not waited for, and have said by now how they ended.
        outcomes = group.outcomes() if client.status == "running" else None
        group.release()
    if outcomes is not None:
        end.outcomes = outcomes
    if interrupted:
        end.interrupted, end.cause = True, None
    return end


def _start(
    group: RankGroup,
    payload: RankPayload,
    *,
    client: Client,
    membership: Membership,
    presses: Presses,
) -> GangEnd | None:
    """Start the ranks; give the gang's end where that cannot be done."""
    try:
        try:
            with presses.heard():
                sent = group.send(payload, membership.removed)
        except (OSError, KeyError) as error:  # Dask's for a worker that leaves meanwhile
            if client.status != "running":
                raise
            return _not_started(group, error, membership)
        # Ctrl-C must not come in between: ranks that nobody follows leave states nobody knows of.
        group.start(sent)
    except KeyboardInterrupt:
        return GangEnd(interrupted=True)
    return None


def _not_started(group: RankGroup, error: OSError | KeyError, membership: Membership) -> GangEnd:
    """Say what became of a gang whose workers could not be sent their work."""
    end = GangEnd()
    silent = error.addresses if isinstance(error, Unanswered) else ()
    for address in silent:
        membership.evict(address, "does not answer")
    membership.catch_up()
    ready = all(membership.starts_tasks(seat.address) for seat in group.seats)
    gone = group.lost(membership.removed)
    lost = [seat for seat in gone if not membership.is_retired(seat.address)]
    end.lose(
        Loss(
            address=seat.address,
            rank=seat.rank,
            cause="hung" if seat.address in silent else "lost",
            reason="does not answer" if seat.address in silent else f"left ({error!r})",
        )
        for seat in lost
    )
    if not lost and (isinstance(error, NobodyTakes) or not ready):
        end.break_off("resize")
    else:
        end.break_off("broken", f"its workers could not be sent their work: {error!r}")
    return end
