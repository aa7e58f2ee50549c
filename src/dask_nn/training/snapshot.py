"""The training state as a value: what one task, or one gang, hands to the next."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dask_nn.metrics.merge import Partial

if TYPE_CHECKING:
    import torch

    from dask_nn.metrics.streams import BufferedMetrics
    from dask_nn.training.state import TrainingState

__all__ = ["Keepsake", "Snapshot"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights, optimizer and scheduler after some step, never changed once made.

    Parameters
    ----------
    weights, optimizer, scheduler : dict
        State dicts; the scheduler's is empty if there is none.
    epoch, step, steps : int
        See :class:`~dask_nn.training.state.TrainingState`.
    loss_sum, normalizer : float
        Of the steps of this epoch so far.
    samples : int
        Rows of those steps.
    seconds : float
        Time that this epoch has taken so far.
    last_loss : float
        Mean loss of the last step.
    non_finite : bool
        Whether that loss was NaN or infinite; such a snapshot passes through all later steps.
    history : tuple of dict
        Records of the finished epochs.
    buffers : dict
        Buffers of the model that its state dict leaves out.
    bitwise, canary
        See :class:`~dask_nn.training.state.TrainingState`.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    normalizer: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    last_loss: float = 0.0
    non_finite: bool = False
    history: tuple[dict[str, float], ...] = ()
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    bitwise: bool = True
    canary: dict[str, str] = field(default_factory=dict)

    @property
    def position(self) -> tuple[int, int]:
        """How far this state is: the epoch under way, and the steps completed over the run."""
        return (self.epoch, self.steps)

    @classmethod
    def take(cls, state: TrainingState, **sums: Any) -> Snapshot:
        """Copy a state."""
        scheduler = {} if state.scheduler is None else copy.deepcopy(state.scheduler.state_dict())
        return cls(
            weights=state.weights(),
            buffers=state.transient_buffers(),
            optimizer=state.optimizer_weights(),
            scheduler=scheduler,
            epoch=state.epoch,
            step=state.step,
            steps=state.steps,
            bitwise=state.bitwise,
            canary=state.canary,
            **sums,
        )

    def load(self, state: TrainingState, *, weights_only: bool = False) -> None:
        """Put a state where this snapshot was taken; only its model with ``weights_only``."""
        state.model.load_state_dict(self.weights)
        for name, buffer in state.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])
        state.epoch, state.step, state.steps = self.epoch, self.step, self.steps
        state.bitwise, state.canary = self.bitwise, self.canary
        if weights_only:
            return
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        # Schedulers complain of stepping before the optimizer; another copy may have stepped.
        state.optimizer._opt_called = bool(self.steps)  # type: ignore[attr-defined]  # noqa: SLF001
        if state.scheduler is not None:
            state.scheduler.load_state_dict(copy.deepcopy(self.scheduler))


@dataclass(kw_only=True)
class Keepsake:
    """What a rank that ended leaves in its process for the next gang of the run.

    Parameters
    ----------
    snapshot : Snapshot
        After the last step that this rank completed.
    metrics : list of BufferedMetrics
        Of its shards, over this epoch up to that step.
    pending : list
        For each output of the step under way: the metrics that it belongs to, and output and
        target. It counts only if that step was completed by others.
    carried : list of dict
        Partial metrics of this epoch from gangs before that of this rank.
    """

    snapshot: Snapshot
    metrics: list[BufferedMetrics] = field(default_factory=list)
    pending: list[tuple[BufferedMetrics, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    carried: list[dict[str, Partial]] = field(default_factory=list)

    def partials(self, start: Snapshot) -> list[dict[str, Partial]]:
        """Give the partial metrics that go on with a gang that starts from ``start``."""
        if start.epoch != self.snapshot.epoch:
            return []
        if start.steps == self.snapshot.steps + 1:
            for metrics, output, target in self.pending:
                metrics.update(output, target)
        self.pending = []
        own = [dict[str, Partial](metrics.partial()) for metrics in self.metrics]
        return [*self.carried, *own]
