"""Keep Distributed's log quiet where this package says itself what is the matter."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet_distributed"]


@contextmanager
def quiet_distributed() -> Iterator[None]:
    """Let through what is critical only, for the length of a ``with`` block."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
