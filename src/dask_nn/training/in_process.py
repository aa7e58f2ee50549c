"""A run without a cluster: one rank computes all shards in this process."""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from dask_nn.collectives.serial import SerialCommunicator
from dask_nn.data.reader import BlockReader, MemoryReader, StreamReader
from dask_nn.errors import Aborted
from dask_nn.training.orders import Orders
from dask_nn.training.outcome import RunEnd
from dask_nn.training.rank_main import RankEnvironment, rank_main

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.data.blocks import Blocks
    from dask_nn.events import Progress
    from dask_nn.presses import Presses
    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.snapshot import Snapshot
    from dask_nn.training.spec import TrainingSpec

__all__ = ["run_in_process"]


def run_in_process(
    spec: TrainingSpec,
    blocks: Blocks,
    validation: Blocks | None,
    *,
    presses: Presses,
    on_start: Callable[[], None],
    on_progress: Callable[[Progress], None],
    on_epoch: Callable[[dict[str, float]], None],
    on_event: Callable[[str, dict[str, Any]], None],
    start: Snapshot | None = None,
    checkpoint: Checkpoint | None = None,
    configuration: dict[str, Any] | None = None,
) -> RunEnd:
    """Train in a thread of this process, so that Ctrl-C can ask it to stop at a step boundary.

    The calls back are made in the caller's thread.

    Returns
    -------
    RunEnd
        With the outcome of the only rank.
    """
    calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    patience = _Patience()
    env = RankEnvironment(
        comm=SerialCommunicator(0, 1),
        reader=_reader(blocks),
        validation_reader=None if validation is None else _reader(validation),
        start=lambda: start,
        checkpoint=checkpoint,
        orders=patience.orders,
        waiting=patience.check,
        configuration=configuration or {},
        on_start=lambda _: calls.put(on_start),
        on_progress=lambda progress: calls.put(partial(on_progress, progress)),
        on_epoch=lambda record: calls.put(partial(on_epoch, record)),
        on_event=lambda name, details: calls.put(partial(on_event, name, details)),
    )
    outcomes: list[RankOutcome] = []
    broken: list[BaseException] = []

    def work() -> None:
        try:
            outcomes.append(rank_main(spec, env))
        except BaseException as error:  # nobody else would hear of it
            broken.append(error)
        finally:
            calls.put(None)

    thread = threading.Thread(target=work, name="dask-nn-rank", daemon=True)
    thread.start()
    interrupted = False
    try:
        while True:
            called_back = False
            try:
                with presses.heard():
                    call = calls.get()
                    if call is not None:
                        called_back = True
                        call()
                        continue
                if broken:
                    raise broken[0]
                return RunEnd(outcomes=outcomes, interrupted=interrupted)
            except KeyboardInterrupt:
                pressed = presses.is_one() or not called_back
                if outcomes or broken:
                    calls.put(None)  # the one that was there may have gone with the interrupt
                elif interrupted and pressed:
                    raise
                interrupted = True
                env.orders.leave()
    finally:
        if not outcomes:
            patience.ended.set()
            env.comm.abort()
        thread.join()


class _Patience:
    """Whether checkpoints under way are still waited for."""

    def __init__(self) -> None:
        self.orders = Orders()
        self.orders.wait.set()  # when this process ends, nobody goes on writing
        self.ended = threading.Event()

    def check(self) -> None:
        if self.ended.is_set():
            message = "the run was ended before it was written"
            raise Aborted(message)


def _reader(blocks: Blocks) -> BlockReader:
    if blocks.stream is not None:
        return StreamReader(blocks.stream, fetch_shared=_no_cluster)
    return MemoryReader(blocks.arrays or ())


def _no_cluster(keys: list[Any]) -> list[Any]:
    message = f"{keys} would have to come from a cluster, but there is none"
    raise RuntimeError(message)
