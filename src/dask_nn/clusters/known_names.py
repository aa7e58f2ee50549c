"""What to say of a name that does not exist."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["nearest", "refuse_unknown"]


def nearest(name: str, known: Collection[str], *, listed: bool = True) -> str:
    """Give the end of an error about a name: the one that was probably meant, or all.

    Parameters
    ----------
    name : str
        What was given.
    known : collection of str
        What exists.
    listed : bool, default True
        Whether all are listed if none is near.

    Returns
    -------
    str
        Begins with ``"; "``, or is empty.

    Examples
    --------
    >>> nearest("qeue", ["queue", "account"])
    "; did you mean 'queue'?"
    >>> nearest("user", ["queue", "account"])
    '; known are queue, account'
    """
    if near := get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if listed else ""


def refuse_unknown(
    names: Iterable[str], known: Collection[str], *, of: str, listed: bool = True
) -> None:
    """Refuse an option that does not exist.

    Parameters
    ----------
    names : iterable of str
        What was given.
    known : collection of str
        What exists, in the order in which it is listed.
    of : str
        Whose options these are, with a verb: ``"SSHCluster has"``.
    listed : bool, default True
        As for `nearest`.

    Raises
    ------
    ConfigurationError
        With the nearest option that exists.
    """
    for name in names:
        if name not in known:
            hint = nearest(name, known, listed=listed)
            raise ConfigurationError(f"{of} no option {name!r}{hint}")
