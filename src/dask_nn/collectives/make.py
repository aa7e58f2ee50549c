"""Communicators by name, imported when they are asked for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dask_nn.collectives.choose import NAMES
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from dask_nn.collectives.base import Communicator
    from dask_nn.collectives.mailbox import Mailbox
    from dask_nn.collectives.rendezvous import Rendezvous

__all__ = ["make_communicator"]


def make_communicator(
    name: str,
    *,
    rank: int,
    world_size: int,
    gang: str,
    rendezvous: Rendezvous,
    folder: str | None = None,
    host: str = "127.0.0.1",
    timeout_s: float = 600.0,
    abort_event: threading.Event | None = None,
    slice_above_bytes: int = 1 << 20,
    hosts: Sequence[int] = (),
    mailbox: Mailbox | None = None,
) -> Communicator:
    """Make a communicator, not yet open.

    Parameters
    ----------
    name : str
        One of ``choose.NAMES``.
    rank, world_size, timeout_s, abort_event
        See :class:`~dask_nn.collectives.base.Communicator`.
    gang : str
        A name that this gang alone has.
    rendezvous : Rendezvous
        Where the ranks meet.
    folder : str, optional
        A folder of this host for a shared file that does not fit into memory.
    host : str
        The address at which peers reach this rank.
    slice_above_bytes : int
        Leaves above this size are reduced by owner-slice.
    hosts : sequence of int
        Ranks on each host, in the order of ranks, where there are two levels.
    mailbox : Mailbox, optional
        What carries the letters of ``"dask"``.

    Raises
    ------
    ConfigurationError
        If there is no communicator of that name, or what it needs is not given.
    """
    options: dict[str, Any] = {"timeout_s": timeout_s, "abort_event": abort_event}
    sliced = options | {"slice_above_bytes": slice_above_bytes}
    inside, _, between = name.partition("+")
    if name not in NAMES:
        message = f"collective must be one of {', '.join(NAMES)}, got {name!r}"
        raise ConfigurationError(message)
    if between:
        from dask_nn.collectives.hosts import HostsCommunicator

        return HostsCommunicator(
            rank,
            world_size,
            name=name,
            hosts=hosts,
            make_outer=_by_messages(between, host, mailbox),
            rendezvous=rendezvous,
            gang=gang,
            folder=folder,
            **sliced,
        )
    match inside:
        case "serial":
            from dask_nn.collectives.serial import SerialCommunicator

            return SerialCommunicator(rank, world_size, **options)
        case "threads":
            from dask_nn.collectives.threads import ThreadsCommunicator

            return ThreadsCommunicator(rank, world_size, gang=gang, **sliced)
        case "shared_memory":
            from dask_nn.collectives.shared_memory import SharedMemoryCommunicator

            return SharedMemoryCommunicator(
                rank, world_size, rendezvous=rendezvous, gang=gang, folder=folder, **sliced
            )
    make = _by_messages(name, host, mailbox)
    return make(rank, world_size, rendezvous=rendezvous, **sliced)


def _by_messages(name: str, host: str, mailbox: Mailbox | None) -> Callable[..., Communicator]:
    """Give what makes a communicator of ranks that share no memory."""
    match name:
        case "gloo":
            from dask_nn.collectives.gloo import GlooCommunicator

            return partial(GlooCommunicator, host=host)
        case "nccl":
            from dask_nn.collectives.nccl import NcclCommunicator

            return NcclCommunicator
    from dask_nn.collectives.mailbox_communicator import MailboxCommunicator

    if mailbox is None:
        message = f"collective {name!r} needs the mailbox of a worker"
        raise ConfigurationError(message)
    return partial(MailboxCommunicator, mailbox=mailbox)
