"""When a run is saved, and what of it."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dask_nn.checkpoints.manager import CheckpointContent, CheckpointManager
from dask_nn.errors import Aborted, CheckpointError
from dask_nn.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dask_nn.checkpoints.manifest import Manifest
    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["Checkpointer", "LastSave", "Saved", "load_newest", "prepare_storage", "sees_storage"]

# A run that is over waits so long for its last checkpoint.
FINISH_S = 300.0
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LastSave:
    """The newest checkpoint of a run that is known to be whole, or the run's start.

    Parameters
    ----------
    epoch, steps : int
        Its place in the run.
    age_s : float
        How long ago it was written.
    """

    epoch: int
    steps: int
    age_s: float = 0.0


class Saved(Protocol):
    """A run that can be saved at a step boundary."""

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        ...

    @property
    def epoch(self) -> int:
        """Epochs completed over the whole run."""
        ...

    def snapshot(self) -> Snapshot:
        """Copy the state after the last completed step."""
        ...


class Checkpointer:
    """Saves a run from rank 0, without making it wait for the disk.

    Parameters
    ----------
    options : Checkpoint
        Where, and how often.
    configuration : dict
        What decides the bits of the run, with ``run_id`` and ``generation``.
    on_event : callable, optional
        Told of every checkpoint, written or not.
    save_soon : threading.Event, optional
        Asks for a checkpoint at the next step boundary.
    last : LastSave, optional
        The run's newest checkpoint, where an earlier gang wrote one; steps and seconds until the
        next one count from there.
    """

    def __init__(
        self,
        options: Checkpoint,
        *,
        configuration: dict[str, Any],
        on_event: Callable[[str, dict[str, Any]], None] | None,
        save_soon: threading.Event | None = None,
        last: LastSave | None = None,
    ) -> None:
        self._save_soon = save_soon or threading.Event()
        self._save_at = options.save_at()
        self._options = options
        self._configuration = dict(configuration)
        # A run in one process has no other name; it may be stopped and taken up elsewhere, too.
        self._run_id = str(self._configuration.pop("run_id", "")) or uuid.uuid4().hex[:12]
        self._generation = int(self._configuration.pop("generation", 0))
        self._manager = CheckpointManager(options, on_event=on_event)
        self._on_event = on_event
        self._last = last
        self._saved_steps = 0 if last is None else last.steps
        self._saved_s = time.monotonic() - (0.0 if last is None else last.age_s)

    def begin(self, run: Saved) -> None:
        """Count from here, or save at once what an earlier gang should have saved and did not.

        From now on no earlier gang of the run writes anything that counts.
        """
        self._manager.claim(self._run_id, self._generation, (run.epoch, run.steps))
        if self._last is None:
            self._saved_steps = run.steps
        elif self._is_due(run, epoch_ended=run.epoch > self._last.epoch):
            snapshot = run.snapshot()
            at_boundary = snapshot.history and not snapshot.step
            self._save(snapshot, snapshot.history[-1] if at_boundary else None)

    def after_step(self, run: Saved) -> None:
        """Save if so many steps or seconds have passed."""
        if self._is_due(run, epoch_ended=False):
            self._save(run.snapshot())

    def after_epoch(self, run: Saved, record: dict[str, float]) -> None:
        """Save if every epoch is saved, or it is time anyway."""
        if self._is_due(run, epoch_ended=True):
            self._save(run.snapshot(), record)

    def save(self, snapshot: Snapshot) -> None:
        """Save what is reached: the run may end here."""
        if snapshot.steps != self._saved_steps and not snapshot.non_finite:
            self._save(snapshot)

    def finish(self, waiting: Callable[[], None]) -> None:
        """Wait until everything is written, and tell if it takes too long.

        Parameters
        ----------
        waiting : callable
            Called now and then; raises :class:`~dask_nn.errors.Aborted` to wait no longer.
        """
        deadline = time.monotonic() + FINISH_S
        told = False
        try:
            while not self._manager.wait(POLL_S):
                waiting()
                if not told and self._on_event is not None:
                    told = True
                    self._on_event("saving", {"path": str(self._options.url)})
                if time.monotonic() > deadline:
                    self._manager.give_up(f"the storage did not take it within {FINISH_S:g} s")
                    return
        except Aborted as error:
            self._manager.give_up(str(error))

    def close(self) -> None:
        """Take nothing more; a thread of this process goes on writing what is under way."""
        self._manager.close()

    def _is_due(self, run: Saved, *, epoch_ended: bool) -> bool:
        if self._save_at is not None and time.time() >= self._save_at:
            self._save_at = None
            self._save_soon.set()
        if self._save_soon.is_set():
            self._save_soon.clear()
            return True
        return self._options.due(
            run.steps - self._saved_steps, time.monotonic() - self._saved_s, epoch_ended
        )

    def _save(self, snapshot: Snapshot, record: dict[str, float] | None = None) -> None:
        self._saved_steps = snapshot.steps
        self._saved_s = time.monotonic()
        self._manager.save(self._content(snapshot, record))

    def _content(self, snapshot: Snapshot, record: dict[str, float] | None) -> CheckpointContent:
        tree = {
            "weights": dict(snapshot.weights),
            "buffers": dict(snapshot.buffers),
            "optimizer": snapshot.optimizer,
            "scheduler": snapshot.scheduler,
            "step": snapshot.step,
            "sums": {
                "loss_sum": snapshot.loss_sum,
                "normalizer": snapshot.normalizer,
                "samples": snapshot.samples,
                "seconds": snapshot.seconds,
                "last_loss": snapshot.last_loss,
            },
        }
        return CheckpointContent(
            tree=tree,
            epoch=snapshot.epoch,
            step=snapshot.step,
            steps=snapshot.steps,
            configuration=self._configuration,
            history=list(snapshot.history),
            record=record or {},
            run_id=self._run_id,
            generation=self._generation,
            bitwise=snapshot.bitwise,
            canary=snapshot.canary,
        )


@contextmanager
def prepare_storage(options: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Check that checkpoints can be written; tell whether there are any.

    Yields
    ------
    tuple of str and bool
        The name of a file that is there for as long as the ``with`` block lasts, and whether there
        are checkpoints.

    Raises
    ------
    CheckpointError
        If they cannot.
    """
    manager = CheckpointManager(options)
    with manager.probe() as name:
        yield name, bool(manager.names())


def sees_storage(options: Checkpoint, name: str) -> bool:
    """Tell whether this process sees a file of `prepare_storage`."""
    return CheckpointManager(options).has_probe(name)


def load_newest(
    options: Checkpoint,
) -> tuple[Snapshot, Manifest, str, Sequence[tuple[str, str]]] | None:
    """Read the newest valid checkpoint: state, manifest, path, and what was passed over.

    Raises
    ------
    CheckpointError
        If there are checkpoints, but none that can be used.
    """
    manager = CheckpointManager(options)
    found = manager.load_latest()
    if found is None:
        return None
    content, manifest, skipped = found
    tree = content.tree
    snapshot = Snapshot(
        weights=_tensors(tree["weights"]),
        buffers=_tensors(tree["buffers"]),
        optimizer=tree["optimizer"],
        scheduler=tree["scheduler"],
        epoch=manifest.epoch,
        step=manifest.step,
        steps=manifest.steps,
        history=tuple(manifest.history),
        bitwise=manifest.bitwise,
        canary=manifest.canary,
        **tree["sums"],
    )
    return snapshot, manifest, str(content.path), skipped


def _tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    if not all(isinstance(value, torch.Tensor) for value in values.values()):
        message = "a checkpoint has weights that are no tensors"
        raise CheckpointError(message)
    return values
