from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from dask_nn.checkpoints.serialization import load_weights, weights_sha256
from dask_nn.cli.main import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]
    Start = Callable[..., subprocess.Popen[str]]

# Whole jobs, with sequential epochs; beside other tests each takes four times as long.
pytestmark = pytest.mark.timeout(300)


def group_is_gone(pid: int) -> bool:
    """Tell whether no process of the group is left; Python's tracker ends a moment after it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def run_here(*arguments: object) -> Result:
    """Run the command in this process, whose imports are done."""
    return CliRunner().invoke(nn, ["mnist", *map(str, arguments)])


def refusal(*arguments: object, code: int = 2) -> str:
    result = run_here(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_whole_job(run: Run, data_dir: Path, tmp_path: Path, temporary: Path) -> None:
    done = run(
        *("mnist", "--data-dir", data_dir, "--epochs", 2, "--batch-size", 100, "--lr", 0.1),
        *("--workers", 2, "--report", "out", "--json", "result.json"),
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert "Dashboard: http://" in done.stdout
    assert done.stdout.count("epoch 2/2  loss ") == 3
    assert "times as fast as the guide's loop" in done.stdout

    values = json.loads((tmp_path / "result.json").read_text())
    assert values["dataset"] == "mnist"
    assert (values["train_samples"], values["test_samples"]) == (2_000, 500)
    assert values["parallel"]["engine"] == "spmd"
    assert values["parallel"]["num_workers"] == 2
    assert values["parallel"]["accuracy"] > 0.5
    weights, metadata = load_weights(tmp_path / "out" / "weights.safetensors")
    assert weights_sha256(weights) == values["parallel"]["weights_sha256"]
    assert metadata["hidden_size"] == "128"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"weights.safetensors", "curves.png", "misread.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "result.json"}
    assert not list(temporary.glob("dask*"))


def test_a_saved_run_is_resumed_with_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    def train(epochs: int, *more: object) -> str:
        done = run_here(
            "--data-dir", data_dir, "--workers", 2, "--no-sequential", "--epochs", epochs,
            "--report", tmp_path, "--json", tmp_path / "numbers.json", *more,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        return str(numbers["parallel"]["weights_sha256"])

    saved = ("--checkpoint", tmp_path / "run")
    train(1, *saved)
    assert "already has checkpoints" in refusal(
        "--data-dir", data_dir, "--report", tmp_path, *saved
    )
    assert train(2, *saved, "--resume") == train(2)
    shorter = refusal("--data-dir", data_dir, "--epochs", 1, *saved, "--resume")
    assert "has come to epoch 2 already" in shorter


def test_the_graph_engine_alone_on_a_running_cluster(
    cluster2: object, data_dir: Path, tmp_path: Path
) -> None:
    done = run_here(
        *("--data-dir", data_dir, "--epochs", 1, "--batch-size", 500, "--engine", "graph"),
        *("--no-sequential", "--scheduler", cluster2.scheduler_address),
        *("--report", tmp_path, "--json", tmp_path / "r.json"),
    )
    assert done.stderr == ""
    assert done.exit_code == 0
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["sequential"] is values["speedup"] is None
    assert values["parallel"]["engine"] == "graph"
    assert len(cluster2.scheduler_info["workers"]) == 2


def test_an_interrupt_while_it_trains_saves_what_is_trained(
    start: Start, data_dir: Path, tmp_path: Path, temporary: Path
) -> None:
    with start(
        *("mnist", "--data-dir", data_dir, "--epochs", 100_000, "--batch-size", 100),
        *("--no-sequential", "--workers", 2),
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    path = Path("report") / "weights.safetensors"
    assert err == f"Interrupted; what is trained so far is in {path}.\n"
    assert "Traceback" not in out
    weights, _ = load_weights(tmp_path / path)
    assert weights["fc1.weight"].shape == (128, 784)
    assert group_is_gone(process.pid)
    assert not list(temporary.glob("dask*"))


def test_an_interrupt_of_the_sequential_loop_saves_its_weights(
    start: Start, data_dir: Path, tmp_path: Path
) -> None:
    with start("mnist", "--data-dir", data_dir, "--epochs", 100_000) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("Interrupted; what is trained so far is in")
    load_weights(tmp_path / "report" / "weights.safetensors")
    assert group_is_gone(process.pid)


def test_an_interrupt_of_the_imports_ends_at_once(start: Start, tmp_path: Path) -> None:
    """The log of imports says when the first big one is under way."""
    with start("mnist", verbose=True) as process:
        for line in process.stderr:
            if line.rstrip().endswith("torch.version"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Interrupted.\n" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_explodes_keeps_the_last_good_weights(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("--data-dir", data_dir, "--lr", 1e30, "--no-sequential", "--workers", 1)
    assert done.exit_code == 2
    assert "Error: the loss became" in done.stderr
    assert "at step" in done.stderr
    assert "--lr is 1e+30" in done.stderr
    assert done.stderr.count("\n") == 1
    weights, _ = load_weights(tmp_path / "report" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", 0),
        ("--workers", 0),
        ("--batch-size", 0),
        ("--hidden", -1),
        ("--hidden", 10**12),
        ("--shards", 0),
        ("--engine", "steam"),
        ("--lr", "much"),
        ("--seed", -1),
        ("--seed", 10**30),
        ("--scheduler", "tcp://127.0.0.1:1", "--workers", 2),
    ],
)
def test_an_option_that_cannot_be_is_refused(arguments: tuple[object, ...]) -> None:
    assert str(arguments[0]) in refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 2_001), "batch_size must be at most the number of samples"),
        (("--batch-size", 100, "--shards", 3), "batch_size=99 or 102 would do"),
        (("--lr", "nan"), "lr must be a positive number"),
    ],
)
def test_a_job_that_cannot_work_is_one_line(
    arguments: tuple[object, ...], message: str, data_dir: Path, tmp_path: Path
) -> None:
    error = refusal("--data-dir", data_dir, "--report", tmp_path, *arguments)
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_folder_of_data_is_one_line(tmp_path: Path) -> None:
    error = refusal("--data-dir", tmp_path / "absent", "--report", tmp_path / "report")
    assert not (tmp_path / "report").exists()
    assert error.startswith(f"Error: {tmp_path / 'absent'} (from --data-dir): no such folder")
    assert error.count("\n") == 1


def test_a_truncated_file_is_named(data_dir: Path, tmp_path: Path) -> None:
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    error = refusal("--data-dir", tmp_path, "--report", tmp_path / "out")
    assert f"Error: {path}: truncated" in error
    assert "expected 1568016 bytes, got 1567916" in error


def test_a_report_that_cannot_be_written_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = ("--data-dir", data_dir)
    assert "--report" in refusal(*data, "--report", tmp_path / "file" / "folder")
    error = refusal(*data, "--report", tmp_path, "--json", tmp_path / "absent" / "r.json")
    assert "--json" in error


def test_an_unreachable_scheduler_is_reported_within_ten_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        error = refusal("--scheduler", address, "--report", tmp_path, code=1)
        assert time.monotonic() - start < 10
    assert f"no Dask scheduler answered at '{address}'" in error
