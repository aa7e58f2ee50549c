"""All numbers of a run: their ratios, the table, and the file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.exchange import Latency
    from benchmarks.systems import System
    from benchmarks.tasks import Measurement, Task

__all__ = ["Comparison", "Report", "describe_machine", "layout", "make_tables", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task and what every system took for it; the ratios are against ``own``."""

    title: str
    task: Task
    num_images: int
    systems: Sequence[System]
    measured: dict[str, Measurement]
    own: str

    def ratio(self, key: str) -> float:
        """How many times the own median epoch the median epoch of a system lasts."""
        return self.measured[key].median_s / self.measured[self.own].median_s

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        task = {name: value for name, value in asdict(self.task).items() if name != "folder"}
        systems = {key: measured.as_dict() for key, measured in self.measured.items()}
        return {"num_images": self.num_images, "task": task, "systems": systems}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that one run of the benchmarks found."""

    dataset: str
    machine: dict[str, Any]
    mnist: Comparison
    cnn: Comparison
    latencies: Sequence[Latency]
    duration_s: float

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of median epoch times; above 1 dask-nn is the faster."""
        return {
            "over_best": self.mnist.ratio("best"),
            "over_guide": self.mnist.ratio("guide"),
            "over_ddp": self.mnist.ratio("ddp"),
            "cnn_scaling": self.cnn.ratio("dask_nn_1"),
            "cnn_over_best_1_thread": self.cnn.ratio("best_1"),
            "cnn_over_best_all_threads": self.cnn.ratio("best_all"),
        }

    @property
    def same_bits(self) -> bool:
        """Whether the convolutional network got the same weights on one rank as on two."""
        hashes = {
            self.cnn.measured[key].details["weights_sha256"] for key in ("dask_nn", "dask_nn_1")
        }
        return len(hashes) == 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {
            "dataset": self.dataset,
            "machine": self.machine,
            "duration_s": self.duration_s,
            "ratios": self.ratios,
            "mnist": self.mnist.as_dict(),
            "cnn": {**self.cnn.as_dict(), "same_bits": self.same_bits},
            "all_reduce": [asdict(latency) for latency in self.latencies],
        }


def describe_machine() -> dict[str, Any]:
    """Describe what the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = {name: importlib.metadata.version(name) for name in ("torch", "dask", "numpy")}
    return {
        "processor": model,
        "cores": os.process_cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def make_tables(report: Report) -> Group:
    """Put everything into tables for a terminal."""
    return Group(
        _epochs(report.mnist),
        _epochs(report.cnn),
        _latencies(report.latencies),
        _ratios(report),
    )


def layout(found: Measurement) -> str:
    """Write ranks and threads, as in ``2 x 1``."""
    return f"{found.details['ranks']} x {found.details['threads']}"


def seconds(duration_s: float) -> str:
    """Write a duration with three digits and a fitting unit."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if duration_s * factor >= 1:
            return f"{duration_s * factor:.3g} {unit}"
    return f"{duration_s * 1e6:.2g} us"


def _epochs(comparison: Comparison) -> Table:
    table = Table(title=comparison.title, title_justify="left", title_style="")
    table.add_column("training", no_wrap=True)
    table.add_column("ranks x\nthreads")
    for heading in (
        "s/epoch",
        "fastest",
        "slowest",
        "epochs",
        "images/s",
        "loss",
        "dask-nn is\nfaster by",
    ):
        table.add_column(heading, justify="right")
    for system in comparison.systems:
        found = comparison.measured[system.key]
        ratio = comparison.ratio(system.key)
        table.add_row(
            system.label,
            layout(found),
            f"{found.median_s:.3f}",
            f"{min(found.epoch_s):.3f}",
            f"{max(found.epoch_s):.3f}",
            f"{len(found.epoch_s)}",
            f"{comparison.num_images / found.median_s:,.0f}",
            f"{found.loss:.4f}",
            "" if system.key == comparison.own else f"{ratio:.2f} x",
        )
    return table


def _latencies(latencies: Sequence[Latency]) -> Table:
    title = "All-reduce of float32, median from the last rank's begin to the last rank's end"
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("communicator")
    sizes = sorted({latency.size_bytes for latency in latencies})
    for size_bytes in sizes:
        table.add_column(f"{size_bytes / 1e6:g} MB", justify="right")
    for name in dict.fromkeys(latency.communicator for latency in latencies):
        own = {found.size_bytes: found for found in latencies if found.communicator == name}
        ranks = next(iter(own.values())).num_ranks
        cells = [seconds(own[size].median_s) for size in sizes]
        table.add_row(f"{name} ({ranks} rank{'s' * (ranks > 1)})", *cells)
    return table


def _ratios(report: Report) -> Table:
    bits = "the same" if report.same_bits else "OTHER"
    title = f"Ratios of median epochs (the CNN has {bits} bits on 1 rank as on 2)"
    words = {
        "over_best": "guide's network: the best sequential loop / dask-nn",
        "over_guide": "guide's network: the guide's loop / dask-nn",
        "over_ddp": "guide's network: torchrun DDP / dask-nn",
        "cnn_scaling": "CNN: dask-nn on 1 rank / on 2 ranks",
        "cnn_over_best_1_thread": "CNN: best sequential loop, 1 thread / dask-nn on 2 ranks",
        "cnn_over_best_all_threads": "CNN: best sequential loop, all threads / dask-nn on 2 ranks",
    }
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("ratio")
    table.add_column("of")
    table.add_column("is", justify="right")
    for name, ratio in report.ratios.items():
        table.add_row(name, words[name], f"{ratio:.2f}")
    return table
