"""Which cluster to train on: the same words on every command line and in job files."""

from __future__ import annotations

import tomllib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["CLUSTER_KEYS", "ClusterChoice", "choose_cluster", "cluster_options", "from_table"]

CONNECT_TIMEOUT_S = 5
# What a job file's [cluster] table may hold.
CLUSTER_KEYS = (
    "kind",
    "workers",
    "cores",
    "threads_per_worker",
    "memory",
    "memory_limit",
    "adapt",
    "walltime",
    "gpus",
    "tls",
    "env",
    "start_timeout_s",
    "scheduler",
    "options",
)
# In the words of this package, what older job files and Dask say.
SYNONYMS = {"threads_per_worker": "cores", "memory_limit": "memory"}


@dataclass(frozen=True, kw_only=True)
class ClusterChoice:
    """A cluster that was asked for.

    Parameters
    ----------
    kind : str
        Of :func:`dask_nn.cluster`.
    arguments : dict
        Its other arguments; none where nothing was said.
    options : dict
        Keyword arguments of the underlying library.
    """

    kind: str = "local"
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self, preload: tuple[str, ...]) -> Iterator[Client]:
        """Run the cluster for the length of a ``with`` block.

        Raises
        ------
        ConfigurationError, ClusterError
            As :func:`dask_nn.cluster`.
        """
        from dask_nn.clusters.open import open_request

        with open_request(self._request(preload)) as client:
            yield client

    def check(self) -> None:
        """Refuse what cannot work, before anything starts.

        Raises
        ------
        ConfigurationError
            Says what was got and what was expected.
        """
        from dask_nn.clusters.open import check_request

        check_request(self._request(()))

    def _request(self, preload: tuple[str, ...]) -> ClusterRequest:
        from dask_nn.clusters.open import check_kind
        from dask_nn.clusters.request import ClusterRequest

        check_kind(self.kind)
        return ClusterRequest(
            kind=self.kind, preload=preload, options=self.options, **self.arguments
        )


def default_device(gpus: Any) -> str:
    """Give the device of a training of which nothing is said: the GPUs that were asked for."""
    return "cuda" if gpus else "cpu"


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose a cluster to a command, as its last ones."""
    positive = click.IntRange(min=1)
    for option in reversed(
        [
            click.option(
                "--cluster",
                "cluster_kind",
                metavar="KIND",
                help="local, ssh, slurm, pbs, lsf, sge, oar, htcondor, kubernetes, aws or address.",
            ),
            click.option("--workers", type=positive, help="Workers to start and keep."),
            click.option("--cores", type=positive, help="Threads of each worker.  [default: 1]"),
            click.option("--memory", metavar="SIZE", help='Memory of each, such as "16 GB".'),
            click.option(
                "--adapt",
                metavar="MIN MAX",
                nargs=2,
                type=positive,
                help="Range of workers, instead of --workers.",
            ),
            click.option("--walltime", metavar="TIME", help="How long a batch job may run."),
            click.option("--gpus", type=click.IntRange(0, 1), help="GPUs of each worker."),
            click.option("--tls", is_flag=True, help="Encrypt with temporary certificates."),
            click.option(
                "--env",
                metavar="NAME=VALUE",
                multiple=True,
                help="Environment variable of the workers. May be repeated.",
            ),
            click.option(
                "--start-timeout",
                "start_timeout_s",
                metavar="SECONDS",
                type=click.FloatRange(min=0, min_open=True),
                help="How long to wait for the workers.  [default: 600]",
            ),
            click.option(
                "--cluster-option",
                "cluster_settings",
                metavar="KEY=VALUE",
                multiple=True,
                help="Argument of the library that starts the cluster, such as queue=gpu; TOML "
                "values or plain text. May be repeated.",
            ),
            click.option(
                "--scheduler",
                metavar="ADDRESS",
                help="Short for --cluster address --cluster-option address=ADDRESS.",
            ),
        ]
    ):
        command = option(command)
    return command


def choose_cluster(
    *,
    cluster_kind: str | None = None,
    scheduler: str | None = None,
    cluster_settings: tuple[str, ...] = (),
    threads_per_worker: int | None = None,
    adapt: tuple[int, int] | None = None,
    tls: bool = False,
    env: tuple[str, ...] = (),
    start_timeout_s: float | None = None,
    **arguments: Any,
) -> ClusterChoice | None:
    """Turn a command line's options into a choice, or None if nothing was said.

    Raises
    ------
    click.UsageError
        If options contradict each other.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if threads_per_worker is not None:
        if "cores" in given:
            raise click.UsageError("--threads-per-worker and --cores mean the same: give either")
        given["cores"] = threads_per_worker
    if adapt:
        given["adapt"] = tuple(adapt)
    if tls:
        given["security"] = True
    if env:
        given["env"] = dict(map(_variable, env))
    options = dict(map(_parsed, cluster_settings))
    if scheduler is not None:
        if cluster_kind is not None or given or options:
            raise click.UsageError(
                "--scheduler uses a running cluster; --cluster, --workers, --threads-per-worker "
                "and the like start one: give either"
            )
        return _address(scheduler, start_timeout_s or CONNECT_TIMEOUT_S)
    if start_timeout_s is not None:
        given["start_timeout_s"] = start_timeout_s
    if cluster_kind is None and not given and not options:
        return None
    return ClusterChoice(kind=cluster_kind or "local", arguments=given, options=options)


