"""The comparison as a table and as pictures."""

from __future__ import annotations

from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from dask_nn.examples.mnist.compare import Comparison, Parallel
    from dask_nn.examples.mnist.sequential import Digits, LoopResult

__all__ = ["describe_speedup", "draw_curves", "draw_misread", "make_table"]

_GRID = (5, 8)


def make_table(comparison: Comparison) -> Table:
    """Put the ways to train side by side, one row each; fits into 80 columns."""
    table = Table(title=_title(comparison), title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.add_column("training")
    for heading in ("s/epoch", "samples/s", "loss", "accuracy"):
        table.add_column(heading, justify="right")
    samples = len(comparison.dataset.digits.train_labels)
    for name, result in _rows(comparison).items():
        epoch_s = median(result.epoch_s)
        table.add_row(
            name,
            f"{epoch_s:.3f}",
            f"{samples / epoch_s:,.0f}",
            f"{result.loss[-1]:.4f}",
            f"{result.accuracy:.4f}",
        )
    return table


def describe_speedup(comparison: Comparison) -> str:
    """Say how dask-nn's median seconds per epoch compare; empty where it ran alone."""
    speedup = comparison.speedup
    if speedup is None:
        return ""
    return (
        f"dask-nn is {speedup['over_guide']:.2f} times as fast as the guide's loop and "
        f"{speedup['over_best']:.2f} times as fast as the best plain loop."
    )


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Write a PNG: the loss over the epochs, and over the seconds that they took."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for (name, result), marker in zip(_rows(comparison).items(), "osD", strict=False):
        epochs = range(1, len(result.loss) + 1)
        by_epoch.plot(epochs, result.loss, marker=marker, label=name)
        by_time.plot(list(accumulate(result.epoch_s)), result.loss, marker=marker, label=name)
    by_epoch.set(title="Loss by epoch", xlabel="epoch", ylabel="mean training loss")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set(title="Loss by time", xlabel="seconds of training")
    by_time.set_xlim(left=0)
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    by_epoch.legend()
    figure.savefig(path, dpi=120)


def draw_misread(digits: Digits, parallel: Parallel, path: Path) -> int:
    """Write a PNG: test images that were read wrongly, with their true and their read labels.

    Returns
    -------
    int
        How many test images were read wrongly; the picture shows the first of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrong = np.flatnonzero(parallel.labels != digits.test_labels)
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{len(wrong):,} of {len(digits.test_labels):,} test images read wrongly")
    grid = figure.subplots(*_GRID)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, wrong, strict=False):
        axes.imshow(digits.test_images[row].reshape(28, 28), cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(f"{digits.test_labels[row]} read as {parallel.labels[row]}", fontsize=9)
    figure.savefig(path, dpi=120)
    return len(wrong)


def _rows(comparison: Comparison) -> dict[str, LoopResult | Parallel]:
    rows: dict[str, LoopResult | Parallel] = {}
    if comparison.sequential is not None:
        best = comparison.sequential.best
        rows["sequential, guide's loop"] = comparison.sequential.guide
        rows[f"sequential, best loop, {_count(best.threads, 'thread')}"] = best
    run = comparison.parallel.result.run
    rows[f"dask-nn, {run.engine}, {_count(run.world_size, 'rank')}"] = comparison.parallel
    return rows


def _title(comparison: Comparison) -> str:
    run, digits = comparison.parallel.result.run, comparison.dataset.digits
    return (
        f"{comparison.dataset.name}: {len(digits.train_labels):,} images, "
        f"{_count(run.epochs, 'epoch')}, batches of {run.batch_size}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
