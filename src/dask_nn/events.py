"""What a run tells about itself while it goes on: plain values that pickle and need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "Progress", "RunInfo"]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """How a run is laid out.

    Parameters
    ----------
    engine : str
        ``"spmd"`` or ``"graph"``.
    strategy : str
        Name of the strategy, for example ``"synchronous"``.
    num_workers : int
        Dask workers on the cluster when the run began; 0 without a cluster.
    world_size : int
        Ranks; for the graph engine, the workers that compute shard gradients.
    shards : int
        Logical data-parallel replicas, fixed for the run.
    threads_per_rank : int
        Intra-op threads of each rank.
    collective : str
        Name of the communicator, or ``"tasks"`` for the graph engine.
    num_samples : int
        Rows of the training data.
    num_steps : int
        Steps of one epoch.
    epochs : int
        Epochs asked for.
    batch_size : int
        Rows of a global batch.
    num_blocks : int
        Blocks of the training data.
    size_bytes : int
        Stored size of the training data.
    window : int
        Blocks that a shard shuffles together.
    streamed : bool
        Whether blocks are computed when they are needed, instead of held in memory.
    """

    engine: str
    strategy: str
    num_workers: int
    world_size: int
    shards: int
    threads_per_rank: int
    collective: str
    num_samples: int
    num_steps: int
    epochs: int
    batch_size: int
    num_blocks: int = 0
    size_bytes: int = 0
    window: int = 0
    streamed: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands inside an epoch.

    Parameters
    ----------
    epoch : int
        From 0.
    step : int
        Steps done in this epoch.
    num_steps : int
        Steps of one epoch.
    loss : float
        Mean loss of this epoch so far.
    metrics : dict of str to float
        Metrics over this epoch so far (of the shards of rank 0).
    samples_per_s : float
        Samples of all ranks per second in this epoch so far.
    blocks : int
        Blocks, or parts of them, that all ranks have read for this epoch, where data is streamed.
    bytes : int
        Their stored size.
    """

    epoch: int
    step: int
    num_steps: int
    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    samples_per_s: float
    blocks: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened to a run.

    Parameters
    ----------
    name : str
        What happened, for example ``"gang-formed"`` or ``"epoch"``.
    time_s : float
        Seconds since the Unix epoch on the machine where it happened.
    details : dict
        Plain values that belong to it.
    """

    name: str
    time_s: float
    details: dict[str, Any] = field(default_factory=dict)
