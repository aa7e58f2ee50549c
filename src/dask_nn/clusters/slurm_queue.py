"""What Slurm's queue tells of jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["has_ended", "is_ending", "job_states", "waits_for_ever"]

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
# Why a job waits that will wait for ever: it asks for what the partition or account cannot give.
NEVER = {
    "BadConstraints",
    "InvalidAccount",
    "InvalidQOS",
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
}
COMMAND_TIMEOUT_S = 15.0


async def job_states(numbers: Collection[str]) -> dict[str, str]:
    """Ask for the states of jobs; those that the queue has forgotten are missing.

    Returns
    -------
    dict
        From job number to a state with its reason, such as ``"PENDING (Resources)"``.

    Raises
    ------
    ClusterError
        If the queue gave no answer.
    """
    if not numbers:
        return {}
    squeue = shutil.which("squeue")
    if squeue is None:
        raise ClusterError("there is no squeue on this host's PATH")
    # Of one user: a busy controller answers this soonest. Named jobs would be an error once one of
    # them is forgotten.
    user = f"--user={os.getuid()}"
    process = await asyncio.create_subprocess_exec(
        *(squeue, "--noheader", "--states=all", "--format=%i|%T|%r", user),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise ClusterError(f"squeue did not answer within {COMMAND_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise ClusterError(f"squeue failed: {err.decode(errors='replace').strip()}")
    rows = (line.split("|", 2) for line in out.decode().splitlines() if line.count("|") >= 2)
    return {
        number: state if reason in {"None", ""} else f"{state} ({reason})"
        for number, state, reason in rows
        if number in numbers
    }


def has_ended(state: str) -> bool:
    """Tell whether a job in this state will do nothing more."""
    return state.partition(" ")[0] in ENDED


def is_ending(state: str) -> bool:
    """Tell whether a job in this state has ended, or will without further doing."""
    return has_ended(state) or state.partition(" ")[0] == "COMPLETING"


def waits_for_ever(state: str) -> bool:
    """Tell whether a job in this state asks for what it cannot get."""
    word, _, reason = state.partition(" ")
    return word == "PENDING" and reason.strip("()") in NEVER
