"""``dask-nn``, also reachable as ``dask nn``."""

from __future__ import annotations

from typing import Any

import click

import dask_nn
from dask_nn.cli.doctor import doctor
from dask_nn.cli.evaluate import evaluate
from dask_nn.cli.interrupts import EXIT_INTERRUPTED
from dask_nn.cli.mnist import mnist
from dask_nn.cli.predict import predict
from dask_nn.cli.train import train
from dask_nn.errors import (
    ClusterError,
    CollectiveError,
    DaskNNError,
    NonFiniteLoss,
    TrainingError,
)

__all__ = ["main", "nn"]

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


class _Group(click.Group):
    """A group of commands whose expected errors are one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except DaskNNError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            # A loss that is no number comes of the options, as other bad input does.
            failed = isinstance(error, (ClusterError, TrainingError, CollectiveError))
            bad_input = isinstance(error, NonFiniteLoss) or not failed
            ctx.exit(EXIT_BAD_INPUT if bad_input else EXIT_FAILED)


@click.group(name="nn", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
@click.version_option(dask_nn.__version__, prog_name="dask-nn")
def nn(*, debug: bool) -> None:
    """Train, evaluate and run PyTorch networks on Dask clusters."""


for _command in (mnist, train, evaluate, predict, doctor):
    nn.add_command(_command)


def main() -> None:
    """Run ``dask-nn``."""
    nn(prog_name="dask-nn")


if __name__ == "__main__":
    main()
