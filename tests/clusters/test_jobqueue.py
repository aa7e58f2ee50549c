"""The scripts of jobs, as dask-jobqueue itself makes them; test_slurm.py runs some."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Security

from dask_nn.clusters import jobqueue
from dask_nn.clusters.jobqueue import SYSTEMS, check_request, make_cluster
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

# What is asked for is in the words of each batch system.
WALLTIMES = dict.fromkeys(SYSTEMS, "02:30:00") | {"lsf": "02:30", "htcondor": None}
DIRECTIVES = {
    "slurm": ["-p fast", "--cpus-per-task=2", "--mem=4G", "-t 02:30:00", "--gres=gpu:1"],
    "pbs": ["-q fast", "select=1:ncpus=2:mem=4.00GB:ngpus=1", "walltime=02:30:00"],
    "lsf": ["-q fast", "-n 2", "-M 4295", "-W 02:30", '-gpu "num=1"'],
    "sge": ["-q fast", "h_rt=02:30:00", "-l gpu=1"],
    "oar": ["-q fast", "/nodes=1/gpu=1,walltime=02:30:00"],
    "htcondor": ["MY.DaskWorkerCores = 2", "request_gpus = 1", "MY.DaskWorkerMemory = 4294967296"],
}


def script(kind: str, folder: Path, **values: Any) -> str:
    request = ClusterRequest(kind=kind, **values)

    async def make() -> str:
        cluster = make_cluster(request, folder=folder, asynchronous=True)
        try:
            return cluster.job_script()
        finally:
            await cluster.close()

    return asyncio.run(make())


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_script_asks_for_what_was_asked(kind: str, tmp_path: Path) -> None:
    options = {} if kind == "htcondor" else {"queue": "fast"}
    if kind == "oar":
        # Which property says how much memory a core has differs between sites.
        options["memory_per_core_property_name"] = "not_applicable"
    text = script(
        kind,
        tmp_path,
        cores=2,
        memory="4 GiB",
        walltime=WALLTIMES[kind],
        gpus=1,
        env={"GREETING": "it's me"},
        options=options,
    )
    missing = [word for word in DIRECTIVES[kind] if word not in text]
    assert missing == [], text
    assert f"{sys.executable} -m distributed.cli.dask_worker" in text
    assert "--nthreads 2 --memory-limit 4.00GiB --nanny --death-timeout 60" in text
    assert "--preload torch" in text
    assert "export GREETING=" in text
    assert ("DASK_NN_JOB_END_TIME" in text) == (kind != "htcondor")


def test_the_end_of_a_job_is_that_of_slurm_or_else_start_and_walltime(tmp_path: Path) -> None:
    text = script("slurm", tmp_path, walltime="1-00:00:00")
    assert "${SLURM_JOB_END_TIME:-$(($(date +%s) + 86400))}" in text


def test_options_of_the_library_and_of_the_site_are_kept(tmp_path: Path) -> None:
    text = script(
        "slurm",
        tmp_path,
        gpus=1,
        options={
            "account": "physics",
            "job_extra_directives": ["--gres=gpu:a100:1", "--exclusive"],
            "worker_extra_args": ["--lifetime", "1h"],
            "job_script_prologue": ["module load cuda"],
        },
    )
    assert "#SBATCH -A physics" in text
    assert text.count("--gres") == 1
    assert "#SBATCH --exclusive" in text
    assert "--lifetime 1h --preload torch" in text
    assert "\nmodule load cuda\n" in text


def test_what_the_site_has_configured_holds_and_need_not_be_understood(tmp_path: Path) -> None:
    site = {"walltime": "UNLIMITED", "log-directory": str(tmp_path / "logs")}
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in site.items()}):
        text = script("slurm", tmp_path / "hidden")
    assert "#SBATCH -t UNLIMITED" in text
    assert f"#SBATCH -o {tmp_path / 'logs'}/" in text
    assert "DASK_NN_JOB_END_TIME" not in text


def test_a_folder_that_takes_no_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    request = ClusterRequest(kind="slurm", workers=1)
    with (
        pytest.raises(ConfigurationError, match=r"need a folder in /proc.*start where you"),
        jobqueue.open_cluster(request),
    ):
        pass


def test_a_thread_can_be_the_first_to_import_dask_jobqueue() -> None:
    code = (
        "import signal, threading\n"
        "from dask_nn.clusters.jobqueue_import import import_dask_jobqueue\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(import_dask_jobqueue('slurm')))\n"
        "thread.start(); thread.join()\n"
        "assert found[0].SLURMCluster\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_several_workers_can_share_a_job(tmp_path: Path) -> None:
    text = script("slurm", tmp_path, cores=2, memory="4 GiB", options={"processes": 3})
    assert "--cpus-per-task=6" in text
    assert "--mem=12G" in text
    assert "--nthreads 2 --memory-limit 4.00GiB --nworkers 3" in text


def test_keys_are_in_files_that_only_their_owner_reads(tmp_path: Path) -> None:
    security = Security.temporary()
    text = script("slurm", tmp_path, security=security)
    assert "PRIVATE KEY" not in text
    assert f"--tls-key {tmp_path}/worker_key" in text
    assert (tmp_path / "worker_key").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" in (tmp_path / "worker_key").read_text()


def test_a_host_without_the_batch_system_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match="submits jobs with oarsub, which is not on"):
        check_request(ClusterRequest(kind="oar"))


def test_htcondor_has_no_walltime() -> None:
    with pytest.raises(ConfigurationError, match="MaxRuntime"):
        check_request(ClusterRequest(kind="htcondor", walltime="1:00:00"))


def test_the_handler_of_ctrl_c_stays(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    script("slurm", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
