from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import dask_nn
from dask_nn.cli.main import nn
from dask_nn.errors import (
    ClusterError,
    CollectiveTimeout,
    ConfigurationError,
    DataError,
    NonFiniteLoss,
    SchedulerUnreachable,
    TrainingInterrupted,
    WorkerLost,
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """Add a command that raises what is put into the returned dict."""
    raised: dict[str, BaseException] = {}

    @click.command
    def fail() -> None:
        raise raised["error"]

    monkeypatch.setitem(nn.commands, "fail", fail)
    return raised


@pytest.mark.parametrize("command", [(), ("mnist",), ("evaluate",), ("predict",)])
def test_help_imports_neither_torch_nor_dask(command: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from dask_nn.cli.main import nn\n"
        f"nn({[*command, '--help']}, standalone_mode=False)\n"
        "assert not {'torch', 'distributed', 'sklearn'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert dask_nn.__version__ in CliRunner().invoke(nn, ["--version"]).output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("images: truncated"), 2),
        (ConfigurationError("unknown kind of cluster"), 2),
        (SchedulerUnreachable("no answer"), 1),
        (ClusterError("1 of 2 workers came"), 1),
        (NonFiniteLoss(float("nan"), 3, 0), 2),
        (WorkerLost("tcp://10.0.0.5:1", 1), 1),
        (CollectiveTimeout("rank 1 did not come"), 1),
    ],
)
def test_an_expected_error_is_its_text_on_stderr_and_an_exit_code(
    failing: dict[str, BaseException], error: BaseException, code: int
) -> None:
    failing["error"] = error
    result = CliRunner().invoke(nn, ["fail"])
    assert result.exit_code == code
    assert result.stderr == f"Error: {error}\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback(failing: dict[str, BaseException]) -> None:
    failing["error"] = DataError("images: truncated")
    result = CliRunner().invoke(nn, ["--debug", "fail"])
    assert result.exception is failing["error"]


def test_an_unexpected_error_keeps_its_traceback(failing: dict[str, BaseException]) -> None:
    failing["error"] = ZeroDivisionError("a mistake of ours")
    assert CliRunner().invoke(nn, ["fail"]).exception is failing["error"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "Interrupted.\n"),
        (KeyboardInterrupt("Interrupted; saved."), "Interrupted; saved.\n"),
        (TrainingInterrupted(None), f"{TrainingInterrupted(None)}\n"),
    ],
)
def test_an_interrupt_ends_with_code_130(
    failing: dict[str, BaseException], error: BaseException, text: str
) -> None:
    failing["error"] = error
    result = CliRunner().invoke(nn, ["fail"])
    assert result.exit_code == 130
    assert result.stderr == text


def test_dask_finds_the_commands_as_dask_nn() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dask", "nn", "--help"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "mnist" in done.stdout
