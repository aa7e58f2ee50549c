"""The processes that the nannies of one cluster start, and nobody else's."""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

from distributed import Nanny
from distributed.core import Status
from distributed.utils import import_term

if TYPE_CHECKING:
    from distributed.nanny import WorkerProcess

__all__ = ["WorkerProcesses"]

# The first process of a fork server has no number before that has loaded its modules.
START_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 1.0


class WorkerProcesses:
    """Knows the worker processes of one cluster, and kills what is left of them."""

    def __init__(self) -> None:
        self._known: list[WorkerProcess] = []

    def noted_by(self, worker_class: Any) -> Any:
        """Give a class of nannies that has its processes noted here, and quiet.

        Parameters
        ----------
        worker_class : type or str
            A kind of nanny, or its full name. Any other kind of worker is given back as it is: it
            ends its own processes.
        """
        kind = import_term(worker_class) if isinstance(worker_class, str) else worker_class
        if not (inspect.isclass(kind) and issubclass(kind, Nanny)):
            return kind

        # A nanny forgets its process when it is closed, even if that could not end it.
        def note(nanny: Nanny, process: WorkerProcess | None) -> None:
            vars(nanny)["process"] = process
            if process is not None:
                self._known.append(process)

        noting = property(lambda nanny: vars(nanny)["process"], note)
        # Of the processes alone: given to the nanny, it would silence this process, too.
        level = property(lambda _: logging.CRITICAL, lambda *_: None)
        return type(kind.__name__, (kind,), {"process": noting, "silence_logs": level})

    def kill(self) -> None:
        """Kill those that are there, also those that a thread is just starting."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(map(_has_no_number, self._known)) and time.monotonic() < deadline:
            time.sleep(0.01)
        pids = {process.pid for known in self._known if (process := known.process)}
        left = [child for child in multiprocessing.active_children() if child.pid in pids]
        for child in left:
            child.kill()
        for child in left:
            child.join(timeout=KILL_TIMEOUT_S)


def _has_no_number(known: WorkerProcess) -> bool:
    process = known.process
    # One that could not be started will never have any.
    return process is not None and process.pid is None and known.status == Status.starting
