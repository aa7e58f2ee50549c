"""The training state as a value: what one update task of the graph engine hands to the next."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dask_nn.training.state import TrainingState

__all__ = ["Snapshot"]


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
    last_loss : float
        Mean loss of the last step.
    non_finite : bool
        Whether that loss was NaN or infinite; such a snapshot passes through all later steps.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    normalizer: float = 0.0
    last_loss: float = 0.0
    non_finite: bool = False

    @classmethod
    def take(cls, state: TrainingState, **sums: float) -> Snapshot:
        """Copy a state."""
        scheduler = {} if state.scheduler is None else copy.deepcopy(state.scheduler.state_dict())
        return cls(
            weights=state.weights(),
            optimizer=state.optimizer_weights(),
            scheduler=scheduler,
            epoch=state.epoch,
            step=state.step,
            steps=state.steps,
            **sums,  # type: ignore[arg-type]
        )

    def load(self, state: TrainingState, *, weights_only: bool = False) -> None:
        """Put a state where this snapshot was taken; only its model with ``weights_only``."""
        state.model.load_state_dict(self.weights)
        state.epoch, state.step, state.steps = self.epoch, self.step, self.steps
        if weights_only:
            return
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        # Schedulers complain of stepping before the optimizer; another copy may have stepped.
        state.optimizer._opt_called = bool(self.steps)  # type: ignore[attr-defined]  # noqa: SLF001
        if state.scheduler is not None:
            state.scheduler.load_state_dict(copy.deepcopy(self.scheduler))
