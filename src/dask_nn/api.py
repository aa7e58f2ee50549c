"""The functions that users call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dask_nn.checkpoints.options import Checkpoint
from dask_nn.config import settings
from dask_nn.controller.calling import cluster_of, ending_cleanly
from dask_nn.controller.failure_policy import Recovery
from dask_nn.controller.options import Engine, Options
from dask_nn.controller.preparation import prepare
from dask_nn.controller.resume import open_checkpoints
from dask_nn.controller.run import execute
from dask_nn.evaluation import evaluate
from dask_nn.inference import predict
from dask_nn.training.strategies import Synchronous

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from distributed import Client
    from torch import nn

    from dask_nn.callbacks.base import Callback
    from dask_nn.data.memory import Memory
    from dask_nn.metrics.names import Metrics
    from dask_nn.training.result import TrainingResult

__all__ = ["evaluate", "predict", "train"]


def train(
    model: nn.Module | Callable[[], nn.Module],
    X: Any,
    y: Any = None,
    *,
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    epochs: int = 1,
    batch_size: int = 32,
    validation: Sequence[Any] | None = None,
    metrics: Metrics | Mapping[str, Metrics] = (),
    sample_weight: Any = None,
    features: Sequence[str] | None = None,
    batch_dim: str | None = None,
    memory: Memory = "auto",
    strategy: Synchronous | None = None,
    engine: Engine = "spmd",
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    lr_scheduler: Callable[..., Any] | None = None,
    lr_scheduler_every: str = "epoch",
    clip_grad_norm: float | None = None,
    seed: int = 0,
    shuffle: bool | str = True,
    window: int | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    resume: bool = False,
    recovery: Recovery | None = None,
    callbacks: Sequence[Callback] = (),
    device: str = "cpu",
    client: Client | None = None,
) -> TrainingResult:
    """Train a network on the data of a Dask cluster, where it lies.

    Every sample is used once per epoch. With the number of shards fixed, the trained weights are
    bitwise the same for any number of workers, and without a cluster.

    Parameters
    ----------
    model : torch.nn.Module, or a class or function that makes one
        It is copied, not changed.
    X : collection, shape (num_samples, ...)
        Features: a Dask, NumPy or xarray array, a tensor, a table of Dask or pandas, a list of
        Delayed, a Dask Bag, a map-style torch dataset, or a dictionary of them, whose members
        become keyword arguments of the module. Floats are cast to the model's type; integers
        stay as they are until ``transform``. Categories become their codes.
    y : collection, str or list of str, optional
        Targets, shape (num_samples, ...): the same kinds, or names of columns of X. Integers
        reach the loss as int64, floats in the model's type. May be left out where X brings it:
        lists of delayed pairs, Bags of pairs, datasets of pairs.
    loss : callable
        ``loss(output, target)`` that returns a scalar, such as ``torch.nn.CrossEntropyLoss()``.
        The gradient is that of its mean over the whole batch, however unevenly the batch is
        divided among shards.
    optimizer : callable
        Makes a torch optimizer from parameters, such as ``functools.partial(SGD, lr=0.01)``.
    epochs : int
        Passes over the data.
    batch_size : int
        Samples of one optimizer step, of all shards together; divisible by the shards.
    validation : tuple, optional
        ``(X, y)``, with ``sample_weight`` if training has it, or a collection like X that
        brings its targets; evaluated after every epoch.
    metrics : sequence of str or torchmetrics.Metric, or mapping from name to Metric
        Computed on the training batches as they are trained on, and on ``validation``. Of a module
        with several outputs: a mapping from the name of an output to its metrics, which are called
        ``"<output>_<metric>"``.
    sample_weight : collection or str, shape (num_samples,), optional
        Weights of the mean over a batch.
    features : list of str, optional
        Columns of X that are features; by default all that are not y or weights.
    batch_dim : str, optional
        The dimension of xarray objects along which samples lie; the first by default.
    memory : {"auto", "resident", "stream"}
        "resident" holds the data in the cluster's memory; "stream" computes every block on the
        worker that needs it when it needs it, and releases it after use, in every epoch anew;
        "auto" streams what does not fit half of the memory. The bits are the same.
    strategy : Synchronous, optional
        Shards and threads; ``Synchronous()`` if not given.
    engine : {"spmd", "graph"}
        ``"spmd"`` runs a gang of rank tasks. ``"graph"`` makes every shard gradient, addition and
        update a Dask task of its own: slower, but visible and retried by the scheduler.
    transform : callable, optional
        Applied to the batch of X on the worker, before the model.
    lr_scheduler : callable, optional
        Makes a learning-rate scheduler from the optimizer.
    lr_scheduler_every : {"epoch", "step"}
        When the scheduler is stepped.
    clip_grad_norm : float, optional
        Largest global norm of the gradient.
    seed : int
        Decides the order of samples and the random numbers of every (step, shard).
    shuffle : bool or "within"
        True orders blocks and rows anew in every epoch; "within" keeps every block with its
        shard; False keeps the order of the data.
    window : int, optional
        Blocks among which a shard shuffles; from the settings if not given.
    checkpoint : Checkpoint, str or path, optional
        Where the run is saved, as a URL that all workers and this process can reach; a plain path
        or URL saves after every epoch.
    resume : bool
        Go on from the newest valid checkpoint there, at exactly the next step, on any number of
        workers; start from the beginning if there is none.
    recovery : Recovery, optional
        How to go on when workers are lost, hang or join; ``Recovery()`` if not given.
    callbacks : sequence of Callback
        Told how it goes.
    device : {"cpu", "cuda"}
        Where ranks compute. CUDA has not been tried on a real device yet.
    client : distributed.Client, optional
        The cluster; the current client if not given, the task's own cluster inside a Dask task,
        and this process if there is none. Trainings that want the same workers take turns.

    Returns
    -------
    TrainingResult
        The trained model and the story of its training.

    Raises
    ------
    ConfigurationError, DataError, ModelError, ClusterError
        Before any work starts, if something could not work.
    RankFailed
        If a rank raised an exception; carries rank, step, worker and traceback.
    NonFiniteLoss
        If the loss became NaN or infinite; carries the last good state.
    WorkerLost
        If workers were lost and `recovery` says not to go on without them.
    CheckpointError
        If checkpoints cannot be written where they shall go, or none there can be read.
    TrainingInterrupted
        A KeyboardInterrupt: after Ctrl-C or SIGTERM; carries what is trained so far.
    """
    called_s = time.monotonic()
    options = Options(
        model=model,
        loss=loss,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        metrics=metrics,
        strategy=strategy or Synchronous(),
        engine=engine,
        memory=memory,
        features=features,
        batch_dim=batch_dim,
        transform=transform,
        lr_scheduler=lr_scheduler,
        lr_scheduler_every=lr_scheduler_every,
        clip_grad_norm=clip_grad_norm,
        seed=seed,
        shuffle=shuffle,
        window=window,
        callbacks=callbacks,
        device=device,
        checkpoint=Checkpoint.of(checkpoint),
        resume=resume,
        recovery=recovery or Recovery(),
    )
    in_force = settings()
    with cluster_of(client) as found, ending_cleanly():
        saved = open_checkpoints(options.checkpoint, resume=resume, epochs=options.epochs)
        prepared = prepare(
            options if saved is None else options.with_layout_of(saved.configuration),
            X,
            y,
            sample_weight=sample_weight,
            validation=validation,
            client=found,
            settings=in_force,
        )
        return execute(
            prepared,
            engine=engine,
            callbacks=callbacks,
            client=found,
            settings=in_force,
            called_s=called_s,
            recovery=options.recovery,
            checkpoint=options.checkpoint,
            saved=saved,
            resume=resume,
        )
