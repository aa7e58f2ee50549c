"""``dask-nn doctor``: whether a cluster can train."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dask_nn.cli.cluster_options import ClusterChoice, choose_cluster, cluster_options
from dask_nn.cli.interrupts import ending_at_once

if TYPE_CHECKING:
    from rich.table import Table

    from dask_nn.diagnosis.facts import DataFacts
    from dask_nn.diagnosis.report import Report

__all__ = ["doctor"]

MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}
# What workers need to read data of a kind.
READERS = {"zarr": ("zarr",), "parquet": ("pandas", "pyarrow"), "hdf5": ("h5py",)}


@click.command
@click.option(
    "--data", metavar="URL", help="Look at these blocks too: zarr:, parquet:, hdf5: or npy:."
)
@click.option(
    "--parameters",
    type=click.FloatRange(min=1),
    default=1e7,
    show_default=True,
    help="Size of the model for which there shall be shared memory.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60,
    show_default=True,
    help="Seconds to wait for the answer to one question.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@cluster_options
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    *,
    data: str | None,
    parameters: float,
    timeout_s: float,
    as_json: bool,
    **cluster: Any,
) -> None:
    """Look whether a cluster can train, and say what is wrong and how to mend it.

    The cluster is one that runs (--scheduler), or is started for it (--cluster, by default on this
    machine) and closed. The exit code is 1 if training cannot work, else 0.
    """
    gpus = cluster["gpus"] or 0
    if cluster["scheduler"] is not None:
        # Nothing is started there: it says what its workers shall see.
        cluster["gpus"] = None
    choice = choose_cluster(**cluster) or ClusterChoice()
    with ending_at_once():
        from dask_nn.diagnosis.examine import examine
        from dask_nn.diagnosis.facts import ClusterFacts
        from dask_nn.diagnosis.gather import gather
        from dask_nn.diagnosis.read_data import read_data
        from dask_nn.diagnosis.silence import silent_scheduler
        from dask_nn.errors import ClusterError, SchedulerUnreachable

    choice.check()
    X, unread = _open(data)
    try:
        # Nothing is imported before it is known whether workers have the memory for it.
        with choice.open(()) as client:
            facts = gather(
                client,
                X=X,
                data=unread if X is None else read_data(X, client=client),
                modules=READERS.get(data.partition(":")[0], ()) if data else (),
                parameters=int(parameters),
                gpus=gpus,
                timeout_s=timeout_s,
            )
    except SchedulerUnreachable as error:
        facts = replace(silent_scheduler(choice.options["address"], error.reason), data=unread)
    except ClusterError as error:
        address = choice.options.get("address", "none")
        facts = ClusterFacts(address=address, not_started=str(error), kind=choice.kind, data=unread)
    report = examine(facts)
    click.echo(report.as_json()) if as_json else _show(report)
    if report.status == "fail":
        ctx.exit(1)


def _open(url: str | None) -> tuple[Any, DataFacts | None]:
    """Open the data; what keeps it from being read is a finding, but for a URL that is none."""
    from dask_nn.data.urls import open_data, split_url
    from dask_nn.diagnosis.facts import DataFacts
    from dask_nn.errors import DaskNNError

    if url is None:
        return None, None
    split_url(url)
    try:
        return open_data(url), None
    except DaskNNError as error:
        return None, DataFacts(problem=str(error))


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(report))
    count = {status: sum(line.status == status for line in report.lines) for status in MARKS}
    verdict = {
        "ok": "This cluster can train.",
        "warn": "This cluster can train; see the warnings.",
        "fail": "This cluster cannot train.",
    }[report.status]
    counted = ", ".join(f"{number} {status}" for status, number in count.items())
    console.print(f"{verdict} [dim]{counted}[/]", style=MARKS[report.status][1])


def table(report: Report) -> Table:
    """Make a table with one row for each line, its remedy below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"dask-nn doctor: {report.scheduler}")
    found.add_column("", no_wrap=True)
    found.add_column("check", no_wrap=True)
    found.add_column("found", overflow="fold", ratio=1)
    for line in report.lines:
        mark, colour = MARKS[line.status]
        text = Text(line.found)
        if line.remedy:
            text.append(f"\n→ {line.remedy}", style="cyan")
        style = colour if line.status != "ok" else ""
        found.add_row(Text(f"{mark} {line.status}", style=colour), Text(line.check, style), text)
    return found
