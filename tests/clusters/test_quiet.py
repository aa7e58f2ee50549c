from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest

from dask_nn.clusters.quiet import quiet

NAME = "dask_nn.tests.quiet"


@pytest.fixture
def logger() -> logging.Logger:
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.WARNING)
    return logger


def test_a_logger_is_heard_where_it_may_be(logger: logging.Logger) -> None:
    with quiet(NAME) as heard:
        assert logger.level == logging.CRITICAL
        with heard():
            assert logger.level == logging.WARNING
        assert logger.level == logging.CRITICAL
    assert logger.level == logging.WARNING


def test_it_is_quiet_until_the_last_that_needs_it_ends(logger: logging.Logger) -> None:
    with ExitStack() as first, ExitStack() as second:
        heard = first.enter_context(quiet(NAME))
        second.enter_context(quiet(NAME))
        with heard():
            assert logger.level == logging.CRITICAL
        first.close()
        assert logger.level == logging.CRITICAL
    assert logger.level == logging.WARNING


def test_a_level_that_is_set_where_it_is_heard_is_kept(logger: logging.Logger) -> None:
    with quiet(NAME) as heard, heard():
        logger.setLevel(logging.DEBUG)
    assert logger.level == logging.DEBUG


def test_a_logger_below_it_with_a_level_of_its_own_is_quiet_too(logger: logging.Logger) -> None:
    """As Distributed's configuration gives some of them."""
    child = logger.getChild("client")
    child.setLevel(logging.INFO)
    with quiet(NAME) as heard:
        assert not child.isEnabledFor(logging.ERROR)
        with heard():
            assert child.level == logging.INFO
        logger.getChild("other").setLevel(logging.ERROR)
    assert child.level == logging.INFO
    assert logger.getChild("other").level == logging.ERROR
