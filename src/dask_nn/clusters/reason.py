"""What an error says, in one text."""

from __future__ import annotations

__all__ = ["reason_of"]


def reason_of(error: BaseException) -> str:
    """Give what an error says, of the errors behind it if it says nothing itself."""
    seen = str(error).strip()
    cause = error.__cause__ or error.__context__
    if not seen and cause is not None:
        return reason_of(cause)
    return seen or type(error).__name__
