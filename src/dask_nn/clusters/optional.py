"""Packages that only one kind of cluster needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dask_nn.errors import ConfigurationError

__all__ = ["import_optional"]


def import_optional(module: str, extra: str, kind: str) -> Any:
    """Import a package, or say how to install it.

    Parameters
    ----------
    module : str
        The module to import.
    extra : str
        The extra of dask-nn that installs it.
    kind : str
        The kind of cluster that needs it.

    Raises
    ------
    ConfigurationError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigurationError(
            f"cluster kind {kind!r} needs the package {package}, which cannot be imported "
            f"({error}); install it with: pip install 'dask-nn[{extra}]'"
        ) from error
