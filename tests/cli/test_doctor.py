from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dask_nn.cli.main import nn


def doctor(*arguments, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(nn, ["doctor", *map(str, arguments)])


def lines_of(result):
    return {line["check"]: line for line in json.loads(result.stdout)["lines"]}


def test_a_cluster_of_its_own_is_in_order():
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {line["check"]: line["status"] for line in found["lines"]}["bits"] == "ok"
    assert all(line["status"] != "fail" for line in found["lines"])


@pytest.fixture
def _no_card(monkeypatch):
    """Let workers be promised a card that this machine does not have."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")


@pytest.mark.usefixtures("_no_card")
def test_a_gpu_that_was_asked_for_and_is_not_seen_is_a_failure():
    result = doctor("--json", "--workers", 1, "--gpus", 1)
    assert result.exit_code == 1, result.output
    line = lines_of(result)["GPU"]
    assert line["status"] == "fail"
    assert line["found"].startswith("asked for, but no worker sees one: tcp://127.0.0.1:")
    for word in ("driver", "container", "built with CUDA", "batch system"):
        assert word in line["remedy"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the workers of this machine see a card")
def test_a_running_cluster_is_told_too_what_its_workers_shall_see(cluster2):
    result = doctor("--scheduler", cluster2.scheduler_address, "--json", "--gpus", 1)
    assert result.exit_code == 1, result.output
    assert lines_of(result)["GPU"]["status"] == "fail"
    result = doctor("--scheduler", cluster2.scheduler_address, "--json", "--gpus", 0)
    assert lines_of(result)["GPU"]["status"] == "ok"


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits(cluster2, columns):
    result = doctor("--scheduler", cluster2.scheduler_address, columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= columns
    assert "This cluster can train" in lines[-1]
    assert any(line.split()[:3] == ["✓", "ok", "scheduler"] for line in lines)


def test_data_and_what_workers_need_to_read_it(cluster2, tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((1_000, 4), np.float32))
    address = cluster2.scheduler_address
    result = doctor("--scheduler", address, "--data", f"npy:{path}", "--json")
    assert result.exit_code == 0, result.output
    (blocks,) = [x for x in json.loads(result.output)["lines"] if x["check"] == "blocks"]
    assert blocks["details"]["lengths"] == [1_000]
    assert "float32[4]" in blocks["found"]


def test_data_that_is_not_there_is_bad_input(tmp_path):
    result = doctor("--scheduler", "tcp://127.0.0.1:9", "--data", f"npy:{tmp_path}/none.npy")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")


def test_nobody_at_the_address_is_a_report_too():
    result = doctor("--scheduler", "tcp://127.0.0.1:9", "--timeout", "1", "--json")
    assert result.exit_code == 1
    (line,) = json.loads(result.output)["lines"]
    assert line["check"] == "scheduler"
    assert line["status"] == "fail"
    assert "Connection refused" in line["found"]
    assert line["remedy"]
