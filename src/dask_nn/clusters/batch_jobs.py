"""The jobs of a batch system: which were submitted, what became of them, and their end."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.core import Status

from dask_nn.clusters.slurm_queue import has_ended, is_ending, job_states, waits_for_ever
from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BatchJobs"]

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
GONE = "gone"


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
    _submitted: set[str] = field(default_factory=set, init=False)
    _missed: set[str] = field(default_factory=set, init=False)

    def recorded(self, job_class: type[Any]) -> type[Any]:
        """Give a class of jobs that are noted here while they may exist."""
        noted, submitted = self.jobs, self._submitted

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
                submitted.add(self.job_id)

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
        if self.kind != "slurm":
            return
        # What scancel itself says is lost in dask-jobqueue.
        try:
            states = await job_states(self._submitted)
        except ClusterError as error:
            logger.warning(
                "it is not known whether jobs %s have ended: %s", ", ".join(self._submitted), error
            )
            return
        remain = [number for number, state in states.items() if not is_ending(state)]
        if remain:
            logger.warning(
                "jobs that are still in the queue: %s; end them with: scancel %s",
                ", ".join(f"{number} {states[number]}" for number in remain),
                " ".join(remain),
            )

    async def explain(self, cluster: Any) -> str:
        """Say what the batch system and the jobs' logs tell of workers that did not come."""
        lines = [f"jobs submitted: {', '.join(self.jobs) or 'none'}"]
        if self.kind == "slurm":
            try:
                states = await job_states(self.jobs)
                lines += [f"job {job}: {state}" for job, state in states.items()]
            except ClusterError as error:
                lines.append(str(error))
        lines += self._tails(self.jobs)
        return "\n".join(lines)

    async def hopeless(self, cluster: Any) -> str:
        """Say why no more workers will come: a job ended before its worker was there."""
        arrived = {str(worker["name"]) for worker in cluster.scheduler_info["workers"].values()}
        lost = {
            number: state
            for number, state in (await self._states()).items()
            if str(self.jobs[number].name) not in arrived
            and (state == GONE or has_ended(state) or waits_for_ever(state))
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

    async def lost(self, cluster: Any) -> set[Any]:
        """Give the names of workers whose jobs have ended."""
        states = await self._states()
        return {
            self.jobs[number].name
            for number, state in states.items()
            if state == GONE or has_ended(state)
        }

    async def _states(self) -> dict[str, str]:
        """Give the states of the jobs of which something is known.

        A job is gone that two answers in a row do not name: the queue may not know it yet. No
        answer says nothing of any job.
        """
        if self.kind != "slurm":
            return {}
        asked = set(self.jobs)
        try:
            states = await job_states(asked)
        except ClusterError as error:
            logger.debug("%s", error)
            return {}
        missing = asked - set(states)
        gone = dict.fromkeys(missing & self._missed, GONE)
        self._missed = missing
        # A job may have been ended meanwhile.
        return {number: state for number, state in (states | gone).items() if number in self.jobs}

    def _tails(self, numbers: Iterable[str]) -> list[str]:
        """Give the ends of the logs of some jobs; one if all say the same."""
        tails: dict[str, str] = {}
        paths = sorted(self.log_folder.glob("*"))
        for number in numbers:
            # A folder that stays holds logs of other jobs, too: 133 is not 33.
            named = re.compile(rf"(?<!\d){re.escape(number)}(?!\d)")
            for path in filter(lambda path: named.search(path.name), paths):
                lines = [line for line in _text(path).splitlines() if line.strip()]
                if lines:
                    tails.setdefault("\n".join(lines[-LOG_TAIL_LINES:]), path.name)
        return [f"{name} ends with:\n{tail}" for tail, name in list(tails.items())[:3]]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
