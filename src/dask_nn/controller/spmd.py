"""The spmd engine: one gang of rank tasks, watched until it ends."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_nn.controller.rank_group import RankGroup
from dask_nn.errors import TrainingError
from dask_nn.events import Event, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

    from dask_nn.controller.placement import Seating
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.training.outcome import RankOutcome

__all__ = ["Listener", "run_spmd"]

POLL_S = 0.2
# After a rank failed, its peers get so long to say how they ended.
AFTERMATH_S = 10.0
# Ctrl-C waits so long for the ranks to reach a step boundary.
STOP_S = 1.5
# However the run ended, ranks that still work get so long to notice.
END_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told what happens while a run goes on, in the client's main thread."""

    on_start: Callable[[], None]
    on_progress: Callable[[Progress], None]
    on_epoch: Callable[[dict[str, float]], None]
    on_event: Callable[[Event], None]


def run_spmd(
    payload: RankPayload,
    *,
    client: Client,
    seating: Seating,
    collective: str,
    listener: Listener,
) -> tuple[list[RankOutcome], bool]:
    """Train with one gang.

    Parameters
    ----------
    payload : RankPayload
        What the ranks are sent.
    client : Client
        Of the cluster.
    seating : Seating
        The gang's workers.
    collective : str
        Name of the communicator.
    listener : Listener
        Told of starts, progress, epochs and events.

    Returns
    -------
    list of RankOutcome
        Of all ranks that could still say how they ended, by rank.
    bool
        Whether Ctrl-C ended the run.

    Raises
    ------
    WorkerLost
        If a worker of the gang leaves the cluster.
    """
    run_id = uuid.uuid4().hex[:12]
    changed = threading.Event()
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    removed: set[str] = set()

    def hear(event: tuple[float, dict[str, Any]]) -> None:
        messages.put(event[1])
        changed.set()

    def hear_of(address: str) -> Callable[[tuple[float, Any]], None]:
        def hear_cluster(event: tuple[float, Any]) -> None:
            if event[1].get("action") == "remove-worker":
                removed.add(address)
                changed.set()

        return hear_cluster

    topic = f"dask-nn-{run_id}"
    group = RankGroup(
        client,
        run_id=run_id,
        generation=0,
        seating=seating,
        collective=collective,
        changed=changed,
    )
    # The scheduler tells a worker's own topic that the worker is gone, at once.
    losses = {seat.address: hear_of(seat.address) for seat in group.seats}
    with _subscribed(client, {topic: hear, **losses}):
        try:
            group.start(payload)
            removed |= group.absent()  # those that left before the subscription
            return _watch(group, changed, messages, removed, listener)
        finally:
            _end(group, changed, removed)
            group.release()


def _watch(
    group: RankGroup,
    changed: threading.Event,
    messages: queue.SimpleQueue[dict[str, Any]],
    removed: set[str],
    listener: Listener,
) -> tuple[list[RankOutcome], bool]:
    interrupted = False
    deadline: float | None = None
    while True:
        try:
            changed.wait(POLL_S)
            changed.clear()
            _deliver(messages, listener)
            outcomes = group.outcomes()
            ended = [outcome for outcome in outcomes if outcome is not None]
            if len(ended) == len(outcomes):
                return ended, interrupted
            lost = group.lost(removed)
            if lost is not None:
                raise lost
            if any(o.status in {"failed", "aborted"} for o in ended):
                group.signal("abort")  # again and again: a rank may just be starting
                deadline = deadline or time.monotonic() + AFTERMATH_S
            if deadline is not None and time.monotonic() > deadline:
                return ended, interrupted
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            deadline = time.monotonic() + STOP_S
            group.signal("stop")


def _end(group: RankGroup, changed: threading.Event, removed: set[str]) -> None:
    """End ranks that are still at work: a cancelled task would go on in its thread."""
    deadline = time.monotonic() + END_S
    while group.is_running(removed) and time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # what ended the run says more
            group.signal("abort")
        changed.wait(POLL_S)
        changed.clear()


def _deliver(messages: queue.SimpleQueue[dict[str, Any]], listener: Listener) -> None:
    """Pass on what the ranks said, oldest first."""
    while True:
        try:
            message = messages.get_nowait()
        except queue.Empty:
            return
        time_s, details = message["time_s"], message["details"]
        match message["kind"]:
            case "start":
                listener.on_start()
                listener.on_event(Event(name="first-step", time_s=time_s))
            case "progress":
                listener.on_progress(Progress(**details))
            case "epoch":
                listener.on_epoch(details["record"])
                listener.on_event(Event(name="epoch", time_s=time_s, details=details["record"]))
            case kind:
                error = f"a rank sent a message of unknown kind {kind!r}"
                raise TrainingError(error)


@contextlib.contextmanager
def _subscribed(client: Client, handlers: dict[str, Callable[[Any], None]]) -> Any:
    for topic, handler in handlers.items():
        client.subscribe_topic(topic, handler)
    try:
        yield
    finally:
        for topic in handlers:
            with contextlib.suppress(Exception):
                client.unsubscribe_topic(topic)
