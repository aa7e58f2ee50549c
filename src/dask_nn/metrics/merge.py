"""Partial values of metrics and losses, and their merging in one fixed order.

torchmetrics is imported where a metric is at hand, here as in :mod:`dask_nn.metrics.names` and
:mod:`dask_nn.metrics.streams`: without metrics, no process takes the time and memory for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchmetrics import Metric

    from dask_nn.metrics.states import States

__all__ = [
    "LossPartial",
    "MetricPartial",
    "Partial",
    "compute",
    "merge",
    "merge_named",
    "partial_of",
]


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
    states: States
    as_given: States | None = None

    def merged(self, right: Self) -> Self:
        """Merge with the partial of the samples that follow."""
        from dask_nn.metrics.states import combine

        # Parts without samples hold default states, which need not be neutral.
        if right.num_updates == 0:
            return self
        if self.num_updates == 0:
            return right
        as_given = None
        if self.as_given is not None and right.as_given is not None:
            as_given = combine(self.as_given, right.as_given)
        return replace(
            self,
            num_updates=self.num_updates + right.num_updates,
            states=combine(self.states, right.states),
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
    """

    total: float
    normalizer: float

    def merged(self, right: Self) -> Self:
        """Merge with the partial of the samples that follow."""
        return replace(
            self,
            total=self.total + right.total,
            normalizer=self.normalizer + right.normalizer,
        )

    @property
    def value(self) -> float:
        """The mean loss of all samples, NaN for none."""
        return self.total / self.normalizer if self.normalizer else float("nan")


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
    from dask_nn.metrics.states import states_of

    return MetricPartial(
        num_updates=metric.update_count,
        states=states_of(metric),
        as_given=None if as_given is None else states_of(as_given),
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
        In the order of ``partials``. A metric that has seen no samples gives NaN. Most metrics
        compute float32; such a value becomes the shortest decimal that rounds to it, as NumPy
        prints it: 0.8889, not 0.8888999819755554.

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
            from dask_nn.metrics.states import loaded

            states = partial.states if partial.as_given is None else partial.as_given
            metric = loaded(metrics[name], states, partial.num_updates)
            values.update(_flatten(name, metric.compute()))
        else:
            values[name] = float("nan")
    return values


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
        yield name, _number(value)
    else:
        for index, inner in enumerate(value):
            yield from _flatten(f"{name}_{index}", inner)


def _number(value: Tensor) -> float:
    if value.dtype == torch.float32:
        return float(str(np.float32(value.item())))
    return float(value)
