"""The model with everything that changes while it trains."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from dask_nn.training.spec import TrainingSpec

__all__ = ["TrainingState"]


class TrainingState:
    """Model, optimizer, learning-rate scheduler, and how far they are.

    Parameters
    ----------
    spec : TrainingSpec
        Of the run; its model is copied.
    device : torch.device
        Where the model goes.

    Attributes
    ----------
    epoch, step : int
        The step of that epoch which comes next.
    steps : int
        Steps completed over the whole run.
    bitwise : bool
        Whether all ranks so far computed the same bits.
    canary : dict of str to str
        What the run's first gang computed; see :class:`~dask_nn.training.canary.Canary`.

    Raises
    ------
    ConfigurationError
        If the optimizer or scheduler cannot be made or used.
    """

    def __init__(self, spec: TrainingSpec, device: torch.device) -> None:
        self.model: nn.Module = copy.deepcopy(spec.model).to(device).train()
        self.optimizer = _make_optimizer(spec, self.model)
        self.scheduler = (
            None if spec.lr_scheduler is None else _make_scheduler(spec, self.optimizer)
        )
        self.scheduler_every = spec.lr_scheduler_every
        self.epoch = 0
        self.step = 0
        self.steps = 0
        self.bitwise = True
        self.canary: dict[str, str] = {}

    @property
    def step_scheduler(self) -> Any:
        """The scheduler if it is stepped after every update, else None."""
        return self.scheduler if self.scheduler_every == "step" else None

    def end_epoch(self, monitored: float) -> None:
        """Go to the next epoch; a scheduler that watches a value gets ``monitored``."""
        self.epoch += 1
        self.step = 0
        if self.scheduler is None or self.scheduler_every != "epoch":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(monitored)
        else:
            self.scheduler.step()

    def weights(self) -> dict[str, torch.Tensor]:
        """Copy the model's state dict to the CPU."""
        return {
            name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()
        }

    def transient_buffers(self) -> dict[str, torch.Tensor]:
        """Copy to the CPU the buffers that the model's state dict leaves out."""
        kept = self.model.state_dict().keys()
        return {
            name: buffer.detach().cpu().clone()
            for name, buffer in self.model.named_buffers()
            if name not in kept
        }

    def optimizer_weights(self) -> dict[str, Any]:
        """Copy the optimizer's state dict."""
        return copy.deepcopy(self.optimizer.state_dict())

    def is_finite(self) -> bool:
        """Tell whether every weight is a finite number."""
        return all(
            bool(torch.isfinite(value).all())
            for value in self.model.state_dict().values()
            if value.is_floating_point()
        )


def _make_optimizer(spec: TrainingSpec, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        message = (
            f"{type(model).__name__} has no trainable parameters; expected at least one with "
            "requires_grad=True"
        )
        raise ConfigurationError(message)
    try:
        optimizer = spec.optimizer(parameters)
    except (TypeError, ValueError) as error:
        message = (
            f"the optimizer could not be made from the parameters: {error}; pass for example "
            "optimizer=functools.partial(torch.optim.SGD, lr=0.01)"
        )
        raise ConfigurationError(message) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        message = (
            f"optimizer must be a callable that returns a torch.optim.Optimizer, got one that "
            f"returns {type(optimizer).__name__}"
        )
        raise ConfigurationError(message)
    if isinstance(optimizer, torch.optim.LBFGS):
        message = (
            "torch.optim.LBFGS evaluates the loss several times per step and cannot be used here; "
            "use an optimizer whose step() needs no closure"
        )
        raise ConfigurationError(message)
    return optimizer


def _make_scheduler(spec: TrainingSpec, optimizer: torch.optim.Optimizer) -> Any:
    if spec.lr_scheduler is None:
        return None
    try:
        scheduler = spec.lr_scheduler(optimizer)
    except (TypeError, ValueError) as error:
        message = (
            f"the learning-rate scheduler could not be made from the optimizer: {error}; pass for "
            "example lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)"
        )
        raise ConfigurationError(message) from error
    if not callable(getattr(scheduler, "step", None)):
        message = (
            f"lr_scheduler must be a callable that returns a learning-rate scheduler, got one that "
            f"returns {type(scheduler).__name__}"
        )
        raise ConfigurationError(message)
    if spec.lr_scheduler_every == "step" and isinstance(scheduler, ReduceLROnPlateau):
        message = "ReduceLROnPlateau watches a value of the epoch: use lr_scheduler_every='epoch'"
        raise ConfigurationError(message)
    return scheduler
