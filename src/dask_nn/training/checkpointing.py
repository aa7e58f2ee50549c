"""When a run is saved, and what of it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dask_nn.checkpoints.manager import CheckpointContent, CheckpointManager
from dask_nn.errors import CheckpointError
from dask_nn.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["Checkpointer", "Saved", "load_newest", "prepare_storage"]

# A rank that ends waits so long for a checkpoint under way.
CLOSE_S = 30.0


class Saved(Protocol):
    """A run that can be saved at a step boundary."""

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        ...

    @property
    def first_steps(self) -> int:
        """Steps completed when this part of the run began."""
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
    """

    def __init__(
        self,
        options: Checkpoint,
        *,
        configuration: dict[str, Any],
        on_event: Callable[[str, dict[str, Any]], None] | None,
        save_soon: threading.Event | None = None,
    ) -> None:
        self._save_soon = save_soon or threading.Event()
        self._save_at = options.save_at()
        self._options = options
        self._configuration = dict(configuration)
        self._run_id = str(self._configuration.pop("run_id", ""))
        self._generation = int(self._configuration.pop("generation", 0))
        self._manager = CheckpointManager(options, on_event=on_event)
        self._saved_steps: int | None = None
        self._saved_s = time.monotonic()

    def after_step(self, run: Saved) -> None:
        """Save if so many steps or seconds have passed."""
        if self._is_due(run, epoch_ended=False):
            self._save(run.snapshot())

    def after_epoch(self, run: Saved, record: dict[str, float]) -> None:
        """Save if every epoch is saved, or it is time anyway."""
        if self._is_due(run, epoch_ended=True):
            self._save(run.snapshot(), record)

    def save_now(self, snapshot: Snapshot) -> None:
        """Save what is reached and wait for it: this process is about to end."""
        if snapshot.steps != self._saved_steps:
            self._manager.flush_now(self._content(snapshot, None), CLOSE_S)

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close(CLOSE_S)

    def _is_due(self, run: Saved, *, epoch_ended: bool) -> bool:
        if self._saved_steps is None:
            self._saved_steps = run.first_steps
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
        )


def prepare_storage(options: Checkpoint) -> bool:
    """Check that checkpoints can be written; tell whether there are any.

    Raises
    ------
    CheckpointError
        If they cannot.
    """
    manager = CheckpointManager(options)
    manager.check_writable()
    return bool(manager.names())


def load_newest(
    options: Checkpoint,
) -> tuple[Snapshot, dict[str, Any], str, Sequence[tuple[str, str]]] | None:
    """Read the newest valid checkpoint: state, configuration, path, and what was passed over.

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
        **tree["sums"],
    )
    return snapshot, dict(manifest.configuration), str(content.path), skipped


def _tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    if not all(isinstance(value, torch.Tensor) for value in values.values()):
        message = "a checkpoint has weights that are no tensors"
        raise CheckpointError(message)
    return values
