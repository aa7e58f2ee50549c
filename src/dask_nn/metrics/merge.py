"""Partial values of metrics and losses, and their merging in one fixed order.

The states of a torchmetrics object are combined by the reductions that it declares for
distributed training, as ``Metric.merge_state`` does. That method itself is not called, unless
overridden: it refuses metrics that leave ``full_state_update`` unset, stacks states in the shape
of the tree, and weighs means by the wrong count.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

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

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "LossPartial",
    "MetricPartial",
    "Partial",
    "check_mergeable",
    "compute",
    "merge",
    "merge_named",
    "partial_of",
]

_Reduction = Literal["sum", "max", "min", "extend", "gather", "own"]
_REDUCTIONS: Final[dict[Any, _Reduction]] = {
    dim_zero_sum: "sum",
    dim_zero_max: "max",
    dim_zero_min: "min",
}


@dataclass(frozen=True, kw_only=True)
class _State:
    """One state of a metric: a tensor, the tensors of the parts in order, or a whole metric."""

    reduction: _Reduction
    value: Any


class Partial(ABC):
    """What is known of some consecutive samples."""

    @abstractmethod
    def merged(self, right: Self) -> Self:
        """Merge with the partial of the samples that follow."""


@dataclass(frozen=True, kw_only=True)
class MetricPartial(Partial):
    """What a metric has seen of some samples; picklable, and never changed once made.

    Parameters
    ----------
    num_updates : int
        Updates behind the states; 0 for no samples.
    states : mapping of str to state
        Every state by its path in the metric; only the metric itself where it overrides
        ``merge_state``.
    as_given : mapping of str to state, optional
        The states with the outputs taken as probabilities, as long as all of them lie in [0, 1].
    """

    num_updates: int
    states: Mapping[str, _State]
    as_given: Mapping[str, _State] | None = None

    def merged(self, right: Self) -> Self:
        """Merge with the partial of the samples that follow."""
        # Parts without samples hold default states, which need not be neutral.
        if right.num_updates == 0:
            return self
        if self.num_updates == 0:
            return right
        as_given = None
        if self.as_given is not None and right.as_given is not None:
            as_given = _merge_states(self.as_given, right.as_given)
        return replace(
            self,
            num_updates=self.num_updates + right.num_updates,
            states=_merge_states(self.states, right.states),
            as_given=as_given,
        )


@dataclass(frozen=True, kw_only=True)
class LossPartial(Partial):
    """The loss of some samples.

    Parameters
    ----------
    total : float
        The sum of the losses, in float64.
    normalizer : float
        The sum of what they are divided by, in float64.
    divides : bool
        False for a loss that is a sum over samples: its value is ``total``.
    """

    total: float
    normalizer: float
    divides: bool = True

    def merged(self, right: Self) -> Self:
        """Merge with the partial of the samples that follow."""
        return replace(
            self,
            total=self.total + right.total,
            normalizer=self.normalizer + right.normalizer,
        )

    @property
    def value(self) -> float:
        """The loss of all samples, NaN for none."""
        if not self.divides:
            return self.total
        return self.total / self.normalizer if self.normalizer else float("nan")


def check_mergeable(name: str, metric: Metric) -> None:
    """Check that parts of a metric merge to its value over all samples.

    Raises
    ------
    ConfigurationError
        If a state is declared with a mean over processes, or the metric wraps another one in a
        way that cannot be merged.
    """
    if _merges_itself(metric):
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


def partial_of(metric: Metric, as_given: Metric | None = None) -> MetricPartial:
    """Take the states of a metric.

    Parameters
    ----------
    metric : Metric
        Updated any number of times, also never.
    as_given : Metric, optional
        The same metric updated with the outputs as probabilities.

    Returns
    -------
    MetricPartial
        Tensors on the CPU; lists of tensors are joined to one.
    """
    return MetricPartial(
        num_updates=metric.update_count,
        states=_states_of(metric),
        as_given=None if as_given is None else _states_of(as_given),
    )


def merge[P: Partial](partials: Sequence[P]) -> P:
    """Merge the partials of consecutive parts in a fixed balanced binary tree.

    The left child of n parts holds the largest power of two below n. Merging aligned groups of a
    power of two first, elsewhere, gives the same bits.

    Parameters
    ----------
    partials : sequence
        One per part, in the order of the parts; at least one.

    Returns
    -------
    MetricPartial or LossPartial
        As if all parts had been seen by one metric.
    """
    count = len(partials)
    if count == 1:
        return partials[0]
    middle = 1 << ((count - 1).bit_length() - 1)
    return merge(partials[:middle]).merged(merge(partials[middle:]))


def merge_named(parts: Sequence[Mapping[str, Partial]]) -> dict[str, Partial]:
    """Merge, name by name, the partials of consecutive parts, in the order of the parts.

    Parameters
    ----------
    parts : sequence of mapping
        The same names in every part; at least one part.
    """
    return {name: merge([part[name] for part in parts]) for name in parts[0]}


def compute(metrics: Mapping[str, Metric], partials: Mapping[str, Partial]) -> dict[str, float]:
    """Compute the values that merged partials stand for.

    A metric with several values gives one entry for each: ``recall_0``, ``recall_1``, ...

    Parameters
    ----------
    metrics : mapping of str to Metric
        The metrics of the partials; they are copied, not changed.
    partials : mapping of str to partial
        By the name of the metric. Loss partials need no metric.

    Returns
    -------
    dict of str to float
        In the order of ``partials``. A metric that has seen no samples gives NaN.

    Raises
    ------
    ConfigurationError
        If a metric computes something that is no tensor of numbers.
    """
    values: dict[str, float] = {}
    for name, partial in partials.items():
        if isinstance(partial, LossPartial):
            values[name] = partial.value
        elif isinstance(partial, MetricPartial) and partial.num_updates:
            values.update(_flatten(name, _loaded(metrics[name], partial).compute()))
        else:
            values[name] = float("nan")
    return values


def _parts(metric: Metric) -> dict[str, Metric]:
    """Find the metric and the metrics inside it (an expression, a wrapper) by path."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _reductions(metric: Metric) -> dict[str, Any]:
    """Return how each state is combined over processes; torchmetrics has no public way."""
    return metric._reductions  # noqa: SLF001


