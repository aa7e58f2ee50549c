"""Clusters on hosts that SSH reaches, through distributed.SSHCluster."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import uuid
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import dask
from distributed import Security, SSHCluster

from dask_nn.clusters.certificates import tls_settings
from dask_nn.clusters.graphics_cards import VISIBLE
from dask_nn.clusters.known_names import refuse_unknown
from dask_nn.clusters.loop import loop_blind_to_interrupts, see_through, start_in
from dask_nn.clusters.option_types import (
    OF_SCHEDULERS,
    OF_WORKERS,
    PORT,
    TEXT,
    TEXTS,
    check_types,
    lines,
    mapping,
    one_or_each,
)
from dask_nn.clusters.optional import import_optional
from dask_nn.clusters.reason import reason_of
from dask_nn.clusters.request import DEATH_TIMEOUT, IDLE_TIMEOUT
from dask_nn.clusters.serve import serve
from dask_nn.clusters.ssh_hosts import (
    Host,
    cards_of_hosts,
    check_hosts,
    remove_folder,
    send_certificates,
)
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_request", "open_cluster"]

logger = logging.getLogger(__name__)

TYPES = {
    "hosts": TEXTS,
    "connect_options": one_or_each(mapping({"port": PORT, "username": TEXT})),
    "worker_options": OF_WORKERS,
    "scheduler_options": OF_SCHEDULERS,
    "worker_class": TEXT,
    "remote_python": one_or_each(TEXT),
}
REMOVE_TIMEOUT_S = 60.0


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Run a scheduler on the first of ``hosts`` and workers on the others.

    With ``workers=`` above their number, hosts get several workers each.

    Raises
    ------
    ConfigurationError
        If an option cannot work, or asyncssh is not installed.
    ClusterError
        If a host cannot be reached, or its Python cannot run Dask; names the host.
    """
    hosts = _hosts(request)
    folder = f"/tmp/dask-nn-{uuid.uuid4().hex}"  # noqa: S108 - made with mode 700
    with ExitStack() as stack:

        async def make() -> Any:
            await check_hosts(hosts, request.timeout_s)
            if isinstance(request.security, Security):
                # Some hosts may have got theirs when another one fails, or Ctrl-C is pressed.
                stack.callback(_remove, hosts, folder)
                files = await send_certificates(hosts, folder, request.security)
                # The remote processes read these; SSHCluster hands the configuration on.
                stack.enter_context(dask.config.set(tls_settings(files)))
            cards = await cards_of_hosts(hosts[1:]) if request.gpus else {}
            return _make_cluster(request, hosts, cards)

        with serve(request, make) as client:
            yield client


def _remove(hosts: list[Host], folder: str) -> None:
    runner = loop_blind_to_interrupts()
    try:
        see_through(start_in(runner, remove_folder(hosts, folder)), REMOVE_TIMEOUT_S)
    except Exception as error:
        logger.warning(
            "the certificates and keys in %s of %s may not be removed: %s",
            *(folder, ", ".join({host.name for host in hosts}), reason_of(error)),
        )
    finally:
        runner.stop(1)


def check_request(request: ClusterRequest) -> None:
    """Check the options, without a connection.

    Raises
    ------
    ConfigurationError
        If one cannot work, or asyncssh is not installed.
    """
    import_optional("asyncssh", "ssh", "ssh")
    refuse_unknown(request.options, TYPES, of="SSHCluster has")
    # What they need is said better there than by their type.
    _hosts(request)
    check_types(request.options, TYPES)
    try:
        written = json.dumps([_scheduler_options(request), _worker_options(request)])
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"SSHCluster hands scheduler_options and worker_options on as JSON: {error}"
        ) from error
    if "'" in written:
        raise ConfigurationError(
            "SSHCluster puts scheduler_options and worker_options into single quotes of a shell, "
            f"so there can be none inside, got {written}"
        )


