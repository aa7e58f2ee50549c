from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest

from dask_nn.diagnosis import links, probe
from dask_nn.diagnosis.facts import ProcessFacts
from dask_nn.diagnosis.probe import describe_process, in_thread
from dask_nn.diagnosis.shipping import Shipped

BARE = """
import asyncio, pickle, sys
function = pickle.load(sys.stdin.buffer)
found = asyncio.run(function(("json", "no_such_package"), ("dask_nn.training.rank_main",)))
sys.stdout.buffer.write(pickle.dumps(found))
"""


def test_a_python_without_any_package_describes_itself():
    """Without site-packages there is no dask-nn, Dask, NumPy, PyTorch or psutil."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE],
        input=pickle.dumps(Shipped(probe, "describe_process")),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    facts = ProcessFacts(**pickle.loads(done.stdout))
    assert set(facts.versions) == {"python"}
    assert facts.problems["no_such_package"] == "is not installed"
    assert "No module named 'dask_nn'" in facts.problems["dask_nn.training.rank_main"]
    assert facts.cores >= 1


@pytest.mark.parametrize("module", [probe, links])
def test_what_is_shipped_has_the_syntax_of_older_pythons(module):
    import ast
    import inspect

    ast.parse(inspect.getsource(module), feature_version=(3, 9))


def test_facts_of_this_process():
    facts = ProcessFacts(**asyncio.run(describe_process()))
    assert facts.process == os.getpid()
    assert facts.libc
    assert facts.processor
    assert facts.used_bytes < facts.host_memory_bytes
    assert any("127.0.0.1" in interface["addresses"] for interface in facts.interfaces)


def test_slurm_is_asked_where_it_does_not_say_when_a_job_ends(tmp_path, monkeypatch):
    """Slurm before 22.05 sets no SLURM_JOB_END_TIME."""
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "-h -j 7 -o %e" ] && echo 2030-01-02T03:04:05\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    facts = ProcessFacts(**asyncio.run(describe_process()))
    ends = time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1))
    assert facts.ends_at_s["SLURM_JOB_END_TIME"] == ends


def test_a_job_of_this_package_says_when_it_ends_where_its_batch_system_does_not(monkeypatch):
    monkeypatch.setenv("DASK_NN_JOB_END_TIME", "2000000000")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    facts = ProcessFacts(**asyncio.run(describe_process()))
    assert facts.ends_at_s["DASK_NN_JOB_END_TIME"] == 2_000_000_000
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    facts = ProcessFacts(**asyncio.run(describe_process()))
    assert "DASK_NN_JOB_END_TIME" not in facts.ends_at_s


def test_the_lifetime_of_a_worker_counts_from_its_start():
    class Server:
        lifetime = 3600.0

    facts = ProcessFacts(**asyncio.run(describe_process(dask_worker=Server())))
    assert 0 < facts.ends_at_s["--lifetime"] - time.time() < 3600


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for():
    def wrong() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        asyncio.run(in_thread(wrong))


def test_a_port_that_is_closed_says_why():
    assert asyncio.run(links.refusal("tcp://127.0.0.1:9", 2)) == "Connection refused"


def test_a_port_that_accepts_is_not_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        assert not asyncio.run(links.refusal(f"tcp://{host}:{port}", 5))
