"""The state at the end of a run, brought to the client from whichever rank still has it."""

from __future__ import annotations

import logging
import queue
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers
from dask_nn.controller.keeping import PIECE_S, StateSource, collect_state, state_piece
from dask_nn.errors import Aborted
from dask_nn.training.checkpointing import Checkpointer
from dask_nn.training.outcome import RankOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from distributed import Client

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.controller.gang_end import GangEnd
    from dask_nn.controller.kept_states import KeptStates
    from dask_nn.presses import Presses
    from dask_nn.training.snapshot import Snapshot

__all__ = ["Homecoming"]

logger = logging.getLogger("dask_nn")


class Homecoming:
    """Says how a run ended, with the newest state that anybody has.

    Parameters
    ----------
    client : Client
        Of the cluster.
    run_id : str
        The run.
    kept : KeptStates
        Which workers have a state.
    checkpoint : Checkpoint or None
        Where a state is saved that no rank is left to save.
    configuration : dict
        What every checkpoint says of the run.
    saved : callable
        Gives epoch and steps of the newest checkpoint that is whole.
    on_event : callable
        Told of what happens: a name and details.
    presses : Presses
        Of Ctrl-C.

    Attributes
    ----------
    bitwise : bool
        Whether the ranks of all gangs, not of the last one alone, computed the same bits.
    """

    def __init__(
        self,
        client: Client,
        run_id: str,
        *,
        kept: KeptStates,
        checkpoint: Checkpoint | None,
        configuration: Mapping[str, Any],
        saved: Callable[[], tuple[int, int]],
        on_event: Callable[[str, dict[str, Any]], None],
        presses: Presses,
    ) -> None:
        self._presses = presses
        self._client = client
        self._run_id = run_id
        self._kept = kept
        self._checkpoint = checkpoint
        self._configuration = configuration
        self._saved = saved
        self._on_event = on_event
        self.bitwise = True

    def finish(self, end: GangEnd, generation: int) -> list[RankOutcome] | None:
        """Give the outcomes of a gang that ends the run, with its state; None if that is lost."""
        if _has_its_own(end.outcomes):
            return self._marked(end.outcomes)
        done = {outcome.status for outcome in end.outcomes}
        stopped = any(outcome.rank == 0 and outcome.status == "stopped" for outcome in end.outcomes)
        if end.interrupted and not (stopped and end.save_ordered):
            return self.salvage(end, generation)
        if "failed" in done and not end.interrupted:
            return self._marked(end.outcomes)
        snapshot = self._fetch(self._kept.sources())
        if snapshot is None:
            return end.outcomes if end.interrupted else None
        return self._marked(_with_state(end.outcomes, snapshot))

    def salvage(self, end: GangEnd, generation: int) -> list[RankOutcome]:
        """Fetch the newest state there still is where the run does not go on, and save it."""
        if self._client.status != "running":
            return end.outcomes
        if _has_its_own(end.outcomes):
            return self._marked(end.outcomes)
        snapshot = self._fetch_anyway(self._kept.states())
        if snapshot is None:
            return end.outcomes
        if self._checkpoint is not None and snapshot.position > self._saved():
            place = {"run_id": self._run_id, "generation": generation}
            self._save_here(self._checkpoint, snapshot, {**self._configuration, **place})
        return self._marked(_with_state(end.outcomes, snapshot))

    def _fetch(self, sources: Iterable[StateSource]) -> Snapshot | None:
        return _bring_home(self._client, sources, self._run_id)

    def _fetch_anyway(self, sources: Iterable[StateSource]) -> Snapshot | None:
        """Fetch it in spite of a Ctrl-C: the run ends as it is. A second one is obeyed."""
        interrupted = False
        while True:
            try:
                with self._presses.heard():
                    return self._fetch(sources)
            except KeyboardInterrupt:
                if self._presses.is_another() and interrupted:
                    logger.warning("the state that was reached is left behind")
                    return None
                interrupted = True

    def _save_here(
        self, checkpoint: Checkpoint, snapshot: Snapshot, configuration: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint from this process, where no rank is left that would.

        Ctrl-C ends the wait for it; what is under way may still be written then.
        """
        told: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()

        def pass_on() -> None:  # callbacks are called in this thread
            while not told.empty():
                self._on_event(*told.get())

        checkpointer = Checkpointer(
            checkpoint,
            configuration=dict(configuration),
            on_event=lambda name, details: told.put((name, details)),
        )
        try:
            checkpointer.save(snapshot)
            waiting = True
            while waiting:
                try:
                    with self._presses.heard():
                        checkpointer.finish(pass_on)
                        pass_on()
                    waiting = False
                except KeyboardInterrupt:
                    if self._presses.is_another():
                        steps = snapshot.steps
                        logger.warning("the checkpoint of step %d was not waited for", steps)
                        waiting = False
        finally:
            checkpointer.close()

    def _marked(self, outcomes: Sequence[RankOutcome]) -> list[RankOutcome]:
        return [replace(o, bitwise=o.bitwise and self.bitwise) for o in outcomes]


def _has_its_own(outcomes: Iterable[RankOutcome]) -> bool:
    """Tell whether rank 0 has given the state itself: the last good one, not the newest."""
    return any(outcome.rank == 0 and outcome.state for outcome in outcomes)


def _bring_home(client: Client, sources: Iterable[StateSource], run_id: str) -> Snapshot | None:
    """Fetch the newest of some states that can still be had; None if nobody has one any more."""
    for source in sorted(sources, key=lambda source: source.position, reverse=True):
        try:
            return _fetch(client, source, run_id)
        except (Aborted, OSError) as error:
            logger.warning("the state of %s could not be fetched: %s", source.address, error)
    return None


def _fetch(client: Client, source: StateSource, run_id: str) -> Snapshot:
    address = source.address

    def ask(offset: int) -> Any:
        answers = ask_workers(
            client, state_piece, [address], run_id, source.position, offset, timeout_s=PIECE_S
        ).result(2 * PIECE_S)
        answer = answers[address]
        if isinstance(answer, Exception):
            raise OSError(f"{answer!r}") from answer
        return answer

    return collect_state(ask, source)


def _with_state(outcomes: Sequence[RankOutcome], snapshot: Snapshot) -> list[RankOutcome]:
    """Let the outcome of rank 0, which may not be known, say with which state the run ended."""
    first = next((outcome for outcome in outcomes if outcome.rank == 0), None)
    first = first or next(iter(outcomes), RankOutcome(rank=0, status="stopped"))
    leader = replace(
        first,
        rank=0,
        state=dict(snapshot.weights),
        optimizer_state=dict(snapshot.optimizer),
        steps=snapshot.steps,
        epoch=snapshot.epoch,
        history=list(snapshot.history),
        loss=snapshot.last_loss,
    )
    return [leader, *(outcome for outcome in outcomes if outcome.rank > 0)]
