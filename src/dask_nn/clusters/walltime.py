"""Walltimes as batch systems write them."""

from __future__ import annotations

from dask_nn.errors import ConfigurationError

__all__ = ["walltime_s"]

# What the fields between colons are, from their number: seconds per unit.
_HOURS = (3600, 60, 1)
_FIELDS: dict[str, dict[int, tuple[int, ...]]] = {
    "slurm": {1: (60,), 2: (60, 1), 3: _HOURS},
    "pbs": {1: (1,), 2: (60, 1), 3: _HOURS},
    "sge": {1: (1,), 3: _HOURS},
    "oar": {1: (3600,), 2: (3600, 60), 3: _HOURS},
    "lsf": {1: (60,), 2: (3600, 60)},
}
# Slurm alone has days: D-HH, D-HH:MM, D-HH:MM:SS.
_AFTER_DAYS = {1: (3600,), 2: (3600, 60), 3: _HOURS}
_EXAMPLES = {"lsf": "02:30 (hours and minutes)", "slurm": "02:30:00 or 1-12:00:00"}


def walltime_s(kind: str, text: str) -> int:
    """Give the seconds of a walltime.

    Parameters
    ----------
    kind : str
        The batch system; they differ: ``"90"`` is minutes for Slurm and LSF, seconds for PBS and
        SGE, hours for OAR.
    text : str
        Such as ``"02:30:00"``.

    Raises
    ------
    ConfigurationError
        If the batch system would not understand it.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    units = (_AFTER_DAYS if dash else _FIELDS[kind]).get(len(parts))
    numbers = [*parts, days] if dash else parts
    if units is None or (dash and kind != "slurm") or not all(map(str.isdecimal, numbers)):
        raise ConfigurationError(
            f"walltime must be written as {kind} does, such as {_EXAMPLES.get(kind, '02:30:00')}, "
            f"got {text!r}"
        )
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=True))
    return seconds + 86400 * int(days or 0)