def _hosts(request: ClusterRequest) -> list[Host]:
    """Give the scheduler's host, then those of the workers, with how to reach each."""
    names: Any = request.options.get("hosts")
    if (
        not isinstance(names, list | tuple)
        or len(names) < 2
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ConfigurationError(
            'cluster kind "ssh" needs hosts, the scheduler\'s host and then those of the workers, '
            f'such as ["node1", "node1", "node2"]; got {names!r}'
        )
    connect = _for_each("connect_options", request.options.get("connect_options") or {}, len(names))
    python = _for_each(
        "remote_python", request.options.get("remote_python") or sys.executable, len(names)
    )
    return [
        Host(name=name, connect_options=options, python=path)
        for name, options, path in zip(names, connect, python, strict=True)
    ]


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ConfigurationError(
            f"{name} is a list of {len(value)} and there are {count} hosts; give one for each, or "
            "one for all"
        )
    return value


def _make_cluster(
    request: ClusterRequest, hosts: list[Host], cards: dict[tuple[str, str], list[str]]
) -> Any:
    scheduler, *seats = hosts
    count = request.wanted or len(seats)
    all_hosts = [scheduler, *(seats[number % len(seats)] for number in range(count))]

    def python(number: int) -> str:
        host = seats[number % len(seats)]
        env = _environment(request)
        if request.gpus:
            before = [seats[other % len(seats)].place for other in range(number)].count(host.place)
            env[VISIBLE] = _card(host, cards[host.place], before)
        # As an option of the worker, its text would end the quotes in which SSHCluster puts them.
        variables = [f"{name}={value}" for name, value in env.items()]
        return shlex.join([*(["env", *variables] if env else []), host.python])

    cluster: Any = SSHCluster(
        [host.name for host in all_hosts],
        connect_options=[host.connect_options for host in all_hosts],
        remote_python=[shlex.quote(scheduler.python), *map(python, range(count))],
        scheduler_options=_scheduler_options(request),
        worker_options=_worker_options(request),
        worker_class=request.options.get("worker_class", "distributed.Nanny"),
        asynchronous=True,
        security=request.security,
    )
    specs = dict(cluster.worker_spec)

    def spec(number: int) -> dict[str, Any]:
        host = seats[number % len(seats)]
        options = dict(specs[number % min(len(seats), len(specs))]["options"])
        options |= {"address": host.name, "connect_options": host.connect_options}
        options["remote_python"] = python(number)
        # SSHCluster gives its workers no names, and so does not know them when they are lost.
        options["kwargs"] = {**options["kwargs"], "name": number}
        return {**specs[0], "options": options}

    def new_worker_spec() -> dict[int, dict[str, Any]]:
        number = min(set(range(len(cluster.worker_spec) + 1)) - set(cluster.worker_spec))
        return {number: spec(number)}

    cluster.worker_spec = {number: spec(number) for number in range(count)}
    # With these SSHCluster can also grow.
    cluster.new_spec = spec(0)
    cluster.new_worker_spec = new_worker_spec
    return cluster


def _card(host: Host, cards: list[str], number: int) -> str:
    if number >= len(cards):
        raise ConfigurationError(
            f"{number + 1} workers of {host.name} need a GPU each, and a login there may use "
            f"{len(cards)}; ask for fewer workers, or name more hosts"
        )
    return cards[number]


def _environment(request: ClusterRequest) -> dict[str, str]:
    options = request.options.get("worker_options") or {}
    own = options.get("env") or {}
    return {**{name: str(value) for name, value in own.items()}, **request.env}


def _scheduler_options(request: ClusterRequest) -> dict[str, Any]:
    options = dict(request.options.get("scheduler_options") or {})
    options.setdefault("dashboard_address", ":8787")
    options.setdefault("idle_timeout", IDLE_TIMEOUT)
    if request.security:
        options.setdefault("protocol", "tls")
    return options


def _worker_options(request: ClusterRequest) -> dict[str, Any]:
    options = dict(request.options.get("worker_options") or {})
    if "n_workers" in options:
        raise ConfigurationError(
            "n_workers of worker_options would give several workers one name; give workers= instead"
        )
    options.setdefault("nthreads", request.cores)
    if request.memory is not None:
        options["memory_limit"] = request.memory
    options["preload"] = [*lines(options.get("preload")), *request.preload]
    options.pop("env", None)
    options.setdefault("death_timeout", DEATH_TIMEOUT)
    if request.security:
        options.setdefault("protocol", "tls")
    return options
