"""Keep Distributed's log quiet where this package says itself what is the matter."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

__all__ = ["quiet", "quiet_distributed"]


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger say what is critical only, for the length of a ``with`` block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def quiet_distributed() -> AbstractContextManager[None]:
    """Let Distributed say what is critical only, for the length of a ``with`` block."""
    return quiet("distributed")
