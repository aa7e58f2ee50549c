"""What an error says, in one text."""

from __future__ import annotations

__all__ = ["reason_of"]


def reason_of(error: BaseException) -> str:
    """Give what an error says, of the errors behind it if it says nothing itself."""
    seen = str(error).strip()
    cause = error.__cause__ or error.__context__
    # A deadline that is over cancels what it waits for: that is no reason.
    if not seen and isinstance(cause, Exception):
        return reason_of(cause)
    return seen or type(error).__name__
