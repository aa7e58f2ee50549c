from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dask_nn.checkpoints.serialization import save_weights
from dask_nn.cli.main import nn
from dask_nn.examples.mnist.model import make_model, scale

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 784), np.uint8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_weights(path, make_model(16).state_dict())
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "images.npy"


def invoke(weights: Path, source: Path, target: Path, *options: str) -> Result:
    arguments = ["--weights", weights, "--input", source, "--output", target, *options]
    return CliRunner().invoke(nn, ["predict", *map(str, arguments)])


@pytest.mark.parametrize("shape", [(50, 784), (50, 28, 28), (50, 1, 28, 28)])
def test_labels_are_those_of_the_network(
    weights: Path, source: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    np.save(source, IMAGES.reshape(shape))
    # The name is used as it is given, without a suffix added.
    target = tmp_path / "labels"
    result = invoke(weights, source, target)
    assert result.exit_code == 0, result.output
    expected = make_model(16)(scale(torch.from_numpy(IMAGES))).argmax(1).numpy()
    read = np.load(target)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, expected)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, source.name, "labels"}


def test_probabilities_sum_to_one(weights: Path, source: Path, tmp_path: Path) -> None:
    np.save(source, IMAGES)
    assert invoke(weights, source, tmp_path / "proba.npy", "--proba").exit_code == 0
    read = np.load(tmp_path / "proba.npy")
    assert read.shape == (50, 10)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), "got float32 of shape (50, 784)"),
        (IMAGES[:, :100], "got uint8 of shape (50, 100)"),
        (IMAGES[0], "got uint8 of shape (784,)"),
        (IMAGES[:0], "expected at least one image"),
        (np.array(3, np.uint8), "got uint8 of shape ()"),
    ],
)
def test_other_arrays_are_refused(
    weights: Path, source: Path, tmp_path: Path, images: np.ndarray, message: str
) -> None:
    np.save(source, images)
    result = invoke(weights, source, tmp_path / "labels.npy")
    assert result.exit_code == 2
    assert str(source) in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "labels.npy").exists()


@pytest.mark.parametrize("content", [b"", b"no array", b"PK\x03\x04 no archive"])
def test_a_file_that_is_no_array_is_refused(
    weights: Path, source: Path, tmp_path: Path, content: bytes
) -> None:
    source.write_bytes(content)
    result = invoke(weights, source, tmp_path / "labels.npy")
    assert result.exit_code == 2
    assert str(source) in result.stderr


def test_an_archive_of_arrays_is_refused(weights: Path, source: Path, tmp_path: Path) -> None:
    with source.open("wb") as file:
        np.savez(file, images=IMAGES)
    result = invoke(weights, source, tmp_path / "labels.npy")
    assert result.exit_code == 2
    assert "expected a whole NumPy file (.npy)" in result.stderr
    assert "pickle" not in result.stderr


@pytest.mark.usefixtures("no_cluster")
def test_weights_and_data_are_looked_at_before_a_cluster_starts(
    weights: Path, source: Path, tmp_path: Path
) -> None:
    asked = (tmp_path / "labels.npy", "--workers", "2")
    assert "images.npy: no such file" in invoke(weights, source, *asked).stderr
    np.save(source, IMAGES)
    assert "none: no such file" in invoke(tmp_path / "none", source, *asked).stderr
    assert (
        "dashbord_address"
        in invoke(
            tmp_path / "none", source, *asked, "--cluster-option", "dashbord_address=:0"
        ).stderr
    )


def test_missing_files_and_folders_are_named(weights: Path, source: Path, tmp_path: Path) -> None:
    assert "images.npy: no such file" in invoke(weights, source, tmp_path / "labels.npy").stderr
    np.save(source, IMAGES)
    result = invoke(weights, source, tmp_path / "absent" / "labels.npy")
    assert result.exit_code == 2
    assert "its folder does not exist" in result.stderr
    result = invoke(weights, source, tmp_path)
    assert result.exit_code == 2
    assert "is a directory" in result.stderr
    result = invoke(tmp_path / "none.safetensors", source, tmp_path / "labels.npy")
    assert result.exit_code == 2
    assert "none.safetensors: no such file" in result.stderr


def test_weights_of_another_network_are_refused(source: Path, tmp_path: Path) -> None:
    np.save(source, IMAGES)
    path = tmp_path / "other.safetensors"
    save_weights(path, torch.nn.Linear(3, 3).state_dict())
    result = invoke(path, source, tmp_path / "labels.npy")
    assert result.exit_code == 2
    assert "not those of the network" in result.stderr
