from __future__ import annotations

import subprocess
import sys

import pytest

TORCHLESS = [
    "dask_nn",
    "dask_nn.cli.main",
    "dask_nn.collectives.tree",
    "dask_nn.config",
    # Functions of these run on the scheduler.
    "dask_nn.controller.leases",
    "dask_nn.controller.scheduler_side",
    "dask_nn.data.plan",
    "dask_nn.diagnosis.doctor",
    "dask_nn.errors",
    "dask_nn.events",
]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", TORCHLESS)
def test_a_scheduler_without_torch_can_import(module):
    """A None in sys.modules makes every import of that name fail, as if it were not installed."""
    done = run(f"import sys; sys.modules['torch'] = None; import {module}")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch():
    done = run("import dask_nn, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_without_metrics_no_process_imports_torchmetrics():
    """It takes most of a second, and 80 MB in each."""
    done = run(
        "import dask_nn.training.rank_main, dask_nn.evaluation, sys; from dask_nn import train;"
        "print('torchmetrics' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("options", [["--help"], ["--version"]])
def test_the_command_line_answers_without_torch(options):
    done = run(
        "import sys; sys.modules['torch'] = None; "
        f"sys.argv = ['dask-nn', *{options!r}]; "
        "from dask_nn.cli.main import main; sys.exit(main())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_importing_starts_no_thread():
    done = run("import dask_nn, threading; print(threading.active_count())")
    assert done.stdout.strip() == "1", done.stderr


def test_dask_finds_the_command_line():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="dask_cli", name="nn")
    assert entry.value == "dask_nn.cli.main:nn"
