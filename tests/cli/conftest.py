"""A folder of a few digits in MNIST's format, and the command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dask_nn.examples.mnist.digits import make_digits
from dask_nn.examples.mnist.idx import write_idx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 2,000 + 500 digits as the four IDX files."""
    folder = tmp_path_factory.mktemp("data")
    digits = make_digits(train=2_000, test=500)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = getattr(digits, f"{part}_images").reshape(-1, 28, 28)
        labels = getattr(digits, f"{part}_labels").astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the command finds room for temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture
def start(tmp_path: Path, temporary: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``dask-nn`` with arguments in an empty folder and a process group of its own."""

    def popen(*arguments: Any, verbose: bool = False) -> subprocess.Popen[str]:
        options = ["-X", "importtime"] if verbose else []
        return subprocess.Popen(
            [sys.executable, *options, "-m", "dask_nn.cli.main", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return popen


@pytest.fixture
def run(
    start: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``dask-nn`` with arguments to its end."""

    def complete(*arguments: Any) -> subprocess.CompletedProcess[str]:
        with start(*arguments) as process:
            out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return complete
