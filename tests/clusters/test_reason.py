from __future__ import annotations

import asyncio
from itertools import pairwise
from queue import Empty

import pytest

from dask_nn.clusters.reason import first_reason_of, reason_of


def after(*errors: BaseException) -> BaseException:
    """Give the last of some errors, each raised because of the one before."""
    for first, second in pairwise(errors):
        second.__cause__ = first
    return errors[-1]


def deadline() -> BaseException:
    """Give what a deadline raises that is over for what handles an error of its own."""

    async def wait() -> None:
        async with asyncio.timeout(0.01):
            try:
                {}["not in the cache"]
            except KeyError:
                await asyncio.sleep(20)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(wait())
    return caught.value


def test_a_deadline_is_its_own_reason() -> None:
    assert reason_of(deadline()) == "TimeoutError"
    assert first_reason_of(deadline()) == "TimeoutError"
    assert first_reason_of(after(deadline(), RuntimeError("it failed"))) == "TimeoutError"


def test_an_error_says_what_it_has_to_say_itself() -> None:
    assert reason_of(after(OSError("no route"), RuntimeError("it failed"))) == "it failed"


def test_an_error_that_says_nothing_lets_the_one_behind_it_speak() -> None:
    assert reason_of(after(OSError("no route"), Empty(), RuntimeError())) == "no route"
    assert reason_of(after(Empty(), RuntimeError())) == "RuntimeError"


def test_the_first_reason_is_the_first_that_says_something() -> None:
    chain = after(Empty(), OSError("no route"), RuntimeError("it failed"), Empty())
    assert first_reason_of(chain) == "no route"
    assert first_reason_of(Empty()) == "Empty"


def test_what_an_error_hides_is_no_reason() -> None:
    error = Empty()
    error.__context__ = OSError("no route")
    assert reason_of(error) == "no route"
    error.__suppress_context__ = True  # raise ... from None
    assert reason_of(error) == first_reason_of(error) == "Empty"
