"""Keep Distributed's log quiet where this package says itself what is the matter."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dask_nn.clusters.shared_setting import SharedSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["quiet", "quiet_distributed"]

_hushed: dict[str, SharedSetting] = {}


@contextmanager
def quiet(name: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Let a logger say what is critical only, for the length of a ``with`` block.

    Yields
    ------
    callable
        Gives a context manager inside which the logger is as it was before, unless another block
        needs it quiet.
    """
    hush = _hushed.setdefault(name, SharedSetting(partial(_critical_only, name)))
    with hush:
        yield partial(_without, hush)


def quiet_distributed() -> AbstractContextManager[Callable[[], AbstractContextManager[None]]]:
    """Let Distributed say what is critical only, as `quiet` does."""
    return quiet("distributed")


@contextmanager
def _critical_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _without(hush: SharedSetting) -> Iterator[None]:
    hush.__exit__()
    try:
        yield
    finally:
        hush.__enter__()
