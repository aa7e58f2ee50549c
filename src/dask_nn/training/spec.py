"""All that a rank needs to know of a run, as one value that is pickled once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dask_nn.data.plan import Plan, Shuffle
from dask_nn.grouping import Grouping

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch
    from torch import nn
    from torchmetrics import Metric

    from dask_nn.data.blocks import Field
    from dask_nn.metrics.heads import Head

__all__ = ["TrainingSpec"]


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """A run: what is trained, on what order of samples, and how.

    Everything here is the same for all ranks and does not depend on their number.
    """

    model: nn.Module
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr_scheduler: Callable[..., Any] | None = None
    lr_scheduler_every: str = "epoch"
    clip_grad_norm: float | None = None
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)
    weighted: bool = False
    ignored_labels: bool = False

    fields: tuple[Field, ...]
    block_lengths: tuple[int, ...]
    validation_lengths: tuple[int, ...] = ()
    epochs: int
    batch_size: int
    shards: int
    window: int
    shuffle: Shuffle = "blocks"
    seed: int = 0
    threads_per_rank: int
    bitwise: bool = True
    device: str = "cpu"
    streamed: bool = False
    progress_interval_s: float = 0.2
    sample: tuple[np.ndarray[Any, Any], ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Stored size of the training data."""
        return sum(self.block_lengths) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Stored size of one row of all fields."""
        return sum(field.row_bytes for field in self.fields)

    def plan(self, epoch: int) -> Plan:
        """Give the order of samples of one epoch."""
        return _plan(self, epoch)

    @property
    def grouping(self) -> Grouping:
        """Which fields are inputs, targets and weights."""
        return Grouping.of([field.name for field in self.fields])

    @property
    def plan_of(self) -> Callable[[int], Plan]:
        """The plan as a function of the epoch."""
        return partial(_plan, self)


def _plan(spec: TrainingSpec, epoch: int) -> Plan:
    return Plan(
        block_lengths=spec.block_lengths,
        shards=spec.shards,
        batch_size=spec.batch_size,
        window=spec.window,
        seed=spec.seed,
        epoch=epoch,
        shuffle=spec.shuffle,
    )
