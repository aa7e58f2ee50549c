"""What the ranks of a run say, passed on in the client's main thread."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_nn.controller.heartbeats import Beat
from dask_nn.errors import TrainingError
from dask_nn.events import Event, Progress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from distributed import Client

    from dask_nn.controller.heartbeats import Heartbeats
    from dask_nn.training.snapshot import Snapshot

__all__ = ["Listener", "RankMessages"]

# What a rank of an older gang had begun to write counts when it is written.
LATE_EVENTS = frozenset({"checkpoint", "checkpoint-failed", "checkpoint-skipped"})


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told what happens while a run goes on, in the client's main thread."""

    on_start: Callable[[], None]
    on_progress: Callable[[Progress], None]
    on_epoch: Callable[[dict[str, float]], None]
    on_event: Callable[[Event], None]


class RankMessages:
    """Hears the ranks of a run; those of older gangs are not listened to.

    Parameters
    ----------
    client : Client
        Of the cluster.
    topic : str
        Of the run.
    changed : threading.Event
        Set whenever a rank says more than that it lives.
    heartbeats : Heartbeats
        Told of every sign of life.
    listener : Listener
        Told of progress, epochs and events.
    on_start : callable
        Told when all ranks of a gang begin, with what rank 0 says of it.

    Attributes
    ----------
    generation : int
        The gang that is listened to.
    leaving : set of str
        Workers of which ranks have said that they are about to close.
    save_wanted : bool
        Whether the time of a rank's job is about to end.
    saved : tuple of (int, int, float)
        Epoch and steps of the newest checkpoint of this run that is known to be whole, and when,
        by ``time.monotonic()``, that became known.
    """

    def __init__(
        self,
        client: Client,
        topic: str,
        changed: threading.Event,
        *,
        heartbeats: Heartbeats,
        listener: Listener,
        on_start: Callable[[float, dict[str, Any]], None],
    ) -> None:
        self._client = client
        self._topic = topic
        self._changed = changed
        self._heartbeats = heartbeats
        self._listener = listener
        self._on_start = on_start
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.generation = 0
        self.leaving: set[str] = set()
        self.save_wanted = False
        self.saved = (0, 0, time.monotonic())

    def subscribe(self) -> None:
        """Begin to hear."""
        self._client.subscribe_topic(self._topic, self._hear)

    def unsubscribe(self) -> None:
        """Stop hearing, and let go of those who were told."""
        del self._on_start, self._listener
        self._client.unsubscribe_topic(self._topic)

    def note_start_from(self, start: Snapshot | None) -> None:
        """Know that the run starts from a checkpoint, or from its beginning."""
        position = (0, 0) if start is None else start.position
        self.saved = (*position, time.monotonic())

    def deliver(self) -> None:
        """Pass on what was heard, oldest first."""
        while True:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return
            if message["generation"] == self.generation:
                self._heartbeats.note(message["rank"], message["heard"])
                self._pass_on(message)
            elif message["kind"] == "event" and message["details"]["name"] in LATE_EVENTS:
                self._pass_on(message)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        self._messages.put(event[1] | {"heard": time.monotonic()})
        if event[1]["kind"] != "beat":
            self._changed.set()

    def _pass_on(self, message: dict[str, Any]) -> None:
        time_s, details = message["time_s"], message["details"]
        match message["kind"]:
            case "beat":
                self._heartbeats.note_beat(message["rank"], Beat(**details))
            case "leaving":
                self.leaving.add(details["address"])
            case "walltime":
                self.save_wanted = True
            case "saving":
                pass  # a sign of life
            case "start":
                self._on_start(time_s, details)
            case "progress":
                self._listener.on_progress(Progress(**details))
            case "epoch":
                record = details["record"]
                self._listener.on_epoch(record)
                self._listener.on_event(Event(name="epoch", time_s=time_s, details=record))
            case "event":
                name = details.pop("name")
                if name == "checkpoint":
                    place = (details["epoch"], details["steps"], message["heard"])
                    self.saved = max(self.saved, place)
                self._listener.on_event(Event(name=name, time_s=time_s, details=details))
            case kind:
                error = f"a rank sent a message of unknown kind {kind!r}"
                raise TrainingError(error)
