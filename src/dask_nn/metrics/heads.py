"""Which output and which target a metric compares, where a module has several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

from torch import Tensor

from dask_nn.errors import ConfigurationError
from dask_nn.metrics.names import Metrics, Task, infer_task, resolve

__all__ = ["WHOLE", "Head", "HeadMetrics", "heads_of", "num_outputs_of", "resolve_heads"]


@dataclass(frozen=True)
class Head:
    """One output of a module, and the target that it is compared with.

    Parameters
    ----------
    output : str or int, optional
        Key, or position in a tuple; None where the module returns one tensor.
    target : str, optional
        Key of a dictionary y; None where y is one array.
    """

    output: str | int | None = None
    target: str | None = None

    def select(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Take this head's part of a batch of outputs and targets."""
        return self.output_of(outputs), self.target_of(targets)

    def output_of(self, outputs: Any) -> Any:
        """Take this head's output."""
        return outputs if self.output is None else outputs[self.output]

    def target_of(self, targets: Any) -> Any:
        """Take this head's target."""
        return targets if self.target is None else targets[self.target]


WHOLE = Head()


@dataclass(frozen=True, kw_only=True)
class HeadMetrics:
    """Metrics, and the head that each of them looks at.

    Parameters
    ----------
    metrics : dict of str to Metric
        By the name of the result.
    heads : dict of str to Head
        Under the same names; empty where there is one output and one target.
    tasks : dict of Head to Task
        What kind of classification the outputs of a head stand for.
    """

    metrics: dict[str, Any]
    heads: dict[str, Head]
    tasks: dict[Head, Task]


def num_outputs_of(output: Tensor) -> int:
    """Count the outputs for each row."""
    return int(output.shape[1]) if output.dim() > 1 else 1


def heads_of(outputs: Any, targets: Any) -> dict[str, Head]:
    """Name the heads of a module by its outputs.

    Parameters
    ----------
    outputs : Tensor, or tuple or dict of them
        What the module returns.
    targets : array, or dict of them
        y.

    Returns
    -------
    dict of str to Head
        A dictionary's outputs meet the targets of the same keys. The members of a tuple meet a
        dictionary's targets in its order, and are called by its keys; without such a dictionary
        they are called ``"0"``, ``"1"``, ... Where y, or the module's output, is one tensor, all
        are compared with it. Outputs that have no target are left out.
    """
    keys = list(targets) if isinstance(targets, Mapping) else None
    if isinstance(outputs, Mapping):
        return {
            str(name): Head(name, None if keys is None else str(name))
            for name in outputs
            if keys is None or name in keys
        }
    if isinstance(outputs, Sequence):
        if keys is None:
            return {str(place): Head(place) for place in range(len(outputs))}
        return {
            key: Head(place, key) for place, key in zip(range(len(outputs)), keys, strict=False)
        }
    return {"": WHOLE} if keys is None else {key: Head(None, key) for key in keys}


def resolve_heads(
    metrics: Metrics | Mapping[str, Metrics],
    outputs: Any,
    targets: Any,
    *,
    ignore_index: int | None = None,
) -> HeadMetrics:
    """Make metric objects for the outputs of a module.

    Parameters
    ----------
    metrics
        For one output and one target as `resolve` takes them; else a mapping from the name of an
        output to its metrics.
    outputs : Tensor, or tuple or dict of them
        For a few rows.
    targets : Tensor, or dict of them
        For the same rows.
    ignore_index : int, optional
        A label that classification metrics of a single output leave out.

    Returns
    -------
    HeadMetrics
        With several heads, the results are called ``"<output>_<metric>"``.

    Raises
    ------
    ConfigurationError
        For what `resolve` refuses, and for metrics that do not say which output they are of.
    """
    heads = heads_of(outputs, targets)
    if list(heads.values()) == [WHOLE]:
        task = _task(outputs, targets, over_classes=ignore_index is not None)
        found = resolve(
            cast("Metrics", metrics),
            num_outputs=num_outputs_of(outputs),
            task=task,
            ignore_index=ignore_index,
        )
        return HeadMetrics(metrics=found, heads={}, tasks={WHOLE: task})
    result = HeadMetrics(metrics={}, heads={}, tasks={})
    if not isinstance(metrics, Mapping):
        if not metrics:
            return result
        raise ConfigurationError(
            f"there are several outputs or targets ({', '.join(heads)}): say which one a metric "
            f"is of, as in metrics={{{next(iter(heads), 'name')!r}: ['accuracy']}}; got {metrics!r}"
        )
    for name, wanted in metrics.items():
        head = heads.get(str(name))
        if head is None:
            raise ConfigurationError(_unknown(str(name), list(heads)))
        output, target = head.select(outputs, targets)
        if not isinstance(output, Tensor):
            raise ConfigurationError(
                f"output {name!r} is a {type(output).__name__}, expected one tensor; a metric "
                "cannot look into what is nested deeper"
            )
        task = result.tasks[head] = _task(output, target)
        for metric, made in resolve(wanted, num_outputs=num_outputs_of(output), task=task).items():
            result.metrics[f"{name}_{metric}"] = made
            result.heads[f"{name}_{metric}"] = head
    return result


def _task(output: Tensor, target: Any, *, over_classes: bool = False) -> Task:
    return infer_task(
        num_outputs_of(output),
        output_ndim=output.dim(),
        target_ndim=target.ndim,
        over_classes=over_classes,
    )


def _unknown(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(map(repr, known)) or "none: no output has a target of its name"
    return (
        f"metrics name an output {name!r} that the module and y do not have in common{hint} "
        f"There are {listed}"
    )
