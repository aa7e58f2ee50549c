"""Whether a value can stand in a resource of Kubernetes, which says so late and of the field."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from typing import Any

from dask.utils import parse_bytes

from dask_nn.errors import ConfigurationError

__all__ = ["check_labels", "check_name", "check_number", "check_tolerations", "cpu", "memory"]

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
CORES = re.compile(r"[0-9]+(\.[0-9]+)?m?")


def check_name(field: str, name: Any, longest: int = 63) -> None:
    """Check the name of a resource.

    Raises
    ------
    ConfigurationError
        If it is none.
    """
    if not (isinstance(name, str) and NAME.fullmatch(name) and len(name) <= longest):
        raise ConfigurationError(
            f"{field} must be small letters, digits and dashes, at most {longest}, with no dash at "
            f"either end; got {name!r}"
        )


def check_number(field: str, number: Any) -> None:
    """Check a number of seconds.

    Raises
    ------
    ConfigurationError
        If it is none, or negative.
    """
    integral = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not integral or number < 0:
        raise ConfigurationError(f"{field} must be a whole number of seconds, got {number!r}")


def check_labels(field: str, labels: Any) -> None:
    """Check labels of a node.

    Raises
    ------
    ConfigurationError
        If they are not texts by name.
    """
    pairs = labels.items() if isinstance(labels, Mapping) else [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ConfigurationError(
            f'{field} must be a mapping of texts, such as {{"pool": "gpu"}}, got {labels!r}'
        )


def check_tolerations(tolerations: Any) -> None:
    """Check tolerations.

    Raises
    ------
    ConfigurationError
        If they are no list of mappings.
    """
    if not isinstance(tolerations, list | tuple) or not all(
        isinstance(each, Mapping) for each in tolerations
    ):
        raise ConfigurationError(
            'tolerations must be a list of mappings, such as [{"key": "nvidia.com/gpu", '
            f'"operator": "Exists"}}], got {tolerations!r}'
        )


def cpu(field: str, cores: Any) -> str:
    """Write an amount of processors: a number, or a text as Kubernetes has it (``"500m"``).

    Raises
    ------
    ConfigurationError
        If it is none, or not positive.
    """
    is_number = isinstance(cores, numbers.Real) and not isinstance(cores, bool)
    text = f"{float(cores):g}" if is_number else cores
    if not isinstance(text, str) or not CORES.fullmatch(text) or not float(text.rstrip("m")):
        raise ConfigurationError(
            f'{field} must be a positive number, or a text such as "500m", got {cores!r}'
        )
    return text


def memory(field: str, size: Any) -> str:
    """Write a size: a text as Dask or as Kubernetes has it (``"2 GiB"``, ``"2Gi"``), or bytes.

    Raises
    ------
    ConfigurationError
        If it is none, or not positive.
    """
    try:
        size_bytes = 0 if isinstance(size, bool) else int(parse_bytes(size))
    except (TypeError, ValueError, AttributeError):
        size_bytes = 0
    if size_bytes <= 0:
        raise ConfigurationError(
            f'{field} must be a size with its unit, such as "2 GiB", got {size!r}'
        )
    return str(size_bytes)
