"""From a run's checkpoints back to a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dask_nn.checkpoints.codec import encode
from dask_nn.checkpoints.serialization import weights_sha256
from dask_nn.controller.cluster import ask_workers
from dask_nn.data.plan import PLAN_VERSION
from dask_nn.errors import CheckpointError, ConfigurationError
from dask_nn.training.checkpointing import load_newest, prepare_storage, sees_storage
from dask_nn.training.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distributed import Client

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.training.snapshot import Snapshot
    from dask_nn.training.spec import TrainingSpec

__all__ = [
    "SavedRun",
    "check_best",
    "check_best_name",
    "check_shared",
    "describe_run",
    "newest_checkpoint",
    "open_checkpoints",
]

# A worker that does not answer within this time is not accused.
SEE_S = 10.0
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
    torch : str
        The version of torch that wrote it.
    """

    snapshot: Snapshot
    configuration: Mapping[str, Any]
    path: str
    skipped: tuple[tuple[str, str], ...] = ()
    torch: str = ""

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

    def check_epochs(self, epochs: int) -> None:
        """Check that a run of so many epochs has not come further already.

        Raises
        ------
        ConfigurationError
            If it has.
        """
        reached = self.snapshot.epoch + (self.snapshot.step > 0)
        if reached > epochs:
            message = (
                f"the run saved in {self.path} has come to epoch {reached} already, and epochs="
                f"{epochs} counts from its beginning; use a larger number, or another checkpoint "
                "folder"
            )
            raise ConfigurationError(message)


def open_checkpoints(
    checkpoint: Checkpoint | None, *, resume: bool, epochs: int
) -> SavedRun | None:
    """Check that checkpoints can be written, and read the newest one where a run is resumed.

    Parameters
    ----------
    checkpoint : Checkpoint or None
        Where to, and when.
    resume : bool
        Whether to go on with what is there.
    epochs : int
        How many the run shall have at its end.

    Raises
    ------
    CheckpointError
        If the place cannot be written, or has checkpoints of which none is valid.
    ConfigurationError
        If the place already has checkpoints and the run is a new one, or they are further than the
        run shall come.
    """
    if checkpoint is None:
        return None
    with prepare_storage(checkpoint) as (_, occupied):
        pass
    if resume:
        saved = newest_checkpoint(checkpoint)
        if saved is not None:
            saved.check_epochs(epochs)
        return saved
    if occupied:
        message = (
            f"{checkpoint.url} already has checkpoints; go on with resume=True "
            "(--resume), or choose another folder"
        )
        raise ConfigurationError(message)
    return None


def newest_checkpoint(checkpoint: Checkpoint) -> SavedRun | None:
    """Read the newest valid checkpoint; None if there is none at all.

    Raises
    ------
    CheckpointError
        If there are some, but none is valid.
    """
    found = load_newest(checkpoint)
    if found is None:
        return None
    snapshot, manifest, path, skipped = found
    return SavedRun(
        snapshot=snapshot,
        configuration=manifest.configuration,
        path=path,
        skipped=tuple(skipped),
        torch=manifest.packages.get("torch", "").split("+")[0],
    )


def check_shared(checkpoint: Checkpoint, client: Client, addresses: Sequence[str]) -> None:
    """Check that workers see the place of the checkpoints, which the client can write.

    Raises
    ------
    CheckpointError
        Names those that do not.
    """
    with prepare_storage(checkpoint) as (name, _):
        answers = ask_workers(
            client, sees_storage, addresses, checkpoint, name, timeout_s=SEE_S
        ).result(2 * SEE_S)
    blind = [address for address in addresses if answers.get(address) is False]
    if blind:
        message = (
            f"{checkpoint.url} of this process is another place on {', '.join(blind)}: checkpoints "
            "need a folder that all workers and the client share, or an object store"
        )
        raise CheckpointError(message)


def check_best(checkpoint: Checkpoint, spec: TrainingSpec, *, validated: bool) -> None:
    """Check that the entry by which the best checkpoint is chosen will be in the history.

    Raises
    ------
    ConfigurationError
        If it will not.
    """
    check_best_name(checkpoint, list(spec.metrics), validated=validated)


def check_best_name(checkpoint: Checkpoint, metrics: Sequence[str], *, validated: bool) -> None:
    """Check the same where only the names of the metrics are known yet.

    Raises
    ------
    ConfigurationError
        If it will not.
    """
    names = ["loss", *metrics]
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
        "optimizer": _describe_optimizer(state.optimizer),
        "lr_scheduler": _describe_scheduler(state.scheduler, spec.lr_scheduler_every),
        "loss": _name(spec.loss),
        "transform": _name(spec.transform),
        "clip_grad_norm": spec.clip_grad_norm,
    }


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    groups = [
        ", ".join(f"{name}={value}" for name, value in sorted(group.items()) if name != "params")
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def _describe_scheduler(scheduler: Any, every: str) -> str:
    return "none" if scheduler is None else f"{type(scheduler).__name__}, every {every}"


def _name(function: Any) -> str:
    """Name a function, or a module with its options; what a function does cannot be compared."""
    if isinstance(function, torch.nn.Module):
        values = {
            name: value
            for name, value in vars(function).items()
            if isinstance(value, str | int | float) and name != "training" and name[0] != "_"
        }
        if function.state_dict():
            values["weights"] = weights_sha256(function.state_dict())[:8]
        shown = ", ".join(f"{name}={value}" for name, value in sorted(values.items()))
        return f"{type(function).__name__}({shown})"
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__))
