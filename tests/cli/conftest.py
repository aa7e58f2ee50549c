"""The command in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from dask_nn.clusters import open as open_module

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


RUN_S = 280


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the command finds room for temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which a cluster is started."""

    def opened(_: Any) -> NoReturn:
        pytest.fail("a cluster was started")

    monkeypatch.setattr(open_module, "open_request", opened)


def hear_interrupts() -> None:
    """Let a process hear Ctrl-C, although the tests may run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command(subprocess.Popen[str]):
    """A process that ends, with its group, where the test that started it fails."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            with contextlib.suppress(ProcessLookupError):  # the test has heard of its end
                os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(kind, *rest)


@pytest.fixture
def start(tmp_path: Path, temporary: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``dask-nn`` with arguments in an empty folder and a process group of its own."""

    def popen(*arguments: Any, verbose: bool = False) -> subprocess.Popen[str]:
        options = ["-X", "importtime"] if verbose else []
        return Command(
            [sys.executable, *options, "-m", "dask_nn.cli.main", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )

    return popen


@pytest.fixture
def run(
    start: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``dask-nn`` with arguments to its end."""

    def complete(*arguments: Any) -> subprocess.CompletedProcess[str]:
        with start(*arguments) as process:
            out, err = process.communicate(timeout=RUN_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return complete
