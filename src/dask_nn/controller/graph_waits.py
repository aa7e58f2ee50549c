"""Waiting for tasks of the graph engine, with an eye on the workers and an ear for Ctrl-C."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future as Promise
from typing import TYPE_CHECKING, Any

from distributed import KilledWorker
from distributed.client import FutureCancelledError

from dask_nn.controller.cluster import in_loop
from dask_nn.errors import DaskNNError, RankFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from distributed import Client, Future

    from dask_nn.controller.graph_watch import WorkerWatch

__all__ = ["TaskWaits"]

POLL_S = 0.2
# After Ctrl-C the steps under way may take so long to finish.
STOP_S = 1.2
SEND_S = 10.0


class TaskWaits:
    """Waits of one run; none of them ends only when somebody who is stopped answers.

    Parameters
    ----------
    client : Client
        Of the cluster.
    watch : WorkerWatch
        Looked at while a wait lasts: it gives up workers that hang, and then the wait goes on, or
        ends with an error of Dask's own kinds.

    Attributes
    ----------
    interrupted : bool
        Whether there was a Ctrl-C.
    """

    def __init__(self, client: Client, watch: WorkerWatch) -> None:
        self._client = client
        self._watch = watch
        self.interrupted = False

    def values(self, futures: Sequence[Future[Any]], *, step: int) -> list[Any]:
        """Give what some tasks return.

        Raises
        ------
        RankFailed, or another of dask-nn's own errors
            If a task raised an error, of whatever kind: it would come again.
        KilledWorker, FutureCancelledError, OSError
            If the scheduler cannot compute it any more.
        """
        self.ended(futures)
        for future in futures:
            _raise_error(future, step)
        gathering: Any = self._client._gather(list(futures))  # noqa: SLF001  (no deadline otherwise)
        found: list[Any] = self.result(in_loop(self._client, gathering))
        return found

    def value(self, future: Future[Any], *, step: int) -> Any:
        """Give what one task returns; see `values`."""
        return self.values([future], step=step)[0]

    def ended(
        self, futures: Sequence[Future[Any]], given_up: Callable[[], Collection[Future[Any]]] = list
    ) -> None:
        """Wait until tasks have ended, well or not, but for those that can be given up."""
        changed = threading.Event()
        for future in futures:
            future.add_done_callback(lambda _: changed.set())

        def is_over() -> bool:
            changed.clear()
            waited_for = set(futures) - set(given_up())
            return all(future.done() for future in waited_for)

        self._until(is_over, changed.wait)

    def result[T](self, promise: Promise[T]) -> T:
        """Give the result of something that goes on elsewhere."""
        changed = threading.Event()
        promise.add_done_callback(lambda _: changed.set())
        try:
            self._until(promise.done, changed.wait)
        except BaseException:
            promise.cancel()
            raise
        return promise.result()

    def send(self, value: Any) -> Future[Any]:
        """Put a value into a worker's memory, from which tasks elsewhere fetch it.

        Dask's broadcast would wait until no worker of the cluster is being retired.
        """
        scatter: Any = self._client._scatter  # noqa: SLF001  (the other has no deadline)
        sending = scatter(value, hash=False, timeout=SEND_S)
        future: Future[Any] = self.result(in_loop(self._client, sending))
        return future

    def apart(self, work: Callable[[], None]) -> None:
        """Do what may block in a thread of its own."""
        promise: Promise[None] = Promise()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                promise.set_exception(error)
            else:
                promise.set_result(None)

        threading.Thread(target=run, name="dask-nn-graph", daemon=True).start()
        self.result(promise)

    def _until(self, is_over: Callable[[], bool], wait: Callable[[float], Any]) -> None:
        deadline = time.monotonic() + STOP_S if self.interrupted else None
        while not is_over():
            if deadline is not None and time.monotonic() > deadline:
                raise KeyboardInterrupt
            try:
                wait(POLL_S)
                self._watch.look()
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True
                deadline = time.monotonic() + STOP_S


def _raise_error(future: Future[Any], step: int) -> None:
    """Raise what a task raised; what the user's code raises is no fault of the cluster."""
    if future.status != "error":
        if future.status in {"cancelled", "lost"}:
            raise FutureCancelledError(future.key, f"{future.status}")
        return
    error = future.exception()
    if isinstance(error, DaskNNError | KilledWorker):
        raise error
    message = f"{type(error).__name__}: {error}"
    raise RankFailed(message, -1, step, "?", message)
