"""From a run's checkpoints back to a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.checkpoints.codec import encode
from dask_nn.data.plan import PLAN_VERSION
from dask_nn.errors import ConfigurationError
from dask_nn.training.checkpointing import load_newest, prepare_storage
from dask_nn.training.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.training.snapshot import Snapshot
    from dask_nn.training.spec import TrainingSpec

__all__ = ["SavedRun", "describe_run", "open_checkpoints"]

REMEDIES = {
    "shards": "pass strategy=Synchronous(shards=...) as before",
    "data": "the rows, their types or their chunks changed; rechunk them as before",
    "model": "the module's parameters changed",
}


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The newest valid checkpoint of a run.

    Parameters
    ----------
    snapshot : Snapshot
        The state.
    configuration : mapping
        What decides the bits of the run.
    path : str
        Where it was read.
    skipped : tuple of (str, str)
        Newer checkpoints that could not be used, and why.
    """

    snapshot: Snapshot
    configuration: Mapping[str, Any]
    path: str
    skipped: tuple[tuple[str, str], ...] = ()

    def check(self, configuration: Mapping[str, Any]) -> None:
        """Check that a run would go on with the same bits.

        Raises
        ------
        ConfigurationError
            Names what differs.
        """
        differing = [
            f"{name} was {self.configuration.get(name)!r} and is now {value!r}"
            + (f" ({REMEDIES[name]})" if name in REMEDIES else "")
            for name, value in configuration.items()
            if self.configuration.get(name) != value
        ]
        if differing:
            message = (
                f"the run saved in {self.path} cannot be resumed like this: "
                f"{'; '.join(differing)}. Use the same values, or another checkpoint folder"
            )
            raise ConfigurationError(message)


def open_checkpoints(checkpoint: Checkpoint | None, *, resume: bool) -> SavedRun | None:
    """Check that checkpoints can be written, and read the newest one where a run is resumed.

    Raises
    ------
    CheckpointError
        If the place cannot be written, or has checkpoints of which none is valid.
    ConfigurationError
        If the place already has checkpoints and the run is a new one.
    """
    if checkpoint is None:
        return None
    occupied = prepare_storage(checkpoint)
    if not resume:
        if occupied:
            message = (
                f"{checkpoint.url} already has checkpoints; go on with resume=True "
                "(--resume), or choose another folder"
            )
            raise ConfigurationError(message)
        return None
    found = load_newest(checkpoint)
    if found is None:
        return None
    snapshot, configuration, path, skipped = found
    return SavedRun(
        snapshot=snapshot, configuration=configuration, path=path, skipped=tuple(skipped)
    )


def check_best(checkpoint: Checkpoint, spec: TrainingSpec, *, validated: bool) -> None:
    """Check that the entry by which the best checkpoint is chosen will be in the history.

    Raises
    ------
    ConfigurationError
        If it will not.
    """
    names = ["loss", *spec.metrics]
    if validated:
        names += [f"val_{name}" for name in names]
    if checkpoint.best is not None and checkpoint.best not in names:
        message = (
            f"best must be an entry of the history, one of {', '.join(names)}, got "
            f"{checkpoint.best!r}"
        )
        if checkpoint.best.startswith("val_") and not validated:
            message += "; give validation= for the others"
        raise ConfigurationError(message)


def describe_run(spec: TrainingSpec, *, saved: bool = False) -> dict[str, Any]:
    """Give everything that decides the bits of a run, as plain values.

    The number of epochs is left out: a finished run can be resumed with more of them.

    Parameters
    ----------
    spec : TrainingSpec
        The run.
    saved : bool
        Whether there will be checkpoints, so that its state must be one that can be saved.

    Raises
    ------
    CheckpointError
        If it cannot.
    """
    data = repr((spec.block_lengths, [(f.name, f.shape, f.dtype.str) for f in spec.fields]))
    model = repr(
        [(name, tuple(t.shape), str(t.dtype)) for name, t in spec.model.state_dict().items()]
    )
    state = TrainingState(spec, torch.device("cpu"))
    if saved:
        scheduler = {} if state.scheduler is None else state.scheduler.state_dict()
        encode({"optimizer": state.optimizer_weights(), "scheduler": scheduler}, {})
    return {
        "plan_version": PLAN_VERSION,
        "shards": spec.shards,
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "window": spec.window,
        "shuffle": spec.shuffle,
        "threads_per_rank": spec.threads_per_rank,
        "num_samples": sum(spec.block_lengths),
        "data": hashlib.sha256(data.encode()).hexdigest()[:16],
        "model": hashlib.sha256(model.encode()).hexdigest()[:16],
        "optimizer": type(state.optimizer).__name__,
        "clip_grad_norm": spec.clip_grad_norm,
    }
