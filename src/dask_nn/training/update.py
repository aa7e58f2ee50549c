"""What happens to the weights once the leaves of all shards are added up."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dask_nn.training.layout import (
    FIRST_MARK,
    LOSS,
    NORMALIZER,
    SAVE,
    STOP,
    WAIT,
    LeafLayout,
    LeafViews,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from dask_nn.data.randomness import SeededRandomness

__all__ = ["StepTotal", "Update"]


class StepTotal(NamedTuple):
    """The scalars of a whole step: loss sum, normaliser, votes to stop, to save and to wait."""

    loss: float
    normalizer: float
    stop: bool
    save: bool
    wait: bool

    @property
    def mean_loss(self) -> float:
        """Mean loss of the global batch; 0 if all its weights are 0."""
        return self.loss / self.normalizer if self.normalizer else 0.0


class Update:
    """Applies a total to the model: mean, clipping, optimizer, schedule, buffers.

    Every rank applies the same total to the same state, so their states stay equal.

    Parameters
    ----------
    layout : LeafLayout
        Of the model.
    views : LeafViews
        Of the buffer in which totals arrive; the parameters' ``grad`` are these views.
    base_buffers : list of Tensor
        Where the averaged buffers go, besides the model's own.
    optimizer : torch.optim.Optimizer
        Of the model's parameters.
    scheduler : object, optional
        A learning-rate scheduler that is stepped after every update.
    divides : bool
        Whether gradients are sums, to be divided by the total normaliser.
    clip_grad_norm : float, optional
        Largest global norm of the mean gradient.
    randomness : SeededRandomness
        Seeds the generator for an optimizer that draws random numbers, the same on every rank.
    """

    def __init__(
        self,
        layout: LeafLayout,
        views: LeafViews,
        *,
        base_buffers: list[torch.Tensor],
        optimizer: Optimizer,
        scheduler: Any = None,
        divides: bool,
        clip_grad_norm: float | None,
        randomness: SeededRandomness,
    ) -> None:
        self._layout = layout
        self._views = views
        self._base = base_buffers
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._divides = divides
        self._clip = clip_grad_norm
        self._step = plain_step(optimizer)
        self._randomness = randomness
        # Only with this known do ranks that are threads of one process update side by side.
        self._may_draw = not draws_nothing(optimizer, scheduler)
        self._gradients = views.flat[: layout.num_gradient_elements]
        # Leaves have one type; gradients must have that of their parameter.
        self._converts = any(p.dtype != layout.dtype for p in layout.parameters)
        self._all_used = False
        tail = views.tail if views.scalars is None else views.scalars
        self._read: Callable[[], list[float]] = tail.tolist

    def read(self) -> StepTotal:
        """Read the scalars of the total, and which parameters it reaches."""
        tail = self._read()
        self._marks = tail[FIRST_MARK:]
        stop, save, wait = tail[STOP] > 0, tail[SAVE] > 0, tail[WAIT] > 0
        return StepTotal(tail[LOSS], tail[NORMALIZER], stop, save, wait)

    def apply(self, total: StepTotal, step_count: int, step: int) -> None:
        """Update the model.

        Parameters
        ----------
        total : StepTotal
            What :meth:`read` returned; its loss is finite.
        step_count : int
            Rows of the global batch.
        step : int
            Step of the run.
        """
        if self._divides:
            if not total.normalizer:
                return  # every sample weighs nothing: there is no mean to follow
            self._gradients.div_(total.normalizer)
        if self._converts or not (self._all_used and 0.0 not in self._marks):
            self._attach_gradients()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._layout.parameters, self._clip)
        if self._may_draw:
            self._randomness.run_once(self._follow, "update", step)
        else:
            self._follow()
        if self._base:
            self._average_buffers(step_count)

    def _follow(self) -> None:
        self._step()
        if self._scheduler is not None:
            self._scheduler.step()

    def _attach_gradients(self) -> None:
        """Leave parameters that no shard used without a gradient, as a plain loop would."""
        for parameter, view, mark in zip(
            self._layout.parameters, self._views.gradients, self._marks, strict=True
        ):
            parameter.grad = view.to(parameter.dtype) if mark else None
        self._all_used = all(self._marks)

    def _average_buffers(self, step_count: int) -> None:
        for buffer, base, change in zip(
            self._layout.buffers, self._base, self._views.buffers, strict=True
        ):
            mean = change.div_(step_count)
            base.add_(mean if base.is_floating_point() else mean.round_().to(base.dtype))
            buffer.copy_(base)


def is_finite(total: StepTotal) -> bool:
    """Tell whether a step may be applied."""
    return math.isfinite(total.loss) and math.isfinite(total.normalizer)


def plain_step(optimizer: Optimizer) -> Callable[[], Any]:
    """Give the optimizer's step without the profiler's record of it, a third of a small step.

    An optimizer whose step somebody hooked or replaced, as schedulers do, keeps the whole of it.
    """
    whole = type(optimizer).step
    inner = getattr(whole, "__wrapped__", None)
    replaced = "step" in vars(optimizer) or not getattr(whole, "hooked", False)
    if inner is None or replaced or _is_hooked(optimizer):
        return optimizer.step
    bare: Callable[[], Any] = partial(inner, optimizer)
    return bare


def draws_nothing(optimizer: Optimizer, scheduler: Any) -> bool:
    """Tell whether an update surely draws no random numbers: all of it is PyTorch's own.

    Hooks may do anything, and so may the functions that some schedulers are given.
    """
    step = vars(optimizer).get("step")
    # A scheduler replaces the step with one that counts, and that wraps the step it finds.
    replaced = step is not None and not (
        hasattr(step, "_wrapped_by_lr_sched")
        and getattr(step, "__wrapped__", None) is type(optimizer).step
    )
    return (
        not replaced
        and not _is_hooked(optimizer)
        and _is_of_torch(optimizer)
        and (scheduler is None or _is_pure(scheduler))
    )


def _is_hooked(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks  # noqa: SLF001
        or optimizer._optimizer_step_post_hooks  # noqa: SLF001
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_of_torch(part: object) -> bool:
    return type(part).__module__.startswith("torch.optim.")


def _is_pure(scheduler: Any) -> bool:
    """Tell whether a scheduler, and each in it, is PyTorch's own and calls no user's function."""
    calls = hasattr(scheduler, "lr_lambdas") or getattr(scheduler, "_scale_fn_custom", None)
    parts = getattr(scheduler, "_schedulers", ())
    return _is_of_torch(scheduler) and not calls and all(map(_is_pure, parts))
