"""Metrics by name, for the task that the outputs and the targets stand for."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["METRIC_NAMES", "Metrics", "Task", "infer_task", "resolve"]

Task = Literal["binary", "multiclass", "multilabel"]
type Metrics = str | Metric | Sequence[str | Metric] | Mapping[str, Metric | str]

# Named as in torchmetrics, after the task.
_CLASSIFICATION: Final = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1Score",
    "auroc": "AUROC",
}
_REGRESSION: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "mse": ("MeanSquaredError", {}),
    "mae": ("MeanAbsoluteError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
    "r2": ("R2Score", {}),
}
METRIC_NAMES: Final = (*_CLASSIFICATION, *_REGRESSION)
_RESERVED: Final = frozenset({"epoch", "loss", "samples_per_s", "seconds"})


def infer_task(
    num_outputs: int, *, output_ndim: int, target_ndim: int, over_classes: bool = False
) -> Task:
    """Tell the kind of classification from shapes.

    Parameters
    ----------
    num_outputs : int
        Outputs per row: the second axis of the outputs, 1 where there is none.
    output_ndim, target_ndim : int
        Axes of outputs and targets, rows included.
    over_classes : bool, optional
        Whether the loss is a cross entropy over classes, so that targets of the outputs' shape
        are soft labels and not several labels at once.

    Returns
    -------
    {"binary", "multiclass", "multilabel"}
    """
    if num_outputs == 1:
        return "binary"
    if output_ndim == target_ndim and not over_classes:
        return "multilabel"
    return "multiclass"


def resolve(
    metrics: Metrics,
    *,
    num_outputs: int | None,
    task: Task | None = None,
    ignore_index: int | None = None,
) -> dict[str, Metric]:
    """Make metric objects from names, and copy the objects that are given.

    ``"accuracy"`` of several classes is the share of right rows (micro average); precision,
    recall, f1 and auroc of several classes or labels are averaged over them with equal weight
    (macro), as in torchmetrics. Outputs are logits, or probabilities if all of them lie in
    [0, 1]. ``"mse"``, ``"mae"``, ``"rmse"`` and ``"r2"`` are computed in float64.

    Parameters
    ----------
    metrics : str, Metric, sequence of them, or mapping of str to them
        A mapping gives the names of the results; otherwise an object is called by its class and
        those in a collection by their keys.
    num_outputs : int or None
        Outputs per row of the network; needed for the names of classification metrics.
    task : {"binary", "multiclass", "multilabel"}, optional
        Default: binary for one output, else multiclass.
    ignore_index : int, optional
        A label that the named classification metrics leave out.

    Returns
    -------
    dict of str to Metric
        New objects without samples.

    Raises
    ------
    ConfigurationError
        For an unknown or a repeated name, a metric that cannot be merged from parts, or something
        that is no metric.
    """
    resolved: dict[str, Metric] = {}
    if isinstance(metrics, (Sequence, Mapping)) and not isinstance(metrics, str) and not metrics:
        return resolved
    from dask_nn.metrics.states import check_mergeable

    for name, given in _named(metrics):
        if name in resolved:
            raise ConfigurationError(
                f"metric {name!r} is given twice; pass a mapping with a name for each"
            )
        if name in _RESERVED:
            raise ConfigurationError(
                f"a metric cannot be called {name!r}, which the results use themselves"
            )
        if isinstance(given, str):
            metric = _by_name(given, num_outputs, task, ignore_index)
        else:
            metric = copy.deepcopy(given)
            metric.reset()
        check_mergeable(name, metric)
        resolved[name] = metric
    return resolved


def _named(metrics: Metrics) -> list[tuple[str, str | Metric]]:
    from torchmetrics import Metric, MetricCollection

    if isinstance(metrics, (str, Metric, MetricCollection)):
        metrics = [metrics]
    pairs: list[tuple[str, Any]]
    if isinstance(metrics, Mapping):
        pairs = list(metrics.items())
    elif isinstance(metrics, Sequence):
        pairs = [(m if isinstance(m, str) else type(m).__name__, m) for m in metrics]
    else:
        raise ConfigurationError(
            f"metrics must be names, torchmetrics objects or a mapping of them, got {metrics!r}"
        )
    named: list[tuple[str, str | Metric]] = []
    for name, given in pairs:
        if isinstance(given, MetricCollection):
            named.extend((str(key), inner) for key, inner in given.items(copy_state=True))
        elif isinstance(given, (str, Metric)):
            named.append((name, given))
        else:
            raise ConfigurationError(
                f"metric {name!r} must be a name or a torchmetrics object, got {given!r}; "
                "write torchmetrics.classification.MulticlassAccuracy(...), not its class"
            )
    return named


def _by_name(
    name: str, num_outputs: int | None, task: Task | None, ignore_index: int | None
) -> Metric:
    from torchmetrics import classification, regression

    made: Metric
    if name in _REGRESSION:
        kind, arguments = _REGRESSION[name]
        made = getattr(regression, kind)(**arguments)
        return made.set_dtype(torch.float64)
    if name not in _CLASSIFICATION:
        near = difflib.get_close_matches(name.lower(), METRIC_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"unknown metric {name!r}{hint} Valid names are {', '.join(METRIC_NAMES)}; "
            "any torchmetrics object is accepted as well"
        )
    if num_outputs is None:
        raise ConfigurationError(
            f"metric {name!r} needs the number of outputs of the network, which is not known; "
            "pass a torchmetrics object instead"
        )
    if task is None:
        task = "binary" if num_outputs == 1 else "multiclass"
    # Labels are checked once by the callers; checking every batch again takes longer than counting.
    options: dict[str, Any] = {"validate_args": False, "ignore_index": ignore_index}
    if task == "multiclass":
        options |= {
            "num_classes": num_outputs,
            "average": "micro" if name == "accuracy" else "macro",
        }
    elif task == "multilabel":
        options |= {"num_labels": num_outputs}
    made = getattr(classification, task.capitalize() + _CLASSIFICATION[name])(**options)
    return made
