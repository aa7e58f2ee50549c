"""The states of a torchmetrics object, taken out, combined and put back.

They are combined by the reductions that the metric declares for distributed training, as
``Metric.merge_state`` does. That method itself is not called, unless overridden: it refuses
metrics that leave ``full_state_update`` unset, stacks states in the shape of the tree, and weighs
means by the wrong count.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import (
    dim_zero_cat,
    dim_zero_max,
    dim_zero_mean,
    dim_zero_min,
    dim_zero_sum,
)
from torchmetrics.wrappers import ClasswiseWrapper
from torchmetrics.wrappers.abstract import WrapperMetric

from dask_nn.errors import ConfigurationError

__all__ = ["State", "States", "check_mergeable", "combine", "loaded", "states_of"]

_Reduction = Literal["sum", "max", "min", "extend", "gather", "own"]
_REDUCTIONS: Final[dict[Any, _Reduction]] = {
    dim_zero_sum: "sum",
    dim_zero_max: "max",
    dim_zero_min: "min",
}


@dataclass(frozen=True, kw_only=True)
class State:
    """One state of a metric: a tensor, the tensors of the parts in order, or a whole metric."""

    reduction: _Reduction
    value: Any


type States = Mapping[str, State]


def check_mergeable(name: str, metric: Metric) -> None:
    """Check that parts of a metric merge to its value over all samples.

    Raises
    ------
    ConfigurationError
        If a state is declared with a mean over processes, or the metric wraps another one in a
        way that cannot be merged.
    """
    if _overrides_merging(metric):
        return
    for part in _parts(metric).values():
        if isinstance(part, WrapperMetric) and not isinstance(part, ClasswiseWrapper):
            raise ConfigurationError(
                f"metric {name!r} ({type(part).__name__}) cannot be merged from parts of the "
                "data; pass the metric that it wraps"
            )
        for attribute, reduction in _reductions(part).items():
            if reduction == dim_zero_mean:
                raise ConfigurationError(
                    f"metric {name!r} ({type(part).__name__}) cannot be merged exactly: its "
                    f"state {attribute!r} is a mean over processes, whatever their number of "
                    "samples; use a metric that keeps sums (dist_reduce_fx='sum')"
                )


def _parts(metric: Metric) -> dict[str, Metric]:
    """Find the metric and the metrics inside it (an expression, a wrapper) by path."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _reductions(metric: Metric) -> dict[str, Any]:
    """Return how each state is combined over processes; torchmetrics has no public way."""
    return metric._reductions  # noqa: SLF001


def _overrides_merging(metric: Metric) -> bool:
    return type(metric).merge_state is not Metric.merge_state


def states_of(metric: Metric) -> States:
    """Take the states of a metric, by path and name.

    Tensors are on the CPU, and lists of them are joined to one. A metric that overrides
    ``merge_state`` is taken as a whole.
    """
    if _overrides_merging(metric):
        return {"": State(reduction="own", value=copy.deepcopy(metric))}
    return {
        f"{path}:{attribute}": _state_of(getattr(part, attribute), reduction)
        for path, part in _parts(metric).items()
        for attribute, reduction in _reductions(part).items()
    }


def _state_of(value: Tensor | list[Tensor], reduction: Any) -> State:
    if isinstance(value, list):
        tensors = [tensor.detach().cpu() for tensor in value]
        if reduction is dim_zero_cat and len(tensors) > 1:
            tensors = [dim_zero_cat(tensors)]
        return State(reduction="extend", value=tuple(tensors))
    tensor = value.detach().cpu().clone()
    if reduction in _REDUCTIONS:
        return State(reduction=_REDUCTIONS[reduction], value=tensor)
    return State(reduction="gather", value=(tensor,))


def combine(left: States, right: States) -> States:
    """Combine the states of consecutive parts, of at least one update each."""
    return {path: _combine(state, right[path]) for path, state in left.items()}


def _combine(left: State, right: State) -> State:
    reduction = left.reduction
    if reduction == "max":
        value = torch.maximum(left.value, right.value)
    elif reduction == "min":
        value = torch.minimum(left.value, right.value)
    elif reduction == "own":
        # torchmetrics puts what comes in before what is there.
        value = copy.deepcopy(right.value)
        value.merge_state(left.value)
    else:  # a sum of tensors, or tuples one after the other
        value = left.value + right.value
    return State(reduction=reduction, value=value)


def loaded(metric: Metric, states: States, num_updates: int) -> Metric:
    """Make a copy of a metric that holds the given states."""
    if _overrides_merging(metric):
        own: Metric = copy.deepcopy(states[""].value)
        own._computed = None  # noqa: SLF001 - a value of the unmerged parts
        return own
    filled = copy.deepcopy(metric)
    filled.reset()
    for path, part in _parts(filled).items():
        part._update_count = num_updates  # noqa: SLF001 - else compute() warns
        for attribute, reduction in _reductions(part).items():
            setattr(part, attribute, _finished(states[f"{path}:{attribute}"], reduction))
    return filled


def _finished(state: State, reduction: Any) -> Any:
    if state.reduction == "extend":
        return list(state.value)
    if state.reduction != "gather":
        return state.value.clone()
    if len(state.value) == 1:
        return state.value[0].clone()
    if reduction is dim_zero_cat:
        return dim_zero_cat(list(state.value))
    stacked = torch.stack(state.value)
    return stacked if reduction is None else reduction(stacked)
