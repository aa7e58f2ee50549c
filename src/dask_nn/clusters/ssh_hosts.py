"""What has to be true of hosts before a cluster starts on them over SSH, and their certificates."""

from __future__ import annotations

import asyncio
import json
import shlex
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.certificates import pem_texts
from dask_nn.clusters.optional import import_optional
from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from distributed import Security

__all__ = ["Host", "check_hosts", "remove_folder", "send_certificates"]

HOST_TIMEOUT_S = 30.0
CHECK = "import importlib.util as u, sys; sys.exit(u.find_spec('distributed') is None)"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host and how to reach it.

    Parameters
    ----------
    name : str
        Its name or address.
    connect_options : dict
        Keyword arguments of ``asyncssh.connect``.
    python : str
        The Python to run there.
    """

    name: str
    connect_options: dict[str, Any] = field(default_factory=dict)
    python: str


async def check_hosts(hosts: Iterable[Host], timeout_s: float) -> None:
    """Try to log in everywhere and to find Dask there.

    Raises
    ------
    ClusterError
        Names the host, and what is wrong with it.
    """
    async with asyncio.timeout(timeout_s):
        await _at_each(hosts, f"-c {shlex.quote(CHECK)}")


async def send_certificates(
    hosts: Iterable[Host], folder: str, security: Security
) -> dict[str, str]:
    """Write certificates and keys to a new folder of each host, readable by the user alone.

    They travel inside SSH: on a command line, others of the host could read them.

    Returns
    -------
    dict
        From ``"ca_file"``, ``"worker_cert"``, ``"worker_key"``, ... to paths, equal on all hosts.
    """
    texts = pem_texts(security)
    code = (
        "import json, os, pathlib, sys; os.umask(0o077); folder = pathlib.Path(sys.argv[1]); "
        "folder.mkdir(mode=0o700); "
        "[(folder / name).write_text(text) for name, text in json.load(sys.stdin).items()]"
    )
    await _at_each(hosts, f"-c {shlex.quote(code)} {folder}", stdin=json.dumps(texts))
    return {name: f"{folder}/{name}" for name in texts}


async def remove_folder(hosts: Iterable[Host], folder: str) -> None:
    """Remove a folder from each host."""
    code = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    await _at_each(hosts, f"-c {shlex.quote(code)} {folder}")


async def _at_each(hosts: Iterable[Host], arguments: str, stdin: str = "") -> None:
    unique = {host.name: host for host in hosts}.values()
    asked = (_run(host, arguments, stdin) for host in unique)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(errors) > 1 and all(isinstance(error, ClusterError) for error in errors):
        raise ClusterError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]


async def _run(host: Host, arguments: str, stdin: str) -> None:
    async with _connected(host) as connection:
        done = await connection.run(f"{shlex.quote(host.python)} {arguments}", input=stdin)
    if done.exit_status != 0:
        lines = [line for line in str(done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else "the package distributed is not installed"
        raise ClusterError(
            f"{host.name}: {host.python} cannot run Dask there: {reason}; install dask-nn on that "
            "host, and say with remote_python= where its Python is"
        )


@asynccontextmanager
async def _connected(host: Host) -> AsyncIterator[Any]:
    asyncssh = import_optional("asyncssh", "ssh", "ssh")
    try:
        async with asyncio.timeout(HOST_TIMEOUT_S):
            connection = await asyncssh.connect(host.name, **host.connect_options)
    except TypeError as error:
        raise ClusterError(f"connect_options: {error}") from error
    except (OSError, TimeoutError, asyncssh.Error) as error:
        reason = str(error) or f"no answer within {HOST_TIMEOUT_S:g} s"
        raise ClusterError(
            f"{host.name}: SSH does not let us in: {reason}; try `ssh {host.name}`, and give "
            "port, username, client_keys or known_hosts in connect_options="
        ) from error
    async with connection:
        yield connection
