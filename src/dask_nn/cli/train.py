"""``dask-nn train``: a training described in a file."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_nn.cli.cluster_options import default_device, from_table
from dask_nn.cli.interrupts import ending_at_once
from dask_nn.cli.job_data import open_training

if TYPE_CHECKING:
    from rich.console import Console

    from dask_nn.cli.job_file import JobFile
    from dask_nn.training.result import TrainingResult

__all__ = ["train"]

# What workers import while the data is looked at.
PRELOAD = ("torch", "dask_nn.training.rank_main", "dask_nn.data.peek")


@click.command
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--example", is_flag=True, help="Write a commented job file to JOB, and end.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the job.")
def train(*, job: Path, example: bool, resume: bool) -> None:
    """Train as the file JOB (TOML) says."""
    from dask_nn.cli.job_file import read_job
    from dask_nn.errors import ConfigurationError

    if example:
        _write_example(job)
        return
    read = read_job(job)
    if resume and not read.checkpoint:
        raise ConfigurationError(f"{job}: --resume needs a [checkpoint] table")
    with ending_at_once():
        from rich.console import Console

        import dask_nn.api  # noqa: F401 - torch takes its time
    console = Console(highlight=False, soft_wrap=True)
    _run(read, console, resume=resume)


def _write_example(path: Path) -> None:
    from dask_nn.cli.job_keys import EXAMPLE
    from dask_nn.errors import ConfigurationError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error
    click.echo(f"Wrote {path}. Edit it, then run: dask-nn train {path}")


def _run(job: JobFile, console: Console, *, resume: bool) -> None:
    from dask_nn.api import train as run
    from dask_nn.callbacks.progress import RichProgress
    from dask_nn.errors import ConfigurationError, NonFiniteLoss

    options = _options(job)
    weights = Path(job.place(job.output.get("weights", "model.safetensors")))
    for path in (weights, *_history(job)):
        if not path.parent.is_dir():
            raise ConfigurationError(f"{job.path}: [output] {path.parent} is no folder")
    cluster = from_table(job.cluster, f"{job.path}: [cluster]")
    with ExitStack() as stack:
        X, y, sample_weight, validation = open_training(job)
        _check(job, options, resume=resume, validated=validation is not None)
        preload = (*PRELOAD, "dask_nn.metrics.states") if options.get("metrics") else PRELOAD
        client = stack.enter_context(cluster.open(preload))
        console.print(f"dask-nn on {client.scheduler_info()['address']}")
        console.print(f"Dashboard: {client.dashboard_link}")
        progress = stack.enter_context(RichProgress(console))
        try:
            result = run(
                job.make_model(),
                X,
                y,
                sample_weight=sample_weight,
                validation=validation,
                callbacks=[progress],
                resume=resume,
                client=client,
                **options,
            )
        except KeyboardInterrupt as interrupt:
            unfinished: TrainingResult | None = getattr(interrupt, "result", None)
            if unfinished is None:
                raise KeyboardInterrupt("Interrupted; nothing was trained yet.") from interrupt
            _save(job, unfinished, weights)
            message = f"Interrupted; what is trained so far is in {weights}."
            raise KeyboardInterrupt(message) from interrupt
        except NonFiniteLoss as error:
            if error.result is not None:
                _save(job, error.result, weights)
                console.print(f"The last good weights are in {weights}.")
            raise
        _save(job, result, weights)
    console.print(result.summary())
    console.print(f"Wrote {', '.join(map(str, [weights, *_history(job)]))}")


def _options(job: JobFile) -> dict[str, Any]:
    """Turn a job's tables into arguments of train; everything is imported and checked here."""
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.errors import ConfigurationError
    from dask_nn.training.strategies import Synchronous

    training = dict(job.training)
    strategy: dict[str, Any] = {
        key: training.pop(key) for key in ("shards", "threads_per_rank") if key in training
    }
    scheduler, every = job.make_schedule()
    device = default_device(job.cluster.get("gpus"))
    options = {"device": device} | training
    options |= {
        "loss": job.make_loss(),
        "optimizer": job.make_optimizer(),
        "lr_scheduler": scheduler,
        "lr_scheduler_every": every,
        "transform": job.transform(),
        "memory": job.data.get("memory", "auto"),
        "strategy": job.made("training", partial(Synchronous, **strategy)),
        "recovery": job.made("recovery", partial(Recovery, **job.recovery)),
    }
    if job.checkpoint:
        if "url" not in job.checkpoint:
            raise ConfigurationError(f"{job.path}: [checkpoint] needs url")
        table = dict(job.checkpoint)
        make = partial(Checkpoint, job.place(table.pop("url")), **table)
        options["checkpoint"] = job.made("checkpoint", make)
    return options


def _check(job: JobFile, options: dict[str, Any], *, resume: bool, validated: bool) -> None:
    """Refuse options that cannot work, before a cluster is waited for."""
    from dask_nn.controller.options import Options
    from dask_nn.controller.resume import check_best_name
    from dask_nn.errors import ConfigurationError

    model = job.make_model()
    try:
        checked = Options(model=model, resume=resume, **options)
        metrics = options.get("metrics", ())
        if checked.checkpoint is not None and not isinstance(metrics, dict):
            names = [metrics] if isinstance(metrics, str) else list(metrics)
            check_best_name(checked.checkpoint, names, validated=validated)
    except ConfigurationError as error:
        raise ConfigurationError(f"{job.path}: {error}") from error
    job.check_optimizer(checked.make_model())


def _history(job: JobFile) -> list[Path]:
    history = job.output.get("history")
    return [] if history is None else [Path(job.place(history))]


def _save(job: JobFile, result: TrainingResult, weights: Path) -> None:
    from dask_nn.checkpoints.serialization import save_weights
    from dask_nn.checkpoints.whole_file import whole_file

    save_weights(weights, result.model.state_dict(), {"module": str(job.model["module"])})
    for path in _history(job):
        with whole_file(path) as file:
            file.write(json.dumps(result.history, indent=2).encode() + b"\n")
