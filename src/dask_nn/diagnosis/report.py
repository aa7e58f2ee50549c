"""The findings: one line for each check."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Line", "Report", "Status", "fail", "ok", "some", "warn"]

Status = Literal["ok", "warn", "fail"]
LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one check found.

    Parameters
    ----------
    check : str
        Its name.
    status : {"ok", "warn", "fail"}
        ``fail``: training cannot work. ``warn``: it works, slower or not as one may expect.
    found : str
        What there is.
    remedy : str
        What to do about it; empty if nothing is to be done.
    details : dict
        The figures behind it, as JSON has them.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All lines, in the order in which they are best read.

    Parameters
    ----------
    scheduler : str
        The address that was looked at.
    lines : tuple of Line
        One for each check.
    """

    scheduler: str
    lines: tuple[Line, ...]

    @property
    def status(self) -> Status:
        """The worst of all lines."""
        found = {line.status for line in self.lines}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    def __getitem__(self, check: str) -> Line:
        """Give the line of a check by its name."""
        for line in self.lines:
            if line.check == check:
                return line
        message = f"there is no check {check!r}; there are {', '.join(x.check for x in self.lines)}"
        raise KeyError(message)

    def __str__(self) -> str:
        width = max((len(line.check) for line in self.lines), default=0)
        rows = []
        for line in self.lines:
            rows.append(f"{line.status:<4}  {line.check:<{width}}  {line.found}")
            if line.remedy:
                rows.append(f"{'':<{width + 8}}-> {line.remedy}")
        return "\n".join(rows)

    def as_json(self) -> str:
        """Give the report as JSON: scheduler, status, and lines with the fields of Line."""
        found = {
            "scheduler": self.scheduler,
            "status": self.status,
            "lines": [asdict(line) for line in self.lines],
        }
        return json.dumps(found, indent=2)


def ok(check: str, found: str, **details: Any) -> Line:
    """Say that nothing is to be done."""
    return Line(check=check, status="ok", found=found, details=details)


def warn(check: str, found: str, remedy: str, **details: Any) -> Line:
    """Say what should be mended."""
    return Line(check=check, status="warn", found=found, remedy=remedy, details=details)


def fail(check: str, found: str, remedy: str, **details: Any) -> Line:
    """Say what has to be mended before training can work."""
    return Line(check=check, status="fail", found=found, remedy=remedy, details=details)


def some(texts: Iterable[str], listed: int = LISTED) -> str:
    """Name the first few of many."""
    found: Sequence[str] = list(texts)
    shown = ", ".join(found[:listed])
    return shown if len(found) <= listed else f"{shown} and {len(found) - listed} more"
