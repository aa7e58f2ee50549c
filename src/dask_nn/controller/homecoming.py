"""The state at the end of a run, brought to the client from whichever rank still has it."""

from __future__ import annotations

import logging
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
    from dask_nn.training.snapshot import Snapshot

__all__ = ["bring_home", "save_here", "with_state"]

logger = logging.getLogger("dask_nn")


def bring_home(client: Client, sources: Iterable[StateSource], run_id: str) -> Snapshot | None:
    """Fetch the newest of some states that can still be had.

    Parameters
    ----------
    client : Client
        Of the cluster.
    sources : iterable of StateSource
        Where states are; ranks that came as far as each other have the same one.
    run_id : str
        The run.

    Returns
    -------
    Snapshot or None
        None if nobody has one any more.
    """
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
            client, state_piece, [address], run_id, source.generation, offset, timeout_s=PIECE_S
        ).result(2 * PIECE_S)
        answer = answers[address]
        if isinstance(answer, Exception):
            raise OSError(f"{answer!r}") from answer
        return answer

    return collect_state(ask, source)


def with_state(outcomes: Sequence[RankOutcome], snapshot: Snapshot) -> list[RankOutcome]:
    """Let the outcome of rank 0 say with which state the run ended.

    Parameters
    ----------
    outcomes : sequence of RankOutcome
        Of the ranks that could say how they ended; perhaps not of rank 0, perhaps none.
    snapshot : Snapshot
        The newest state.
    """
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


def save_here(
    checkpoint: Checkpoint,
    snapshot: Snapshot,
    configuration: Mapping[str, Any],
    on_event: Callable[[str, dict[str, Any]], None],
) -> None:
    """Write a checkpoint from this process, where no rank is left that would."""
    checkpointer = Checkpointer(checkpoint, configuration=dict(configuration), on_event=on_event)
    checkpointer.save(snapshot)
    checkpointer.finish(lambda: None)
    checkpointer.close()