def _merges_itself(metric: Metric) -> bool:
    return type(metric).merge_state is not Metric.merge_state


def _states_of(metric: Metric) -> Mapping[str, _State]:
    if _merges_itself(metric):
        return {"": _State(reduction="own", value=copy.deepcopy(metric))}
    return {
        f"{path}:{attribute}": _state_of(getattr(part, attribute), reduction)
        for path, part in _parts(metric).items()
        for attribute, reduction in _reductions(part).items()
    }


def _state_of(value: Tensor | list[Tensor], reduction: Any) -> _State:
    if isinstance(value, list):
        tensors = [tensor.detach().cpu() for tensor in value]
        if reduction is dim_zero_cat and len(tensors) > 1:
            tensors = [dim_zero_cat(tensors)]
        return _State(reduction="extend", value=tuple(tensors))
    tensor = value.detach().cpu().clone()
    if reduction in _REDUCTIONS:
        return _State(reduction=_REDUCTIONS[reduction], value=tensor)
    return _State(reduction="gather", value=(tensor,))


def _merge_states(left: Mapping[str, _State], right: Mapping[str, _State]) -> Mapping[str, _State]:
    return {path: _combine(state, right[path]) for path, state in left.items()}


def _combine(left: _State, right: _State) -> _State:
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
    return _State(reduction=reduction, value=value)


def _loaded(metric: Metric, partial: MetricPartial) -> Metric:
    """Make a copy of a metric with the states of a partial."""
    states = partial.states if partial.as_given is None else partial.as_given
    if _merges_itself(metric):
        own: Metric = copy.deepcopy(states[""].value)
        own._computed = None  # noqa: SLF001 - a value of the unmerged parts
        return own
    loaded = copy.deepcopy(metric)
    loaded.reset()
    for path, part in _parts(loaded).items():
        part._update_count = partial.num_updates  # noqa: SLF001 - else compute() warns
        for attribute, reduction in _reductions(part).items():
            setattr(part, attribute, _finished(states[f"{path}:{attribute}"], reduction))
    return loaded


def _finished(state: _State, reduction: Any) -> Any:
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


def _flatten(name: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(str(key), inner)
    elif not isinstance(value, Tensor):
        raise ConfigurationError(
            f"metric {name!r} computed {type(value).__name__}, expected a tensor of numbers; "
            "curves are no metrics here: use the area under them, or predict and compute them"
        )
    elif value.numel() == 1:
        yield name, float(value)
    else:
        for index, inner in enumerate(value):
            yield from _flatten(f"{name}_{index}", inner)
