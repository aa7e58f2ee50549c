"""Keep Distributed's log quiet where this package says itself what is the matter."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["quiet", "quiet_distributed"]


@contextmanager
def quiet(name: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Let a logger say what is critical only, for the length of a ``with`` block.

    Yields
    ------
    callable
        Gives a context manager inside which the logger is as it was before.
    """
    logger = logging.getLogger(name)
    before = logger.level
    with _at_level(logger, logging.CRITICAL):
        yield partial(_at_level, logger, before)


def quiet_distributed() -> AbstractContextManager[Callable[[], AbstractContextManager[None]]]:
    """Let Distributed say what is critical only, as `quiet` does."""
    return quiet("distributed")


@contextmanager
def _at_level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
