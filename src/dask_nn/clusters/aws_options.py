"""Options that are handed to dask-cloudprovider: those that its classes know, and no others."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.known_names import refuse_unknown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["check_known"]

# Chosen by what is asked of every kind of cluster.
OF_THE_REQUEST = {"security", "env_vars", "environment", "n_workers", "asynchronous", "loop"}


def check_known(
    options: Mapping[str, Any], kind: type[Any], own: Collection[str], taken: Collection[str]
) -> None:
    """Refuse an option that a class of dask-cloudprovider does not have.

    Parameters
    ----------
    options : mapping
        What was given.
    kind : type
        The class.
    own : collection of str
        Options of this package beside them.
    taken : collection of str
        Options of the class that the request's own words replace.

    Raises
    ------
    ConfigurationError
        With the nearest option that exists.
    """
    known = set(own)
    for part in kind.__mro__:
        if part.__module__.startswith("dask_cloudprovider"):
            known |= set(inspect.signature(part).parameters)
    known -= {"self", "args", "kwargs", *OF_THE_REQUEST, *taken} - set(own)
    refuse_unknown(options, sorted(known), of=f"{kind.__name__} has")
