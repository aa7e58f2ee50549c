"""A run without a cluster: one rank computes all shards in this process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dask_nn.collectives.serial import SerialCommunicator
from dask_nn.data.reader import MemoryReader
from dask_nn.training.rank_main import RankEnvironment, rank_main

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.data.blocks import Blocks
    from dask_nn.events import Progress
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.spec import TrainingSpec

__all__ = ["run_in_process"]


def run_in_process(
    spec: TrainingSpec,
    blocks: Blocks,
    validation: Blocks | None,
    *,
    on_start: Callable[[], None],
    on_progress: Callable[[Progress], None],
    on_epoch: Callable[[dict[str, float]], None],
) -> tuple[RankOutcome, bool]:
    """Train in a thread of this process, so that Ctrl-C can ask it to stop at a step boundary.

    Returns
    -------
    RankOutcome
        How it ended.
    bool
        Whether Ctrl-C ended it.
    """
    env = RankEnvironment(
        comm=SerialCommunicator(0, 1),
        reader=MemoryReader(blocks.arrays or ()),
        validation_reader=None if validation is None else MemoryReader(validation.arrays or ()),
        on_start=on_start,
        on_progress=on_progress,
        on_epoch=on_epoch,
    )
    outcomes: list[RankOutcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(rank_main(spec, env)), name="dask-nn-rank", daemon=True
    )
    thread.start()
    interrupted = False
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            if interrupted:
                env.comm.abort()
                raise
            interrupted = True
            env.stop_event.set()
    return outcomes[0], interrupted
