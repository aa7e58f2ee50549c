"""One network, three ways to train it: the guide's loop, the best plain loop, and dask-nn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch

from dask_nn.api import evaluate, predict, train
from dask_nn.data.plan import Plan
from dask_nn.errors import ConfigurationError, TrainingInterrupted
from dask_nn.examples.mnist.layout import to_cluster
from dask_nn.examples.mnist.model import make_model, scale
from dask_nn.examples.mnist.sequential import best_loop, guide_loop
from dask_nn.training.strategies import Synchronous

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from distributed import Client

    from dask_nn.callbacks.base import Callback
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.examples.mnist.data import Dataset
    from dask_nn.examples.mnist.sequential import Digits, LoopResult
    from dask_nn.training.result import TrainingResult

__all__ = [
    "Comparison",
    "Job",
    "Parallel",
    "Sequential",
    "Unfinished",
    "check",
    "evaluate_parallel",
    "run_sequential",
    "score",
    "train_parallel",
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, and how; equal for all three ways.

    Parameters
    ----------
    epochs, batch_size : int
        As for any training.
    lr : float
        Learning rate of plain SGD.
    hidden_size : int
        Width of the network's hidden layer.
    shards : int or None
        Logical replicas of dask-nn; as it sees fit by default.
    engine : str
        ``"spmd"`` or ``"graph"``.
    device : str
        Where dask-nn computes: ``"cpu"`` or ``"cuda"``.
    seed : int
        Sets the first weights and the order of the samples.
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.01
    hidden_size: int = 128
    shards: int | None = None
    engine: Literal["spmd", "graph"] = "spmd"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """What the two loops without Dask reached.

    Parameters
    ----------
    guide, best : LoopResult
        Of either loop.
    model : torch.nn.Module
        The network that the best loop trained.
    """

    guide: LoopResult
    best: LoopResult
    model: torch.nn.Module


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What dask-nn reached.

    Parameters
    ----------
    result : TrainingResult
        The trained network and its history.
    accuracy : float
        Share of the test images that it reads right.
    labels : numpy.ndarray
        Its reading of the test images, int64, (n,).
    """

    result: TrainingResult
    accuracy: float
    labels: np.ndarray

    @property
    def epoch_s(self) -> tuple[float, ...]:
        """Seconds of every epoch."""
        return tuple(record["seconds"] for record in self.result.history)

    @property
    def loss(self) -> tuple[float, ...]:
        """Mean training loss of every epoch."""
        return tuple(record["loss"] for record in self.result.history)


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What an interrupted loop has trained so far."""

    model: torch.nn.Module


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The three ways side by side; `sequential` is None where only dask-nn ran."""

    dataset: Dataset
    sequential: Sequential | None
    parallel: Parallel

    @property
    def speedup(self) -> dict[str, float] | None:
        """How many times faster dask-nn is, by the medians of the seconds per epoch."""
        if self.sequential is None:
            return None
        own_s = median(self.parallel.epoch_s)
        return {
            "over_guide": median(self.sequential.guide.epoch_s) / own_s,
            "over_best": median(self.sequential.best.epoch_s) / own_s,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        digits, run, sequential = self.dataset.digits, self.parallel.result.run, None
        if self.sequential is not None:
            guide, best = self.sequential.guide, self.sequential.best
            sequential = {
                "guide": _plain(guide),
                "best": {**_plain(best), "threads": best.threads},
            }
        return {
            "dataset": self.dataset.name,
            "train_samples": len(digits.train_labels),
            "test_samples": len(digits.test_labels),
            "sequential": sequential,
            "parallel": {
                "engine": run.engine,
                "strategy": run.strategy,
                "num_workers": run.num_workers,
                "world_size": run.world_size,
                "shards": run.shards,
                "threads_per_rank": run.threads_per_rank,
                "collective": run.collective,
                "start_s": self.parallel.result.start_s,
                **_plain(self.parallel),
                "weights_sha256": self.parallel.result.weights_sha256,
            },
            "speedup": self.speedup,
        }


def check(job: Job, num_samples: int) -> None:
    """Refuse a job that cannot work, before anything is trained.

    Raises
    ------
    ConfigurationError
        Says what was got, what was expected and how to mend it.
    """
    if not isfinite(job.lr) or job.lr <= 0:
        message = f"lr must be a positive number, got {job.lr}"
        raise ConfigurationError(message)
    if job.batch_size > num_samples:
        message = (
            f"batch_size must be at most the number of samples, got batch_size={job.batch_size} "
            f"and {num_samples} samples; use a smaller batch"
        )
        raise ConfigurationError(message)
    if job.engine == "graph" and job.device != "cpu":
        message = "--engine graph computes on the CPU alone; use --engine spmd, or --device cpu"
        raise ConfigurationError(message)
    Plan(block_lengths=(num_samples,), shards=job.shards or 1, batch_size=job.batch_size)


def run_sequential(
    job: Job, digits: Digits, on_epoch_end: Callable[[str, int, float, float], None]
) -> Sequential:
    """Train with both loops, one after the other, in this process.

    Parameters
    ----------
    job : Job
        What to train.
    digits : Digits
        What to train and to test on.
    on_epoch_end : callable
        Called with the loop's name, epoch (from 0), mean loss and seconds.

    Raises
    ------
    TrainingInterrupted
        On Ctrl-C, with what the loop, or else the one before, has trained so far.
    """
    results: dict[str, LoopResult] = {}
    trained: torch.nn.Module | None = None
    for name, loop in (("guide", guide_loop), ("best", best_loop)):
        model = make_model(job.hidden_size, job.seed)
        try:
            results[name] = loop(
                model,
                digits,
                epochs=job.epochs,
                batch_size=job.batch_size,
                lr=job.lr,
                seed=job.seed,
                on_epoch_end=partial(on_epoch_end, name),
            )
        except KeyboardInterrupt as interrupt:
            if _differs(model, make_model(job.hidden_size, job.seed)):
                trained = model
            unfinished = None if trained is None else Unfinished(model=trained)
            raise TrainingInterrupted(unfinished) from interrupt
        trained = model
    return Sequential(guide=results["guide"], best=results["best"], model=model)


def _differs(model: torch.nn.Module, fresh: torch.nn.Module) -> bool:
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    return any(not torch.equal(own, other) for own, other in pairs)


def train_parallel(
    job: Job,
    digits: Digits,
    client: Client,
    callbacks: Sequence[Callback] = (),
    *,
    checkpoint: Checkpoint | str | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train with dask-nn on the cluster of a client.

    Parameters
    ----------
    job, digits, client, callbacks
        What to train, where, and who is told.
    checkpoint : Checkpoint or str, optional
        Folder or URL in which the run is saved after every epoch.
    resume : bool
        Go on from the newest checkpoint there.

    Raises
    ------
    TrainingInterrupted
        On Ctrl-C, with what is trained so far.
    """
    return train(
        make_model(job.hidden_size, job.seed),
        to_cluster(client, digits.train_images),
        to_cluster(client, digits.train_labels),
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=job.lr),
        epochs=job.epochs,
        batch_size=job.batch_size,
        metrics=["accuracy"],
        strategy=Synchronous(shards=job.shards),
        engine=job.engine,
        device=job.device,
        transform=scale,
        seed=job.seed,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        client=client,
    )


def evaluate_parallel(result: TrainingResult, digits: Digits, client: Client) -> Parallel:
    """Test a trained network on the cluster of a client."""
    images = to_cluster(client, digits.test_images)
    labels = to_cluster(client, digits.test_labels)
    scores = _scores(result.model, images, labels, client)
    read = predict(result.model, images, output="label", transform=scale)
    return Parallel(
        result=result, accuracy=scores["accuracy"], labels=client.compute(read).result()
    )


def score(model: torch.nn.Module, digits: Digits, client: Client | None) -> dict[str, float]:
    """Return loss and accuracy on the test images, without a client in this process."""
    if client is None:
        return _scores(model, digits.test_images, digits.test_labels, None)
    images = to_cluster(client, digits.test_images)
    return _scores(model, images, to_cluster(client, digits.test_labels), client)


def _scores(
    model: torch.nn.Module, images: Any, labels: Any, client: Client | None
) -> dict[str, float]:
    return evaluate(
        model,
        images,
        labels,
        metrics=["accuracy"],
        loss=torch.nn.CrossEntropyLoss(),
        transform=scale,
        client=client,
    )


def _plain(result: LoopResult | Parallel) -> dict[str, Any]:
    return {
        "epoch_s": list(result.epoch_s),
        "loss": list(result.loss),
        "accuracy": result.accuracy,
    }
