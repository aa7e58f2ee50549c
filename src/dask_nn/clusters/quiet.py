"""Keep Distributed's log quiet where this package says itself what is the matter."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dask_nn.clusters.shared_setting import SharedSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["quiet", "quiet_distributed", "warnings_of_distributed"]

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
    with _raised([logging.getLogger(name), *_with_own_levels(name)], logging.CRITICAL):
        yield


def _with_own_levels(name: str) -> list[logging.Logger]:
    """Give the loggers below one that do not take their level from it."""
    known = list(logging.root.manager.loggerDict.items())
    below = [logger for each, logger in known if each.startswith(f"{name}.")]
    return [logger for logger in below if isinstance(logger, logging.Logger) and logger.level]


@contextmanager
def _handled_from(name: str, level: int) -> Iterator[None]:
    with _raised(logging.getLogger(name).handlers, level):
        yield


@contextmanager
def _raised(heard: Iterable[logging.Logger | logging.Handler], level: int) -> Iterator[None]:
    before = [(each, each.level) for each in heard if each.level < level]
    for each, _ in before:
        each.setLevel(level)
    try:
        yield
    finally:
        for each, own in before:
            each.setLevel(own)


# The handlers, not the logger, so that it does not matter who is quiet meanwhile. A scheduler and
# nannies of this process would tell of every connection.
warnings_of_distributed = SharedSetting(partial(_handled_from, "distributed", logging.WARNING))


@contextmanager
def _without(hush: SharedSetting) -> Iterator[None]:
    hush.__exit__()
    try:
        yield
    finally:
        hush.__enter__()
