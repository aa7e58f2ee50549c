"""Which folders of a run's checkpoints need not stay: pure decisions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dask_nn.checkpoints.storage import REMOVED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

__all__ = ["Leftover", "is_checkpoint", "leftovers", "place", "retired"]

NAME = re.compile(r"epoch-\d{4,}-step-\d{9,}")
# What is being written, or never got its manifest: its name, who writes it, and a number.
UNFINISHED = re.compile(rf"\.({NAME.pattern})(?:\.([0-9A-Za-z]*)-(\d+))?\.[0-9a-f]+")
NUMBER = re.compile(r"\d+")


def is_checkpoint(folder: str) -> bool:
    """Tell whether a folder is named like a checkpoint."""
    return NAME.fullmatch(folder) is not None


def place(name: str) -> tuple[int, ...]:
    """Give epoch and steps in a name: epoch 10000 comes after epoch 9999."""
    epoch, steps = NUMBER.findall(name)[:2]
    return (int(epoch), int(steps))


def retired(
    names: Sequence[str],
    *,
    written: str,
    counted: Collection[str],
    keep: int,
    best: str | None,
) -> list[str]:
    """Give the checkpoints that need not stay.

    Parameters
    ----------
    names : sequence of str
        All that have a manifest, oldest first.
    written : str
        What has just been written: it stays in any case.
    counted : collection of str
        Those from which the run could go on. Others cannot take the place of one that could; they
        go once something newer is whole.
    keep : int
        How many of the newest stay.
    best : str or None
        Stays too.
    """
    usable = [name for name in names if name in counted]
    stays = {*usable[-keep:], written, best}
    return [
        name
        for name in names
        if name not in stays and (name in counted or place(name) < place(written))
    ]


@dataclass(frozen=True)
class Leftover:
    """A folder that is no checkpoint, or not yet.

    Parameters
    ----------
    name : str
        Of the folder.
    by_age : bool
        Whether somebody may be at work on it, so that only an old one may be removed.
    """

    name: str
    by_age: bool


def leftovers(
    folders: Iterable[str],
    names: Collection[str],
    *,
    written: str,
    run_id: str,
    generation: int,
    in_place: bool,
) -> list[Leftover]:
    """Give the folders that writers left behind which were interrupted, or may still be at work.

    Parameters
    ----------
    folders : iterable of str
        All there are.
    names : collection of str
        Those that are checkpoints.
    written : str
        What has just been written; what is newer is left alone.
    run_id, generation
        Who wrote it: gangs before it write nothing any more that would count.
    in_place : bool
        Whether checkpoints are written under their own names, as on object stores.
    """
    found = []
    for folder in folders:
        if folder.startswith(REMOVED):
            found.append(Leftover(folder, by_age=False))
        elif is_checkpoint(folder) and folder not in names and place(folder) < place(written):
            found.append(Leftover(folder, by_age=in_place))
        elif (parts := UNFINISHED.fullmatch(folder)) and place(parts[1]) < place(written):
            given_up = run_id != "" and parts[2] == run_id and int(parts[3]) <= generation
            found.append(Leftover(folder, by_age=not given_up))
    return found
