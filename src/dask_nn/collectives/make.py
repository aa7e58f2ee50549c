"""Communicators by name, imported when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_nn.collectives.choose import NAMES
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    import threading

    from dask_nn.collectives.base import Communicator
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

    Raises
    ------
    ConfigurationError
        If there is no communicator of that name.
    """
    options: dict[str, Any] = {"timeout_s": timeout_s, "abort_event": abort_event}
    match name:
        case "serial":
            from dask_nn.collectives.serial import SerialCommunicator

            return SerialCommunicator(rank, world_size, **options)
        case "threads":
            from dask_nn.collectives.threads import ThreadsCommunicator

            return ThreadsCommunicator(
                rank, world_size, gang=gang, slice_above_bytes=slice_above_bytes, **options
            )
        case "shared_memory":
            from dask_nn.collectives.shared_memory import SharedMemoryCommunicator

            return SharedMemoryCommunicator(
                rank,
                world_size,
                rendezvous=rendezvous,
                gang=gang,
                folder=folder,
                slice_above_bytes=slice_above_bytes,
                **options,
            )
        case "gloo":
            from dask_nn.collectives.gloo import GlooCommunicator

            return GlooCommunicator(
                rank,
                world_size,
                rendezvous=rendezvous,
                host=host,
                slice_above_bytes=slice_above_bytes,
                **options,
            )
        case "nccl":
            from dask_nn.collectives.nccl import NcclCommunicator

            return NcclCommunicator(
                rank,
                world_size,
                rendezvous=rendezvous,
                slice_above_bytes=slice_above_bytes,
                **options,
            )
    message = f"collective must be one of {', '.join(NAMES)}, got {name!r}"
    raise ConfigurationError(message)
