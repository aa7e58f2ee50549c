"""The numbers of a run as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import layout

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.report import Comparison, Report

__all__ = ["draw"]

OWN_COLOR = "#d95f02"
OTHER_COLOR = "#8da0b3"
SERIAL = "serial"


def draw(report: Report, path: Path) -> None:
    """Write a PNG: seconds per epoch of every system, and the latency of an all-reduce by size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    mnist, cnn, latency = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    _draw_epochs(mnist, report.mnist)
    _draw_epochs(cnn, report.cnn)
    _draw_latencies(latency, report)
    figure.savefig(path, dpi=120)


def _draw_epochs(axes: Any, comparison: Comparison) -> None:
    measured = [comparison.measured[system.key] for system in comparison.systems]
    medians = [found.median_s for found in measured]
    colors = [
        OWN_COLOR if system.key == comparison.own else OTHER_COLOR for system in comparison.systems
    ]
    labels = [
        f"{system.label}\n{layout(found)}: {found.median_s:.2f} s"
        for system, found in zip(comparison.systems, measured, strict=True)
    ]
    quartiles = [np.percentile(found.epoch_s, [25, 75]) for found in measured]
    reach = [
        [middle - low for middle, (low, _) in zip(medians, quartiles, strict=True)],
        [high - middle for middle, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    axes.barh(range(len(medians)), medians, color=colors, xerr=reach, ecolor="#444444", capsize=3)
    axes.set_yticks(range(len(medians)), labels)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(comparison.title.replace(": ", "\n"), loc="left", fontsize=10)
    axes.set_xlabel("seconds per epoch: median and quartiles")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_latencies(axes: Any, report: Report) -> None:
    names = dict.fromkeys(found.communicator for found in report.latencies)
    for name, marker in zip(names, "osD^v", strict=False):
        if name == SERIAL:
            continue  # it has nobody to exchange with
        points = [found for found in report.latencies if found.communicator == name]
        axes.plot(
            [found.size_bytes for found in points],
            [found.median_s for found in points],
            marker=marker,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="seconds")
    axes.set_title("All-reduce between two ranks", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
