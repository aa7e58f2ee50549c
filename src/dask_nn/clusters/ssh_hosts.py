"""What has to be true of hosts before a cluster starts on them over SSH, and their certificates."""

from __future__ import annotations

import asyncio
import json
import logging
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

__all__ = ["Host", "cards_of_hosts", "check_hosts", "remove_folder", "send_certificates"]

logger = logging.getLogger(__name__)

HOST_TIMEOUT_S = 30.0
CHECK = "import importlib.util; assert importlib.util.find_spec('distributed'), 'there is no Dask'"
NO_DASK = "; install dask-nn on that host, and say with remote_python= where its Python is"
CARDS = "from dask_nn.clusters.graphics_cards import visible_cards as v; print(','.join(v()))"
# The name of the folder is drawn by chance, so nobody else can have made it before; one machine may
# have two of the names.
SEND = (
    "import json, os, pathlib, sys; os.umask(0o077); folder = pathlib.Path(sys.argv[1]); "
    "folder.mkdir(mode=0o700, exist_ok=True); "
    "[(folder / name).write_text(text) for name, text in json.load(sys.stdin).items()]"
)
REMOVE = "import os, shutil, sys; p = sys.argv[1]; os.path.exists(p) and shutil.rmtree(p)"


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

    @property
    def place(self) -> tuple[str, str]:
        """What tells it from others: one name may have several machines, behind several ports."""
        return (self.name, repr(sorted(self.connect_options.items())))


async def check_hosts(hosts: Iterable[Host], timeout_s: float) -> None:
    """Try to log in everywhere and to find Dask there.

    Raises
    ------
    ClusterError
        Names the host, and what is wrong with it.
    """
    async with asyncio.timeout(timeout_s):
        # Of one host, several Pythons may be meant.
        unique = {(host.place, host.python): host for host in hosts}
        await _at_each(unique.values(), f"-c {shlex.quote(CHECK)}", remedy=NO_DASK)


async def cards_of_hosts(hosts: Iterable[Host]) -> dict[tuple[str, str], list[str]]:
    """Give the graphics cards that a login at each host may use, by its `Host.place`.

    Raises
    ------
    ClusterError
        If a host cannot say it.
    """
    unique = {host.place: host for host in hosts}
    answers = await _at_each(unique.values(), f"-c {shlex.quote(CARDS)}")
    return {
        place: [card for card in answer.strip().split(",") if card]
        for place, answer in zip(unique, answers, strict=True)
    }


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
    unique = {host.place: host for host in hosts}.values()
    await _at_each(unique, f"-c {shlex.quote(SEND)} {folder}", stdin=json.dumps(texts))
    return {name: f"{folder}/{name}" for name in texts}


async def remove_folder(hosts: Iterable[Host], folder: str) -> None:
    """Remove a folder from each host, and say where that is not possible."""
    unique = {host.place: host for host in hosts}.values()
    asked = (_run(host, f"-c {shlex.quote(REMOVE)} {folder}") for host in unique)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for host, answer in zip(unique, answers, strict=True):
        if isinstance(answer, BaseException):
            logger.warning(
                "%s: the certificates and keys in %s could not be removed, remove them by hand: %s",
                *(host.name, folder, answer),
            )


async def _at_each(
    hosts: Iterable[Host], arguments: str, stdin: str = "", remedy: str = ""
) -> list[str]:
    asked = (_run(host, arguments, stdin, remedy) for host in hosts)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(errors) > 1 and all(isinstance(error, ClusterError) for error in errors):
        raise ClusterError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]
    return [str(answer) for answer in answers]


async def _run(host: Host, arguments: str, stdin: str = "", remedy: str = "") -> str:
    async with _connected(host) as connection:
        done = await connection.run(f"{shlex.quote(host.python)} {arguments}", input=stdin)
    if done.exit_status != 0:
        lines = [line for line in str(done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.exit_status}"
        raise ClusterError(f"{host.name}: {host.python} failed there: {reason}{remedy}")
    return str(done.stdout)


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
