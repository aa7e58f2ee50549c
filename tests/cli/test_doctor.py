from __future__ import annotations

import json
import sys

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


def test_data_that_cannot_be_read_is_a_failure_among_the_other_lines(cluster2, tmp_path):
    arguments = ("--scheduler", cluster2.scheduler_address, "--data", f"zarr:{tmp_path}/none")
    result = doctor(*arguments, "--json")
    assert result.exit_code == 1, result.output
    assert result.stderr == ""
    lines = lines_of(result)
    assert lines["blocks"]["status"] == "fail"
    assert lines["blocks"]["found"] == f"zarr:{tmp_path}/none: there is no such folder"
    assert "dask-nn train reads" in lines["blocks"]["remedy"]
    assert [check for check, line in lines.items() if line["status"] == "fail"] == ["blocks"]
    assert {"bits", "packages", "speed", "placement"} < set(lines)
    result = doctor(*arguments, columns=200)
    assert result.exit_code == 1
    assert "there is no such folder" in result.stdout
    assert "This cluster cannot train." in result.stdout


def test_data_and_cluster_may_both_be_missing(tmp_path):
    result = doctor(
        *("--scheduler", "tcp://127.0.0.1:9", "--timeout", 1, "--start-timeout", 1, "--json"),
        *("--data", f"npy:{tmp_path}/none.npy"),
    )
    assert result.exit_code == 1
    lines = lines_of(result)
    assert {check: line["status"] for check, line in lines.items()} == {
        "scheduler": "fail",
        "blocks": "fail",
    }
    assert "No such file" in lines["blocks"]["found"]


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("url", ["csv:rows.csv", "rows.npy", "npy:"])
def test_a_url_that_is_none_is_bad_input(url):
    result = doctor("--data", url, "--json")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "slrum"), "did you mean 'slurm'?"),
        (("--cluster", "local", "--cluster-option", "nonsense=1"), "no option 'nonsense'"),
        (("--cluster", "local", "--memory", "lots"), "memory must be a size"),
        (("--cluster", "local", "--walltime", "1:00"), "walltime is a limit of batch systems"),
        (("--cluster", "ssh", "--workers", 1), "needs hosts"),
        (("--cluster", "aws", "--cluster-option", "service=s3"), "service must be"),
        (("--cluster", "address", "--workers", 1), "needs address"),
    ],
)
def test_wrong_options_are_bad_input(arguments, message):
    result = doctor("--json", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_options_that_turn_out_wrong_at_the_start_are_bad_input_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)  # as if it were not installed
    result = doctor("--json", "--workers", 1, "--tls")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "security=True makes certificates with the package cryptography" in result.stderr


def started_in_vain(*arguments):
    result = doctor("--json", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr == ""
    [line] = json.loads(result.stdout)["lines"]
    assert (line["check"], line["status"]) == ("cluster", "fail")
    return line


def test_a_local_cluster_that_does_not_start():
    line = started_in_vain("--cluster", "local", "--workers", 1, "--start-timeout", 0.01)
    assert "not there within 0.01 s" in line["found"]
    assert "processes of this Python on this machine" in line["remedy"]
    assert "batch system" not in line["remedy"]


def test_hosts_that_do_not_let_us_in():
    pytest.importorskip("asyncssh")
    line = started_in_vain(
        *("--cluster", "ssh", "--cluster-option", 'hosts=["127.0.0.1", "127.0.0.1"]'),
        *("--cluster-option", "connect_options={port = 9}"),
    )
    assert "SSH does not let us in" in line["found"]
    assert line["remedy"].startswith("log in to each host with ssh")
    assert "batch system" not in line["remedy"]


def test_workers_that_nobody_starts_at_an_address(cluster2):
    address = cluster2.scheduler_address
    line = started_in_vain(
        *("--cluster", "address", "--cluster-option", f"address={address}"),
        *("--workers", 9, "--start-timeout", 1),
    )
    assert f"2 of 9 workers were at {address}" in line["found"]
    assert "start more workers there (dask worker ADDRESS)" in line["remedy"]


def test_nobody_at_the_address_is_a_report_too():
    result = doctor("--scheduler", "tcp://127.0.0.1:9", "--timeout", "1", "--json")
    assert result.exit_code == 1
    (line,) = json.loads(result.output)["lines"]
    assert line["check"] == "scheduler"
    assert line["status"] == "fail"
    assert "Connection refused" in line["found"]
    assert line["remedy"]
