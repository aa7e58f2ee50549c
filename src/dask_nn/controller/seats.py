"""The workers of the next gang: those that can train, and that no other run holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dask_nn.controller.leases import Leases
    from dask_nn.controller.membership import Membership
    from dask_nn.controller.placement import Seating
    from dask_nn.training.spec import TrainingSpec

__all__ = ["Seats"]


class Seats:
    """Finds workers for a run, and claims them.

    Parameters
    ----------
    membership : Membership
        The workers that are there.
    leases : Leases
        Which run holds which.
    spec : TrainingSpec
        What the ranks compute.
    """

    def __init__(self, membership: Membership, leases: Leases, spec: TrainingSpec) -> None:
        self._membership = membership
        self._leases = leases
        self._spec = spec

    def claim_first(
        self,
        seating: Seating,
        *,
        queue_timeout_s: float,
        on_queued: Callable[[Collection[str]], None],
    ) -> Seating:
        """Claim what was chosen, as many others that are free, or wait until the others are done.

        Parameters
        ----------
        seating : Seating
            The first choice.
        queue_timeout_s : float
            Longest wait.
        on_queued : callable
            Told whose turn it is, if there is a wait.

        Raises
        ------
        ClusterError
            If other runs keep the workers for too long.
        """
        if not self._leases.claim(seating.addresses):
            return seating
        free = self._find_free()
        enough = free is not None and len(free.workers) >= len(seating.workers)
        if free is not None and enough and not self._leases.claim(free.addresses):
            return free
        self._leases.wait_for(seating.addresses, queue_timeout_s, on_queued)
        return seating

    def claim(self) -> Seating | None:
        """Choose and claim workers among those that are there now, and stay.

        Returns
        -------
        Seating or None
            None if there are none, other runs have them, or the scheduler is silent.
        """
        seating = self._find_free()
        try:
            return None if seating is None or self._leases.claim(seating.addresses) else seating
        except ClusterError:  # for how long it may be silent is for who lists the workers to say
            return None

    def more_than(self, ranks: int) -> bool:
        """Say whether more workers than `ranks` could train, and are free, as far as is known.

        Parameters
        ----------
        ranks : int
            Of the gang at work.
        """

        def are_more(seating: Seating | None) -> bool:
            return seating is not None and len(seating.workers) > ranks

        # Leases are asked of the scheduler, so only where it matters.
        return are_more(self._find()) and are_more(self._find_free())

    def _find_free(self) -> Seating | None:
        """Choose among workers that no other run holds; None also where the scheduler is silent."""
        try:
            return self._find(self._leases.taken())
        except ClusterError:
            return None

    def _find(self, taken: Collection[str] = ()) -> Seating | None:
        return self._membership.seating(
            shards=self._spec.shards,
            threads_per_rank=self._spec.threads_per_rank,
            device=self._spec.device,
            taken=taken,
        )