def from_table(table: dict[str, Any], where: str) -> ClusterChoice:
    """Turn the ``[cluster]`` table of a job file into a choice.

    Parameters
    ----------
    table : dict
        Its keys were checked.
    where : str
        What to call it in an error.

    Raises
    ------
    ConfigurationError
        If keys contradict each other, or a value cannot work.
    """
    from dask_nn.clusters.option_types import MAPPING, SWITCH, TEXT, check_types
    from dask_nn.errors import ConfigurationError

    types = {"options": MAPPING, "scheduler": TEXT, "tls": SWITCH}
    check_types(table, types, prefix=f"{where} ")
    rest = dict(table)
    scheduler = rest.pop("scheduler", None)
    if scheduler is not None:
        timeout_s = rest.pop("start_timeout_s", CONNECT_TIMEOUT_S)
        if rest:
            raise ConfigurationError(
                f"{where} scheduler= uses a running cluster, {', '.join(rest)} start one: give "
                "either"
            )
        return _checked(_address(scheduler, timeout_s), where)
    kind = rest.pop("kind", "local")
    options = rest.pop("options", {})
    if rest.pop("tls", False):
        rest["security"] = True
    for other, name in SYNONYMS.items():
        if other in rest:
            if name in rest:
                raise ConfigurationError(f"{where} {other} and {name} mean the same: give either")
            rest[name] = rest.pop(other)
    if rest.get("memory") == "auto":
        del rest["memory"]
    return _checked(ClusterChoice(kind=kind, arguments=rest, options=options), where)


def _checked(choice: ClusterChoice, where: str) -> ClusterChoice:
    from dask_nn.errors import ConfigurationError

    try:
        choice.check()
    except ConfigurationError as error:
        raise ConfigurationError(f"{where} {error}") from error
    return choice


def _address(scheduler: str, timeout_s: float) -> ClusterChoice:
    return ClusterChoice(
        kind="address",
        arguments={"start_timeout_s": timeout_s},
        options={"address": scheduler},
    )


def _variable(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not (equals and name.isidentifier()):
        raise click.UsageError(f"--env must be NAME=VALUE, such as LANG=C, got {setting!r}")
    return name, value


def _parsed(setting: str) -> tuple[str, Any]:
    key, equals, value = setting.partition("=")
    key = key.strip()
    if not (equals and key.isidentifier()):
        raise click.UsageError(
            f"--cluster-option must be KEY=VALUE, such as queue=gpu, got {setting!r}"
        )
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
