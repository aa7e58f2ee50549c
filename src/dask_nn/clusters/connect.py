"""Connect to a scheduler that is already running."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distributed import Client

from dask_nn.errors import SchedulerUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["connect"]


def connect(address: str, timeout_s: float = 10) -> Client:
    """Open a client of the scheduler at an address.

    Parameters
    ----------
    address : str
        Such as ``"tcp://10.0.0.5:8786"``; without a protocol TCP is meant.
    timeout_s : float, default 10
        How long to wait for an answer, in seconds.

    Returns
    -------
    distributed.Client
        The caller closes it. It is the default client until then.

    Raises
    ------
    SchedulerUnreachable
        If no Dask scheduler answers in time, or the address cannot be understood.
    """
    try:
        with _quiet("distributed"):
            return Client(address, timeout=timeout_s)
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()
        message = (
            f"no Dask scheduler answered at {address!r} within {timeout_s:g} s "
            f"({reason[0] if reason else type(error).__name__}); expected the address that "
            "`dask scheduler` prints, such as tcp://10.0.0.5:8786"
        )
        raise SchedulerUnreachable(message) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
