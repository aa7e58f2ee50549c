"""Schedulers and workers as processes of their own, started as Dask's nannies start workers."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import time
from typing import TYPE_CHECKING, Any

import dask

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["START_S", "DaskProcess", "address_in"]

START_S = 60.0
END_S = 30.0


def address_in(file: Path, *, timeout_s: float = START_S) -> str:
    """Give the address in a scheduler's file once that is there, and whole.

    Raises
    ------
    TimeoutError
        If it is not after so many seconds.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # It is there before it is written.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads(file.read_text(encoding="utf-8"))["address"])
        time.sleep(0.05)
    message = f"the scheduler did not write {file} within {timeout_s:g} s"
    raise TimeoutError(message)


class DaskProcess:
    """A ``dask scheduler`` or ``dask worker``; what it prints is lost.

    Parameters
    ----------
    role : str
        ``"scheduler"`` or ``"worker"``.
    *arguments : str
        Of the command.
    namespace : str, optional
        Name of the network namespace that it is in; needs root.
    method : str, optional
        How it is started; by default by ``distributed.worker.multiprocessing-method``. A process
        that is forked from a server of forks has all modules that were imported there.
    """

    def __init__(
        self,
        role: str,
        *arguments: str,
        namespace: str | None = None,
        method: str | None = None,
    ) -> None:
        method = method or dask.config.get("distributed.worker.multiprocessing-method")
        context: Any = multiprocessing.get_context(method)
        self._process = context.Process(target=_run, args=(role, arguments, namespace))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return bool(self._process.is_alive())

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, timeout: float = END_S) -> None:
        """Wait until it has ended.

        Raises
        ------
        TimeoutError
            If it has not after so many seconds.
        """
        self._process.join(timeout)
        if self.is_alive:
            message = f"process {self.pid} is still there after {timeout:g} s"
            raise TimeoutError(message)


def _run(role: str, arguments: tuple[str, ...], namespace: str | None) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    if namespace is not None:
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        os.setns(handle, os.CLONE_NEWNET)
        os.close(handle)
    command = importlib.import_module(f"distributed.cli.dask_{role}").main
    command(arguments)
