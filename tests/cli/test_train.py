from __future__ import annotations

import json
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import nn

from dask_nn.checkpoints.serialization import load_weights, save_weights, weights_sha256
from dask_nn.cli.cluster_options import SYNONYMS
from dask_nn.cli.job_file import read_job
from dask_nn.cli.job_keys import EXAMPLE, SECTIONS
from dask_nn.cli.main import nn as commands
from dask_nn.cli.train import _options as options_of
from dask_nn.errors import ConfigurationError

MODEL = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 4))

    def forward(self, x):
        return self.net(x)

def scale(x):
    return x * 0.5
"""

JOB = """
[data]
train = "zarr:blobs.zarr"
x = "X"
y = "y"
validation = "zarr:blobs.zarr"
memory = "{memory}"

[model]
module = "{module}:Network"
arguments = {{ hidden = 12 }}
transform = "{module}:scale"

[loss]
name = "CrossEntropyLoss"

[optimizer]
name = "SGD"
lr = 0.1

[schedule]
name = "StepLR"
step_size = 1

[training]
epochs = 2
batch_size = 32
metrics = ["accuracy"]
shards = 2
threads_per_rank = 1

[cluster]
workers = 2

[checkpoint]
url = "checkpoints-{memory}"

[output]
weights = "{memory}.safetensors"
history = "{memory}.json"
"""


@pytest.fixture
def folder(tmp_path, blobs):
    group = zarr.open_group(tmp_path / "blobs.zarr", mode="w")
    group.create_array("X", data=blobs.X, chunks=(100, 20))
    group.create_array("y", data=blobs.y, chunks=(600,))
    # A module is imported once: its name must not be that of another test's.
    module = f"network_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(MODEL)
    for memory in ("resident", "stream"):
        (tmp_path / f"{memory}.toml").write_text(JOB.format(memory=memory, module=module))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_a_job_is_trained_evaluated_and_run(folder, blobs):
    for memory in ("resident", "stream"):
        result = run("train", folder / f"{memory}.toml")
        assert result.exit_code == 0, result.output
        assert "Wrote" in result.output
    assert "streaming 51.56 kiB in 6 blocks: as asked" in result.output
    weights = [
        load_weights(folder / f"{memory}.safetensors")[0] for memory in ("resident", "stream")
    ]
    assert weights_sha256(weights[0]) == weights_sha256(weights[1])
    history = json.loads((folder / "stream.json").read_text())
    assert len(history) == 2

    job = ["--job", folder / "stream.toml", "--weights", folder / "stream.safetensors"]
    result = run("evaluate", *job, "--data", f"zarr:{folder / 'blobs.zarr'}")
    assert result.exit_code == 0, result.output
    accuracy = float(result.output.split("accuracy")[1])
    assert accuracy == pytest.approx(history[-1]["val_accuracy"], abs=1e-4)

    found = {}
    for kind in ("zarr", "parquet", "npy"):
        target = f"{kind}:{folder / 'labels'}.{kind}"
        result = run(
            "predict", *job, "--input", f"zarr:{folder / 'blobs.zarr'}", "--output", target
        )
        assert result.exit_code == 0, result.output
    found["zarr"] = zarr.open(folder / "labels.zarr")[:]
    found["parquet"] = pd.read_parquet(folder / "labels.parquet").to_numpy()[:, 0]
    found["npy"] = np.load(folder / "labels.npy")
    for labels in found.values():
        assert (labels == blobs.y).mean() == pytest.approx(accuracy, abs=1e-3)

    again = run("predict", *job, "--input", f"zarr:{folder / 'blobs.zarr'}", "--output", target)
    assert again.exit_code == 0
    target = f"zarr:{folder / 'labels.zarr'}"
    again = run("predict", *job, "--input", f"zarr:{folder / 'blobs.zarr'}", "--output", target)
    assert again.exit_code == 2
    assert "exists already" in again.output

    result = run("train", folder / "stream.toml", "--resume")
    assert result.exit_code == 0, result.output
    assert "resumed from" in result.output


def test_the_example_has_every_key_and_can_be_read(tmp_path):
    path = tmp_path / "job.toml"
    assert run("train", "--example", path).exit_code == 0
    assert read_job(path).training["epochs"] == 5
    active = "\n".join(
        line.removeprefix("# ") if "=" in line.split("  #")[0] or line.startswith("# [") else line
        for line in EXAMPLE.splitlines()
        if "scheduler" not in line and not line.startswith(("# A ", "# Names", "# zarr"))
    )
    tables = tomllib.loads(active)
    for section, keys in SECTIONS.items():
        missing = set(keys) - set(tables[section]) - {"scheduler"} - set(SYNONYMS)
        assert not missing, section
    again = run("train", "--example", path)
    assert again.exit_code == 2
    assert "exists" in again.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size", "batchsize", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("[training]", "[trainning]", "unknown table 'trainning'; did you mean 'training'?"),
        ('"SGD"', '"SDG"', "torch.optim has no 'SDG'; did you mean 'SGD'?"),
        ('"CrossEntropyLoss"', '"CrossEntropy"', "did you mean 'CrossEntropyLoss'?"),
        (":Network", ":Netwrk", "has no 'Netwrk'; did you mean 'Network'?"),
        ('module = "network', 'module = "notwork', "cannot be imported"),
        ('y = "y"', 'y = "labels"', "there is no array 'labels'"),
        ("blobs.zarr", "none.zarr", "no such folder"),
        ("train =", "#", "[data] needs train"),
        ("lr = 0.1", "lr = ", "is no TOML file"),
        ("lr = 0.1", 'lr = "much"', "[optimizer] SGD:"),
        ("lr = 0.1", "lrr = 0.1", "[optimizer] SGD:"),
        ("step_size", "stepsize", "[schedule] StepLR:"),
        ("hidden = 12", "hiden = 12", "hiden"),
        ("shards = 2", 'device = "gpu"', "device must be one of 'cpu', 'cuda'"),
        ("[cluster]", '[cluster]\nscheduler = "tcp://127.0.0.1:1"', "give either"),
        (
            "[cluster]",
            '[recovery]\nhang_timeout_s = "10"\n[cluster]',
            "[recovery] hang_timeout_s must be a",
        ),
        ('weights = "resident', 'weights = "nowhere/x', "is no folder"),
    ],
)
def test_mistakes_are_named_before_any_work(folder, old, new, message):
    text = (folder / "resident.toml").read_text()
    assert old in text
    (folder / "bad.toml").write_text(text.replace(old, new))
    result = run("train", folder / "bad.toml")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("bad.toml") <= 1
    assert "dask-nn on" not in result.output, "a cluster was started for it"
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("table", "key", "device"),
    [("cluster", "gpus = 1", "cuda"), ("training", 'device = "cuda"', "cuda"), ("", "", "cpu")],
)
def test_workers_with_gpus_train_on_them(folder, table, key, device):
    text = (folder / "resident.toml").read_text()
    (folder / "job.toml").write_text(text.replace(f"[{table}]", f"[{table}]\n{key}"))
    assert options_of(read_job(folder / "job.toml"))["device"] == device


def test_gpus_are_refused_where_the_engine_has_no_use_for_them(folder):
    text = (folder / "resident.toml").read_text()
    text = text.replace("[training]", '[training]\nengine = "graph"')
    slurm = '[cluster]\nkind = "slurm"\ncores = 1\nmemory = "1 GB"\ngpus = 1'
    (folder / "job.toml").write_text(text.replace("[cluster]", slurm))
    result = run("train", folder / "job.toml")
    assert result.exit_code == 2
    assert "computes on the CPU alone" in result.output
    assert "dask-nn on" not in result.output, "a cluster was started for it"


def test_a_device_that_no_worker_has_is_said(folder):
    text = (folder / "resident.toml").read_text()
    (folder / "job.toml").write_text(text.replace("[training]", '[training]\ndevice = "cuda"'))
    result = run("train", folder / "job.toml")
    assert result.exit_code != 0
    assert "start workers that see a CUDA device" in result.output


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        read_job(tmp_path / "none.toml")


@pytest.mark.parametrize("kind", ["zarr", "npy"])
def test_no_room_for_predictions_is_said_and_leaves_nothing(kind, folder, tiny_disk):
    torch.manual_seed(0)
    layers = {"net.0": nn.Linear(20, 12), "net.2": nn.Linear(12, 4)}
    state = {f"{name}.{key}": value for name, layer in layers.items()
             for key, value in layer.state_dict().items()}  # fmt: skip
    save_weights(folder / "any.safetensors", state)
    X = np.random.default_rng(0).random((400_000, 20), dtype="f4")
    np.save(folder / "X.npy", X)
    job = (folder / "resident.toml").read_text().replace('x = "X"', "")
    (folder / "large.toml").write_text(job)
    result = run(
        "predict", "--job", folder / "large.toml", "--weights", folder / "any.safetensors",
        "--input", folder / "X.npy", "--output", f"{kind}:{tiny_disk / 'labels'}", "--raw",
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "No space left on device" in result.output
    assert not (tiny_disk / "labels").exists()
