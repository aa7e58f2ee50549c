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


def while_handling(handled: BaseException, error: BaseException, *, hide: bool) -> BaseException:
    """Give an error as it is raised where another one is handled, with or without ``from None``."""
    try:
        raise handled
    except type(handled):
        try:
            if hide:
                raise error from None
            raise error
        except type(error):
            return error


@pytest.mark.parametrize(("hide", "reason"), [(False, "no route"), (True, "RuntimeError")])
def test_what_was_being_handled_is_a_reason_unless_it_is_hidden(hide: bool, reason: str) -> None:
    error = while_handling(OSError("no route"), RuntimeError(), hide=hide)
    assert reason_of(error) == reason
    assert first_reason_of(error) == reason


def test_a_cause_behind_what_is_hidden_is_none() -> None:
    hidden = after(OSError("no route"), ValueError("no address"))
    error = while_handling(hidden, RuntimeError("it failed"), hide=True)
    assert first_reason_of(error) == "it failed"
    assert first_reason_of(after(error, Empty())) == "it failed"
