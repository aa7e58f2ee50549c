"""Job files on data of every format, from other folders, with code of the user's own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import nn

from dask_nn.checkpoints.serialization import load_weights, save_weights, weights_sha256
from dask_nn.cli.main import nn as commands

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = """
from torch import nn

def layers(hidden):
    return nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 4))
"""
NETWORK = """
import torch
from torch import nn
from {layers} import layers

class Network(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = layers(hidden)

    def forward(self, x):
        return self.net(x)
"""
JOB = """
[data]
train = "{train}"
{names}

[model]
module = "{module}:Network"

[loss]
name = "CrossEntropyLoss"

[optimizer]
name = "SGD"
lr = 0.1

[training]
epochs = 1
batch_size = 32
metrics = ["accuracy"]
shards = 2
threads_per_rank = 1

[cluster]
workers = 1

[output]
weights = "model.safetensors"
"""
BLOCK = 600


@pytest.fixture
def folder(tmp_path, blobs) -> Path:
    """Write the same rows in every format, and a module that imports another one."""
    folder = tmp_path / "job"
    folder.mkdir()
    names = [f"f{number}" for number in range(20)]
    table = pd.DataFrame(blobs.X, columns=names).assign(label=blobs.y)
    table.to_parquet(folder / "rows.parquet")
    (folder / "parts").mkdir()
    for number in range(6):
        table[number * 100 : number * 100 + 100].to_parquet(folder / "parts" / f"{number}.parquet")
    with h5py.File(folder / "rows.h5", "w") as file:
        file["X"], file["y"] = blobs.X, blobs.y
    group = zarr.open_group(folder / "rows.zarr", mode="w")
    group.create_array("X", data=blobs.X, chunks=(BLOCK, 20))
    group.create_array("y", data=blobs.y, chunks=(BLOCK,))
    np.save(folder / "X.npy", blobs.X)
    np.save(folder / "y.npy", blobs.y)
    np.save(folder / "few-y.npy", blobs.y[:200])
    np.save(folder / "few-X.npy", blobs.X[:200])
    token = tmp_path.name.replace("-", "_")
    (folder / f"layers_{token}.py").write_text(LAYERS)
    (folder / f"network_{token}.py").write_text(NETWORK.format(layers=f"layers_{token}"))
    return folder


def write_job(folder: Path, train: str, names: str, name: str = "job.toml") -> Path:
    module = next(folder.glob("network_*.py")).stem
    path = folder / name
    path.write_text(JOB.format(train=train, names=names, module=module))
    return path


def run(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


FORMATS = {
    "zarr": ("zarr:rows.zarr", 'x = "X"\ny = "y"'),
    "hdf5": ("hdf5:rows.h5", 'x = "X"\ny = "y"'),
    "npy": ("npy:X.npy", 'y = "npy:y.npy"'),
    "parquet": ("parquet:rows.parquet", 'y = "label"'),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_trains_tests_and_predicts(kind, folder, blobs, monkeypatch, tmp_path):
    """With relative paths, from another folder."""
    monkeypatch.chdir(tmp_path)
    train, names = FORMATS[kind]
    job = write_job(folder, train, names)
    result = run("train", job)
    assert result.exit_code == 0, result.output
    weights, _ = load_weights(folder / "model.safetensors")
    if kind != "zarr":
        shutil.move(folder / "model.safetensors", folder / "other.safetensors")
        assert run("train", write_job(folder, *FORMATS["zarr"], name="zarr.toml")).exit_code == 0
        expected, _ = load_weights(folder / "model.safetensors")
        assert weights_sha256(weights) == weights_sha256(expected)
    trained = ["--job", job, "--weights", folder / "model.safetensors"]
    prefix, place = train.split(":")
    url = f"{prefix}:{folder / place}"
    target = ["--y", f"npy:{folder / 'y.npy'}"] if kind == "npy" else []
    result = run("evaluate", *trained, "--data", url, *target)
    assert result.exit_code == 0, result.output
    accuracy = float(result.output.split("accuracy")[1])
    result = run("predict", *trained, "--input", url, "--output", f"zarr:{tmp_path / 'labels'}")
    assert result.exit_code == 0, result.output
    labels = zarr.open(tmp_path / "labels")[:]
    assert (labels == blobs.y).mean() == pytest.approx(accuracy, abs=1e-4)


def test_several_parquet_files_give_their_rows_in_order(folder, tmp_path, blobs):
    """Targets are left out of the features without x, and one array is x whatever its name."""
    job = write_job(folder, "parquet:parts/*.parquet", 'y = "label"')
    assert run("train", job).exit_code == 0
    trained = ["--job", job, "--weights", folder / "model.safetensors"]
    result = run(
        "predict", *trained, "--input", f"parquet:{folder / 'parts' / '*.parquet'}",
        "--output", f"parquet:{tmp_path / 'labels'}", "--raw",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    named = write_job(folder, "zarr:rows.zarr", 'x = "X"\ny = "y"', "named.toml")
    trained[1] = named
    result = run(
        "predict", *trained, "--input", folder / "X.npy", "--output", tmp_path / "raw", "--raw"
    )
    assert result.exit_code == 0, result.output
    result = run(
        "predict", *trained[:1], job, *trained[2:], "--input",
        f"parquet:{folder / 'parts' / '*.parquet'}", "--output", f"parquet:{tmp_path / 'classes'}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = pd.read_parquet(tmp_path / "labels").to_numpy()
    classes = pd.read_parquet(tmp_path / "classes")
    assert list(classes.columns) == ["prediction"]
    np.testing.assert_array_equal(classes.index, range(600))
    np.testing.assert_array_equal(classes["prediction"], found.argmax(axis=1))
    np.testing.assert_allclose(found, np.load(tmp_path / "raw"), rtol=1e-4, atol=1e-5)


def test_targets_by_url_are_those_of_their_own_data(folder):
    names = 'y = "npy:y.npy"\nvalidation = "npy:few-X.npy"'
    result = run("train", write_job(folder, "npy:X.npy", names))
    assert result.exit_code == 2
    assert 'validation_y = "..."' in result.output
    names += '\nvalidation_y = "npy:few-y.npy"'
    job = write_job(folder, "npy:X.npy", names)
    result = run("train", job)
    assert result.exit_code == 0, result.output
    assert "val_accuracy" in result.output
    trained = ["--job", job, "--weights", folder / "model.safetensors"]
    result = run("evaluate", *trained, "--data", f"npy:{folder / 'few-X.npy'}")
    assert result.exit_code == 2
    assert "say with --y" in result.output


def test_packages_installed_below_the_job_are_not_sent(folder, monkeypatch):
    """As in a project that has its virtual environment beside the job file."""
    installed = folder / "environment" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "installed_losses.py").write_text(
        "import threading\nfrom torch import nn\nlock = threading.Lock()\n"
        "class Loss(nn.CrossEntropyLoss):\n    def guard(self):\n        return lock\n"
    )
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{os.environ.get('PYTHONPATH', '')}")
    job = write_job(folder, *FORMATS["zarr"])
    job.write_text(job.read_text().replace('"CrossEntropyLoss"', '"installed_losses:Loss"'))
    result = run("train", job)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_predictions_never_replace_what_is_there(kind, folder, tmp_path):
    job = write_job(folder, *FORMATS["zarr"])
    assert run("train", job).exit_code == 0
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "part.0.parquet").write_text("precious")
    for place in (f"file://{tmp_path / 'kept'}", str(tmp_path / "kept")):
        result = run(
            "predict", "--job", job, "--weights", folder / "model.safetensors",
            "--input", f"zarr:{folder / 'rows.zarr'}", "--output", f"{kind}:{place}",
        )  # fmt: skip
        assert result.exit_code == 2
        assert "exists already" in result.output
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["part.0.parquet"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('train = "zarr:rows.zarr"', "train = 5", "train must be text, got 5"),
        ('y = "y"', "y = 3", "y must be text or an array, got 3"),
        ('y = "y"', "", "[data] needs y"),
        ('y = "y"', 'y = "y"\nmemory = "disk"', "memory must be"),
        ("shards = 2", "shards = 3", "batch_size must be divisible"),
        ("[output]", '[checkpoint]\nurl = "c"\nbest = "val_losss"\n[output]', "best must be"),
        ("[output]", "[recovery]\nhang_timeout = 3\n[output]", "did you mean 'hang_timeout_s'"),
        ("[output]", "[recovery]\nhang_timeout_s = -3\n[output]", "hang_timeout_s"),
    ],
)
def test_mistakes_are_named_before_a_cluster_starts(folder, monkeypatch, old, new, message):
    def start(*_, **__):
        pytest.fail("a cluster was started")

    monkeypatch.setattr("dask_nn.clusters.open.open_request", start)
    job = write_job(folder, *FORMATS["zarr"])
    assert old in job.read_text()
    job.write_text(job.read_text().replace(old, new))
    result = run("train", job)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_ctrl_c_in_predict_leaves_nothing_behind(folder, tmp_path, start):
    slow = folder / f"slow_{tmp_path.name.replace('-', '_')}.py"
    slow.write_text(
        "import time\nfrom pathlib import Path\nfrom torch import nn\n"
        "class Slow(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Linear(20, 4)\n    def forward(self, x):\n"
        "        if len(x) > 2:\n"
        f"            Path({str(tmp_path / 'begun')!r}).touch()\n"
        "            time.sleep(0.2)\n"
        "        return self.layer(x)\n"
    )
    torch.manual_seed(0)
    layer = nn.Linear(20, 4)
    state = {f"layer.{key}": value for key, value in layer.state_dict().items()}
    save_weights(folder / "slow.safetensors", state)
    store = zarr.create_array(folder / "many.zarr", shape=(6000, 20), chunks=(10, 20), dtype="f4")
    store[:] = 1
    job = write_job(folder, "zarr:many.zarr", 'y = "y"')
    job.write_text(job.read_text().replace(next(folder.glob("network_*.py")).stem, slow.stem))
    job.write_text(job.read_text().replace(":Network", ":Slow"))
    arguments = [
        "predict", "--job", job, "--weights", folder / "slow.safetensors",
        "--input", f"zarr:{folder / 'many.zarr'}", "--output", f"zarr:{tmp_path / 'found'}",
    ]  # fmt: skip
    with start(*arguments) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (tmp_path / "found").exists()
