"""What an error says, in one text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["first_reason_of", "reason_of"]


def reason_of(error: BaseException) -> str:
    """Give what an error says, or else what one behind it does."""
    texts = (str(each).strip() for each in _chain(error))
    return next(filter(None, texts), type(error).__name__)


def first_reason_of(error: BaseException) -> str:
    """Give what the first of a chain of errors says: those after it say that something failed."""
    telling = [each for each in _chain(error) if str(each).strip() or type(each) is TimeoutError]
    return reason_of(telling[-1] if telling else error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Give an error and those behind it, the last first."""
    behind: BaseException | None = error
    while behind is not None:
        yield behind
        # "raise ... from None" says that what was being handled is no reason.
        handled = None if behind.__suppress_context__ else behind.__context__
        behind = behind.__cause__ or handled
        # A deadline that is over cancels what it waits for: neither that nor what the waiting was
        # busy with is a reason.
        if not isinstance(behind, Exception):
            return
