"""The jobs of a batch system: which were submitted, what became of them, and their end."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.core import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BatchJobs"]

SLURM_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}
# Why a job waits that will wait for ever: it asks for what the partition or account cannot give.
SLURM_NEVER = {
    "BadConstraints",
    "InvalidAccount",
    "InvalidQOS",
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
}
LOG_TAIL_LINES = 15
COMMAND_TIMEOUT_S = 15.0


@dataclass(kw_only=True)
class BatchJobs:
    """The jobs that one cluster submitted and that were not ended yet.

    Parameters
    ----------
    kind : str
        The batch system.
    log_folder : Path
        Where the jobs write their output.
    jobs : dict
        From job number to the Job of dask-jobqueue.
    """

    kind: str
    log_folder: Path
    jobs: dict[str, Any] = field(default_factory=dict)

    def recorded(self, job_class: type[Any]) -> type[Any]:
        """Give a class of jobs that are noted here while they may exist."""
        noted = self.jobs

        class RecordedJob(job_class):  # type: ignore[misc]
            async def start(self) -> None:
                # A job whose submission is given up half-way would have no number to end it by.
                await asyncio.shield(self._submit())

            async def _submit(self) -> None:
                try:
                    await super().start()
                except BaseException:
                    self.status = Status.failed
                    raise
                noted[self.job_id] = self

            async def close(self) -> None:
                await super().close()
                noted.pop(self.job_id, None)
                # Dask checks on closing that all are; dask-jobqueue itself does not say so.
                self.status = Status.closed

        return RecordedJob

    async def end_all(self) -> None:
        """End what is left, such as jobs that were submitted while the cluster closed."""
        left = list(self.jobs.values())
        await asyncio.gather(*(job.close() for job in left), return_exceptions=True)

    async def explain(self, cluster: Any) -> str:
        """Say what the batch system and the jobs' logs tell of workers that did not come."""
        lines = [f"jobs submitted: {', '.join(self.jobs) or 'none'}"]
        if self.kind == "slurm":
            states = await self._slurm_states()
            lines += [f"job {job}: {state}" for job, state in states.items()]
        lines += self._tails(self.jobs)
        return "\n".join(lines)

    async def hopeless(self, cluster: Any) -> str:
        """Say why no more workers will come: a job ended before its worker was there."""
        if self.kind != "slurm" or not self.jobs:
            return ""
        states = await self._slurm_states()
        arrived = {str(worker["name"]) for worker in cluster.scheduler_info["workers"].values()}
        lost = {
            number: states.get(number, "gone")
            for number, job in self.jobs.items()
            if str(job.name) not in arrived and _is_lost(states.get(number))
        }
        if not lost:
            return ""
        return "\n".join(
            [
                "these jobs will bring no worker:",
                *(f"job {number}: {state}" for number, state in lost.items()),
                *self._tails(lost),
            ]
        )

    async def _slurm_states(self) -> dict[str, str]:
        """Ask for the states of all jobs; those that the queue has forgotten are missing."""
        squeue = shutil.which("squeue")
        if squeue is None or not self.jobs:
            return {}
        process = await asyncio.create_subprocess_exec(
            squeue,
            "--noheader",
            "--states=all",
            "--format=%i|%T|%r",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, _ = await process.communicate()
        rows = (line.split("|", 2) for line in out.decode().splitlines() if line.count("|") >= 2)
        return {
            number: state if reason in {"None", ""} else f"{state} ({reason})"
            for number, state, reason in rows
            if number in self.jobs
        }

    def _tails(self, numbers: Iterable[str]) -> list[str]:
        """Give the ends of the logs of some jobs; one if all say the same."""
        tails: dict[str, str] = {}
        for number in numbers:
            for path in sorted(self.log_folder.glob(f"*{number}*")):
                lines = [line for line in _text(path).splitlines() if line.strip()]
                if lines:
                    tails.setdefault("\n".join(lines[-LOG_TAIL_LINES:]), path.name)
        return [f"{name} ends with:\n{tail}" for tail, name in list(tails.items())[:3]]


def _is_lost(state: str | None) -> bool:
    if state is None:
        return True
    word, _, reason = state.partition(" ")
    return word in SLURM_ENDED or (word == "PENDING" and reason.strip("()") in SLURM_NEVER)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
