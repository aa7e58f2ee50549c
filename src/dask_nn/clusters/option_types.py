"""What the options of a kind of cluster have to be, and how a text stands for a list.

The libraries look at an option late, or not at all: a text given for a list is cut into letters,
and ``"false"`` is true.
"""

from __future__ import annotations

import numbers
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dask.utils import parse_bytes, parse_timedelta

from dask_nn.errors import ConfigurationError

__all__ = [
    "ADDRESS",
    "ARGUMENTS",
    "COUNT",
    "LINES",
    "MAPPING",
    "MEMORY_LIMIT",
    "NUMBER",
    "OF_SCHEDULERS",
    "OF_WORKERS",
    "PATH",
    "PORT",
    "SECONDS",
    "SWITCH",
    "TAGS",
    "TEXT",
    "TEXTS",
    "WHOLE",
    "WORD",
    "OptionType",
    "arguments",
    "check_types",
    "lines",
    "mapping",
    "one_or_each",
]


@dataclass(frozen=True, kw_only=True)
class OptionType:
    """What an option has to be.

    Parameters
    ----------
    expected : str
        In words: ``"a whole number"``.
    accepts : callable
        ``accepts(value) -> bool``.
    keys : mapping of str to OptionType
        What those of a mapping's values have to be that are known; others may be anything.
    listed : bool, default False
        Whether a list may stand for it, with one for each host.
    """

    expected: str
    accepts: Callable[[Any], bool]
    keys: Mapping[str, OptionType] = field(default_factory=dict)
    listed: bool = False


def check_types(
    options: Mapping[str, Any], types: Mapping[str, OptionType], *, prefix: str = ""
) -> None:
    """Refuse options of the wrong type.

    Parameters
    ----------
    options : mapping
        What was given. None is the library's own default.
    types : mapping of str to OptionType
        What is known of options; those without a type are handed on as they are.
    prefix : str, default ""
        What stands before the names in an error.

    Raises
    ------
    ConfigurationError
        Names the option, what was got and what was expected.

    Examples
    --------
    >>> check_types({"processes": "false"}, {"processes": SWITCH})
    Traceback (most recent call last):
    dask_nn.errors.ConfigurationError: processes must be True or False (in TOML: true or false), ...
    """
    for name, value in options.items():
        known = types.get(name)
        if known is None or value is None:
            continue
        for each in value if known.listed and isinstance(value, list | tuple) else [value]:
            if not known.accepts(each):
                raise ConfigurationError(f"{prefix}{name} must be {known.expected}, got {value!r}")
            if known.keys:
                check_types(each, known.keys, prefix=f"{prefix}{name}: ")


def lines(value: Any) -> list[Any]:
    """Give the lines of an option of type `LINES` or `TEXTS`: a text may stand for its list."""
    return value.splitlines() if isinstance(value, str) else list(value or ())


def arguments(value: Any) -> list[str]:
    """Give the arguments of an option of type `ARGUMENTS`, a text split as a shell does."""
    return shlex.split(value) if isinstance(value, str) else [str(part) for part in value or ()]


def mapping(keys: Mapping[str, OptionType]) -> OptionType:
    """Give the type of a mapping of which some values are known."""
    return replace(MAPPING, keys=keys)


def one_or_each(one: OptionType) -> OptionType:
    """Give the type of an option that is one for all hosts, or a list with one for each."""
    expected = f"{one.expected}, or a list with one for each host"
    return replace(one, expected=expected, listed=True)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and isinstance(value, numbers.Integral) and int(value) >= 0


def _is_word(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set | frozenset) and all(map(_is_text, value))
    )


def _are_arguments(value: Any) -> bool:
    if isinstance(value, str):
        try:
            shlex.split(value)
        except ValueError:
            return False
        return True
    return isinstance(value, list | tuple) and all(map(_is_word, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


def _is_memory_limit(value: Any) -> bool:
    if not isinstance(value, str):
        return _is_number(value) and value >= 0
    try:
        return value == "auto" or parse_bytes(value) >= 0
    except (ValueError, OverflowError):
        return False


def _is_time(value: Any) -> bool:
    if not isinstance(value, str):
        return _is_number(value) and value >= 0
    try:
        return parse_timedelta(value) >= 0
    except (ValueError, LookupError):
        return False


def _is_port(value: Any) -> bool:
    text = str(value) if _is_whole(value) else value
    return isinstance(text, str) and text.isdecimal() and int(text) < 65536


TEXT = OptionType(expected="a text", accepts=_is_text)
# A number that is written into a script does no harm: accounts may be numbers.
WORD = OptionType(expected="a text", accepts=_is_word)
PATH = OptionType(expected="a path", accepts=lambda value: isinstance(value, str | os.PathLike))
SWITCH = OptionType(
    expected="True or False (in TOML: true or false), without quotes",
    accepts=lambda value: isinstance(value, bool),
)
COUNT = OptionType(
    expected="a whole number, at least 1", accepts=lambda value: _is_whole(value) and value > 0
)
NUMBER = OptionType(
    expected="a number, not below 0", accepts=lambda value: _is_number(value) and value >= 0
)
# Without a negative sign: 0 often is the library's own choice.
WHOLE = OptionType(expected="a whole number", accepts=_is_whole)
PORT = OptionType(expected="the number of a port", accepts=_is_port)
SECONDS = OptionType(expected='a time such as "60s", or a number of seconds', accepts=_is_time)
MEMORY_LIMIT = OptionType(
    expected='a size such as "4 GB", a number, or "auto"', accepts=_is_memory_limit
)
TAGS = OptionType(
    expected='texts by name, such as {"owner": "me"} (in TOML: {owner = "me"})',
    accepts=lambda value: _is_mapping(value) and all(map(_is_text, value.values())),
)
TEXTS = OptionType(expected="a text or a list of texts", accepts=_are_texts)
LINES = OptionType(expected="a list of lines, or one line", accepts=_are_texts)
ARGUMENTS = OptionType(
    expected="a list of arguments, or a text as on a command line", accepts=_are_arguments
)
MAPPING = OptionType(
    expected='a mapping with names, such as {"key": "value"} (in TOML: {key = "value"})',
    accepts=_is_mapping,
)

ADDRESS = OptionType(
    expected='an address such as ":8787", or the number of a port',
    accepts=lambda value: _is_text(value) or _is_port(value),
)

_OF_SERVERS = {
    "dashboard": SWITCH,
    "dashboard_address": ADDRESS,
    "host": TEXT,
    "interface": TEXT,
    "preload": TEXTS,
    "protocol": TEXT,
}
# Arguments of Dask's own schedulers and workers, whatever starts them.
OF_SCHEDULERS = mapping({**_OF_SERVERS, "idle_timeout": SECONDS, "port": PORT})
OF_WORKERS = mapping(
    {
        **_OF_SERVERS,
        "death_timeout": SECONDS,
        "env": MAPPING,
        "local_directory": PATH,
        "memory_limit": MEMORY_LIMIT,
        "nthreads": WHOLE,
        "resources": MAPPING,
    }
)
