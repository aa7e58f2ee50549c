"""One shard's part of a step: forward, backward, and the leaf that holds their result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dask_nn import faults
from dask_nn.errors import ModelError
from dask_nn.grouping import call_model
from dask_nn.training.layout import FIRST_MARK, LeafLayout, LeafViews

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.data.batches import Batch
    from dask_nn.data.randomness import SeededRandomness
    from dask_nn.grouping import Grouping
    from dask_nn.metrics.objective import Objective

__all__ = ["ShardOutput", "ShardStep"]

_run_backward = torch.autograd.Variable._execution_engine.run_backward  # noqa: SLF001


class ShardOutput(NamedTuple):
    """What metrics need of a shard's step, free of the graph: shapes (count, ...)."""

    output: Any
    target: Any


class _Computed(NamedTuple):
    """A shard's outputs, and what its leaf is made of."""

    output: Any
    target: Any
    gradients: tuple[torch.Tensor | None, ...]
    total: float
    normalizer: float


def detached(output: Any) -> Any:
    """Free a module's output of the graph: a tensor, or the members of a tuple or dictionary."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, dict):
        return {key: detached(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(detached(value) for value in output)
    return output


class ShardStep:
    """Computes leaves of one model.

    For a loss that is a mean over rows, the leaf's gradient is already that of the mean over the
    global batch, because the number of its rows is known from the plan; with one shard it is
    exactly the gradient of a plain loop. For a loss whose divisor depends on the data, it is the
    gradient of the sum, and the update divides by the total normaliser.

    Parameters
    ----------
    model : torch.nn.Module
        In training mode; its buffers are put back to the step's start before each shard.
    objective : Objective
        The loss.
    layout : LeafLayout
        Of this model.
    randomness : SeededRandomness
        Seeds the generator for each (step, shard).
    transform : callable, optional
        Applied to the batch of X.
    grouping : Grouping
        Which tensors of a batch are inputs, targets and weights.
    device : torch.device
        Where the model is.
    place : callable
        Says where the run is, for whoever breaks it in a test.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective,
        layout: LeafLayout,
        randomness: SeededRandomness,
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
        grouping: Grouping,
        device: torch.device,
        place: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self._place = place
        self._model = model
        self._objective = objective
        self._layout = layout
        self._randomness = randomness
        self._transform = transform
        self._grouping = grouping
        self._device = device
        self._parameters = tuple(layout.parameters)
        self._scales: dict[float, torch.Tensor] = {}
        # The buffers as they are at the start of a step, from which every shard begins.
        self._base = [buffer.detach().clone() for buffer in layout.buffers]

    @property
    def base_buffers(self) -> list[torch.Tensor]:
        """The averaged buffers at the start of the step; the update writes them."""
        return self._base

    def restore_buffers(self) -> None:
        """Put the model's buffers back to the start of the step, after one that was cut short."""
        with torch.no_grad():
            for buffer, base in zip(self._layout.buffers, self._base, strict=True):
                buffer.copy_(base)

    def compute(
        self,
        views: LeafViews,
        batch: Batch,
        *,
        step: int,
        shard: int,
        count: int,
        step_count: int,
    ) -> ShardOutput | None:
        """Write the leaf of one shard.

        Parameters
        ----------
        views : LeafViews
            The leaf.
        batch : tuple of Tensor
            One tensor for each field, of ``count`` rows each.
        step : int
            Step of the run.
        shard : int
            The shard.
        count : int
            Its rows; a shard without rows has a leaf of zeros.
        step_count : int
            Rows of the global batch.

        Returns
        -------
        ShardOutput or None
            Outputs and targets; None for a shard without rows.
        """
        if not count:
            views.flat.zero_()
            return None
        if self._device.type != "cpu":
            batch = tuple(tensor.to(self._device, non_blocking=True) for tensor in batch)
        computed = self._randomness.run(
            lambda again: self._differentiate(
                batch, count=count, step_count=step_count, again=again
            ),
            step,
            shard,
        )
        self._write(views, computed, count)
        return ShardOutput(detached(computed.output), computed.target)

    def _differentiate(
        self, batch: Batch, *, count: int, step_count: int, again: bool
    ) -> _Computed:
        """Transform, forward and backward; loss and backward may draw random numbers, too."""
        if again:  # what works in place must not meet its own result in a second call
            batch = tuple(map(torch.clone, batch))
        target = self._grouping.targets(batch)
        for buffer, base in zip(self._layout.buffers, self._base, strict=True):
            buffer.copy_(base)
        x = self._grouping.inputs(batch)
        if self._transform is not None:
            x = self._transform(x)
        output = call_model(self._model, x)
        scale: float
        if self._objective.kind == "mean_rows":
            loss = self._objective.value(output, target)
            scale = count / step_count
            value = loss.item()
            total, normalizer = value * count, float(count)
        elif self._objective.kind == "sum":
            loss = self._objective.value(output, target)
            scale = 1.0
            total, normalizer = loss.item(), float(count)
        else:
            weight = self._grouping.weights(batch)
            loss, divisor = self._objective.sum_and_normalizer(output, target, weight)
            scale = 1.0
            total, normalizer = loss.item(), divisor.item()
        if not loss.requires_grad:
            message = (
                "the loss does not depend on any trained parameter; check that the module uses "
                "its parameters and does not detach its output"
            )
            raise ModelError(message)
        return _Computed(output, target, self._backward(loss, scale), total, normalizer)

    def _backward(self, loss: torch.Tensor, scale: float) -> tuple[torch.Tensor | None, ...]:
        if faults.hook is not None:
            faults.hook("backward", self._place())
        # What torch.autograd.grad calls, without its 9 us of checks: (outputs, their gradients,
        # keep graph, create graph, inputs, allow unused ones).
        gradients: tuple[torch.Tensor | None, ...] = _run_backward(
            (loss,),
            (self._scale(scale, loss),),
            False,
            False,
            self._parameters,
            True,
            accumulate_grad=False,
        )
        return gradients

    def _write(
        self,
        views: LeafViews,
        computed: _Computed,
        count: int,
    ) -> None:
        gradients = computed.gradients
        used = [gradient is not None for gradient in gradients]
        if all(used) and not any(gradient.is_sparse for gradient in gradients):  # type: ignore[union-attr]
            torch._foreach_copy_(views.gradients, list(gradients))  # type: ignore[arg-type]
        else:
            for view, gradient in zip(views.gradients, gradients, strict=True):
                if gradient is None:
                    view.zero_()
                else:
                    view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        head = (computed.total, computed.normalizer, 0.0, 0.0, 0.0)  # nobody votes yet
        if views.scalars is not None:
            views.scalars[:FIRST_MARK] = head
            views.scalars[FIRST_MARK:] = used
        else:
            scalars = [*head, *map(float, used)]
            views.tail.copy_(torch.tensor(scalars, dtype=views.tail.dtype))
        if self._base:
            self._write_buffer_changes(views, count)

    def _write_buffer_changes(self, views: LeafViews, count: int) -> None:
        with torch.no_grad():
            for view, buffer, base in zip(
                views.buffers, self._layout.buffers, self._base, strict=True
            ):
                view.copy_(buffer - base)
                view.mul_(count)

    def _scale(self, scale: float, loss: torch.Tensor) -> torch.Tensor:
        found = self._scales.get(scale)
        if found is None or found.dtype != loss.dtype:
            found = torch.tensor(scale, dtype=loss.dtype, device=loss.device)
            self._scales[scale] = found
        return found
