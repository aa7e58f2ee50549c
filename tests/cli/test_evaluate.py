from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from dask_nn.checkpoints.serialization import save_weights
from dask_nn.cli.main import nn
from dask_nn.examples.mnist.data import load
from dask_nn.examples.mnist.model import make_model
from dask_nn.examples.mnist.sequential import best_loop

if TYPE_CHECKING:
    from pathlib import Path

    from distributed import LocalCluster


@pytest.fixture
def weights(tmp_path: Path, data_dir: Path) -> tuple[Path, float]:
    model = make_model(32)
    result = best_loop(model, load(data_dir).digits, epochs=2, lr=0.1, threads=(1,))
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict())
    return path, result.accuracy


def test_it_prints_the_accuracy_on_the_test_images(
    weights: tuple[Path, float], data_dir: Path
) -> None:
    path, accuracy = weights
    arguments = ["evaluate", "--weights", path, "--data", "mnist", "--data-dir", data_dir]
    result = CliRunner().invoke(nn, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert f"accuracy  {accuracy:.4f}\n" in result.stdout
    assert "500 test images" in result.stdout


def test_on_a_cluster_it_prints_the_same(
    weights: tuple[Path, float], data_dir: Path, cluster2: LocalCluster
) -> None:
    arguments = ["evaluate", "--weights", weights[0], "--data-dir", data_dir]
    here = CliRunner().invoke(nn, list(map(str, arguments)))
    arguments += ["--scheduler", cluster2.scheduler_address]
    there = CliRunner().invoke(nn, list(map(str, arguments)))
    assert there.exit_code == 0, there.output
    assert there.stdout == here.stdout


@pytest.mark.usefixtures("no_cluster")
def test_a_missing_file_of_weights_is_one_line_before_a_cluster_starts(tmp_path: Path) -> None:
    arguments = ["evaluate", "--weights", str(tmp_path / "none"), "--workers", "2"]
    result = CliRunner().invoke(nn, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path / 'none'}: no such file")
    assert result.stderr.count("\n") == 1
