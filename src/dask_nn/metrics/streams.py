"""Metrics over a stream of batches, cheap enough for the training loop."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from dask_nn.errors import ConfigurationError, DataError
from dask_nn.metrics.heads import WHOLE
from dask_nn.metrics.merge import MetricPartial, compute, partial_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchmetrics import Metric

    from dask_nn.metrics.heads import Head

__all__ = ["BufferedMetrics", "MetricStream", "classifies"]

_BUFFER_BYTES: Final = 64 * 2**20

# The other multiclass metrics take the largest output, which needs no probabilities.
_SOFTMAX_METRICS: Final = (
    "MulticlassPrecisionRecallCurve",
    "MulticlassCalibrationError",
    "MulticlassHingeLoss",
)


class MetricStream:
    """One metric that is updated batch by batch and gives the value over all samples.

    Metrics of probabilities take outputs for logits as soon as one of them lies outside [0, 1].
    torchmetrics decides that batch by batch; here it is decided for all samples together, by
    carrying both readings until an output settles it.

    Parameters
    ----------
    name : str
        For error messages.
    metric : Metric
        Copied, never changed.

    Raises
    ------
    ConfigurationError
        If an expression of metrics would read the same outputs in different ways.
    """

    def __init__(self, name: str, metric: Metric) -> None:
        self._name = name
        self._metric = copy.deepcopy(metric)
        self._classifies = classifies(metric)
        self._activation = _activation(name, metric)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._metric.reset()
        self._as_given = copy.deepcopy(self._metric) if self._activation else None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        outputs : Tensor
            Shape (num_rows, ...). One output per row, of shape (num_rows, 1), is taken as
            (num_rows,) where the targets have that shape.
        targets : Tensor
            Shape (num_rows, ...). For classification metrics, floating labels are taken as
            integers, and soft labels of the outputs' shape as the class of the largest.

        Raises
        ------
        DataError
            If floating targets of a classification metric are no labels.
        """
        if outputs.shape[0] == 0:
            return
        # States made in inference mode could not be updated outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._update(*self._prepared(outputs, targets))

    def _prepared(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.dim() == targets.dim() + 1 and outputs.shape[1] == 1:
            outputs = outputs[:, 0]
        if self._classifies and targets.is_floating_point():
            targets = self._labels(outputs, targets)
        elif self._metric.dtype == torch.float64 and outputs.is_floating_point():
            outputs = outputs.double()
        return outputs, targets

    def _labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Make labels of floating targets."""
        if self._activation != "sigmoid" and outputs.shape == targets.shape and targets.dim() > 1:
            return targets.argmax(dim=1)
        labels = targets.long()
        if not torch.equal(labels.to(targets.dtype), targets):
            raise DataError(
                f"metric {self._name!r} needs class labels, but the targets ({targets.dtype}) "
                "have values that are no integers; use a regression metric such as 'mse', or "
                "integer labels"
            )
        return labels

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        if self._activation and outputs.is_floating_point():
            if self._as_given is not None:
                if bool(((outputs >= 0) & (outputs <= 1)).all()):
                    self._as_given.update(outputs, targets)
                else:
                    self._as_given = None
            outputs = outputs.sigmoid() if self._activation == "sigmoid" else outputs.softmax(dim=1)
        self._metric.update(outputs, targets)

    def partial(self) -> MetricPartial:
        """Return what the metric has seen since the last reset."""
        return partial_of(self._metric, self._as_given)

    @property
    def is_cheap(self) -> bool:
        """Whether computing the value does not grow with the number of samples."""
        from torchmetrics import Metric

        return not any(
            isinstance(default, list)
            for part in self._metric.modules()
            if isinstance(part, Metric)
            for default in part._defaults.values()  # noqa: SLF001 - no public way
        )


class BufferedMetrics:
    """Several metrics updated from the training loop, for many batches at once.

    The buffer is emptied after a number of batches that depends only on the shapes of the batches
    since the last reset, so that the same batches give the same bits.

    Parameters
    ----------
    metrics : mapping of str to Metric
        Copied, never changed.
    heads : mapping of str to Head, optional
        Which output and target each of them compares, by default the only ones.
    every : int, optional
        Batches between two real updates; fewer where batches are so large that the buffer would
        exceed 64 MiB.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        heads: Mapping[str, Head] | None = None,
        *,
        every: int = 64,
    ) -> None:
        if every < 1:
            raise ConfigurationError(f"every must be at least 1, got {every}")
        self._metrics = dict(metrics)
        self._streams = {name: MetricStream(name, metric) for name, metric in metrics.items()}
        self._every = every
        self._num_kept = self._room = 0
        self._heads = {name: (heads or {}).get(name, WHOLE) for name in metrics}
        # Outputs and targets of each head.
        self._kept: dict[Head, tuple[list[Tensor], list[Tensor]]] = {
            head: ([], []) for head in self._heads.values()
        }

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch; the tensors are kept, so they must not be overwritten later.

        Parameters
        ----------
        outputs : Tensor, or tuple or dict of them
            Shape (num_rows, ...).
        targets : Tensor, or dict of them
            Shape (num_rows, ...).
        """
        for head, (kept_outputs, kept_targets) in self._kept.items():
            output, target = head.select(outputs, targets)
            kept_outputs.append(output.detach())
            kept_targets.append(target)
        self._num_kept += 1
        self._room -= 1
        if self._room <= 0:
            self._make_room()

    def reset(self) -> None:
        """Forget all batches."""
        self._forget_batches()
        for stream in self._streams.values():
            stream.reset()

    def partial(self) -> dict[str, MetricPartial]:
        """Return what the metrics have seen since the last reset."""
        self._flush()
        return {name: stream.partial() for name, stream in self._streams.items()}

    def running_partial(self) -> dict[str, MetricPartial]:
        """Return what the last real update has left, of the metrics that are cheap to compute."""
        return {name: stream.partial() for name, stream in self._streams.items() if stream.is_cheap}

    def compute_running(self) -> dict[str, float]:
        """Compute cheap current values, for display: up to ``every`` batches old.

        Returns
        -------
        dict of str to float
            Without the metrics that keep all outputs, and empty before the first real update.
        """
        partials = self.running_partial()
        return compute(
            self._metrics, {name: part for name, part in partials.items() if part.num_updates}
        )

    def _make_room(self) -> None:
        if self._num_kept == 1:  # the first batch of a buffer says how many it may hold
            size_bytes = sum(
                batch.nbytes for pair in self._kept.values() for kept in pair for batch in kept
            )
            self._room = min(self._every, max(1, _BUFFER_BYTES // max(1, size_bytes))) - 1
        if self._room <= 0:
            self._flush()

    def _flush(self) -> None:
        if not self._num_kept:
            return
        with torch.no_grad():
            joined = {
                head: (torch.cat(outputs), torch.cat(targets))
                for head, (outputs, targets) in self._kept.items()
            }
            for name, stream in self._streams.items():
                stream.update(*joined[self._heads[name]])
        self._forget_batches()

    def _forget_batches(self) -> None:
        for kept_outputs, kept_targets in self._kept.values():
            kept_outputs.clear()
            kept_targets.clear()
        self._num_kept = self._room = 0


def classifies(metric: Metric) -> bool:
    """Whether a metric, or one inside it, compares outputs with labels."""
    return any(_in_classification(p) for part in metric.modules() for p in type(part).__mro__)


def _activation(name: str, metric: Metric) -> str:
    """Find how a metric turns logits into probabilities: "sigmoid", "softmax" or "" if never."""
    from torchmetrics import Metric
    from torchmetrics.metric import CompositionalMetric
    from torchmetrics.wrappers.abstract import WrapperMetric

    found = {
        _activation_of(part)
        for part in metric.modules()
        if isinstance(part, Metric) and not isinstance(part, (CompositionalMetric, WrapperMetric))
    }
    if len(found) > 1:
        raise ConfigurationError(
            f"metric {name!r} combines metrics that read logits in different ways; "
            "pass them one by one"
        )
    return found.pop() if found else ""


def _in_classification(parent: type) -> bool:
    return parent.__module__.startswith("torchmetrics.classification")


def _activation_of(metric: Metric) -> str:
    # Subclasses outside torchmetrics count by the class that they extend.
    for parent in type(metric).__mro__:
        if _in_classification(parent):
            if parent.__name__.startswith(("Binary", "Multilabel")):
                return "sigmoid"
            if parent.__name__.startswith(_SOFTMAX_METRICS):
                return "softmax"
    return ""
