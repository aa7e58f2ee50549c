"""The scripts of jobs, as dask-jobqueue itself makes them; test_slurm.py runs some."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import dask
import pytest
from distributed import Security

from dask_nn.clusters import jobqueue
from dask_nn.clusters.jobqueue import SYSTEMS, check_request, make_cluster
from dask_nn.clusters.jobqueue_options import FORMER_NAMES
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

# What is asked for is in the words of each batch system.
WALLTIMES = dict.fromkeys(SYSTEMS, "02:30:00") | {"lsf": "02:30", "htcondor": None}
DIRECTIVES = {
    "slurm": ["-p fast", "--cpus-per-task=2", "--mem=4G", "-t 02:30:00", "--gres=gpu:1"],
    "pbs": ["-q fast", "select=1:ncpus=2:mem=4096MB:ngpus=1", "walltime=02:30:00"],
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


@pytest.mark.parametrize("memory", ["16 GB", "4 GiB", "1500 MB", "100 kB"])
def test_pbs_is_asked_for_as_much_memory_with_a_gpu_as_without(memory: str, tmp_path: Path) -> None:
    plain, with_gpu = (
        re.search(r"-l (select=\S+)", script("pbs", tmp_path, memory=memory, gpus=gpus))
        for gpus in (0, 1)
    )
    assert plain is not None
    assert with_gpu is not None
    assert re.fullmatch(r"select=1:ncpus=1:mem=\d+[kMG]?B", plain[1])
    assert with_gpu[1] == f"{plain[1]}:ngpus=1"


# What a site may need beside the request for a GPU, and how a user may ask for one.
BESIDE: list[tuple[str, Any]] = [
    ("slurm", ["-C gpu"]),
    ("slurm", ["--partition=gpu", "--gpu-bind=closest", "--mem-per-gpu=8G"]),
    ("slurm", ["--exclude=gres01"]),
    ("pbs", ["-q gpu", "-v ngpus=1"]),
    ("pbs", ["-l host=gpu01"]),
    ("lsf", ["-q gpu", '-R "select[ngpus>0]"', "-m gpuhosts"]),
    ("sge", ["-q gpu.q", "-l hostname=gpu*", "-l gpu_type=V100"]),
    ("oar", ["-p gpu_model='A100'", "-t gpu"]),
    ("htcondor", {"require_gpus": "Capability >= 8.0"}),
]
OWN: list[tuple[str, Any]] = [
    ("slurm", ["--gres=gpu:a100:1"]),
    ("slurm", ["-C big --gres tmpfs:20G,gpu:1"]),
    ("slurm", ["--gres=shard:2"]),
    ("slurm", ["--gpus=1"]),
    ("slurm", ["--gpus-per-node a100:1"]),
    ("slurm", ["-G 1"]),
    ("slurm", ["-G1"]),
    ("slurm", ["--tres-per-task=gres/gpu:1"]),
    ("pbs", ["-l select=1:ncpus=1:ngpus=1"]),
    ("pbs", ["-l nodes=1:ppn=1:gpus=1"]),
    ("lsf", ['-gpu "num=1:mode=shared"']),
    ("lsf", ["-R 'rusage[mem=4000,ngpus_physical=1]'"]),
    ("sge", ["-l gpu=1"]),
    ("sge", ["-l h_rt=60,gpu"]),
    ("oar", ["-l /host=1/gpu=1"]),
    ("htcondor", {"Request_GPUs": "2"}),
    ("htcondor", {"RequestGpus": "2"}),
]
WRITTEN = {
    "slurm": "#SBATCH --gres=gpu:1",
    "pbs": ":ngpus=1",
    "lsf": '#BSUB -gpu "num=1"',
    "sge": "#$ -l gpu=1",
    "oar": "/nodes=1/gpu=1",
    "htcondor": "request_gpus = 1",
}
OF_THE_SITE = {"oar": {"memory_per_core_property_name": "not_applicable"}}


def with_directives(kind: str, directives: Any, folder: Path) -> str:
    options = {"job_extra_directives": directives, **OF_THE_SITE.get(kind, {})}
    return script(kind, folder, gpus=1, options=options)


@pytest.mark.parametrize(("kind", "directives"), BESIDE)
def test_a_gpu_is_asked_for_whatever_else_has_gpu_in_its_name(
    kind: str, directives: Any, tmp_path: Path
) -> None:
    text = with_directives(kind, directives, tmp_path)
    assert WRITTEN[kind] in text
    assert all(line in text for line in directives)


@pytest.mark.parametrize(("kind", "directives"), OWN)
def test_a_gpu_is_not_asked_for_twice(kind: str, directives: Any, tmp_path: Path) -> None:
    options = {"job_extra_directives": directives, **OF_THE_SITE.get(kind, {})}
    asked, not_asked = (script(kind, tmp_path, gpus=n, options=options) for n in (1, 0))
    assert _directives_of(asked) == _directives_of(not_asked)


def _directives_of(text: str) -> list[str]:
    """Give a script without its worker's command, which tells Dask of the GPU."""
    return [line for line in text.splitlines() if "--nthreads" not in line]


def submit_command(options: dict[str, Any], folder: Path) -> str:
    request = ClusterRequest(kind="htcondor", options=options)

    async def make() -> str:
        cluster = make_cluster(request, folder=folder, asynchronous=True)
        try:
            return str(cluster._dummy_job.submit_command)
        finally:
            await cluster.close()

    return asyncio.run(make())


def test_nothing_said_is_what_the_site_or_the_library_says(tmp_path: Path) -> None:
    given = {"submit_command_extra": None}
    with dask.config.set({"jobqueue.htcondor.submit-command-extra": "-name a"}):
        assert submit_command(given, tmp_path) == "condor_submit -name a"


def test_other_resources_of_slurm_are_asked_for_with_the_gpu(tmp_path: Path) -> None:
    """Of several lines with ``--gres`` it takes the last one alone."""
    text = with_directives("slurm", ["--gres=tmpfs:20G", "--exclusive"], tmp_path)
    assert re.findall("--gres=.*", text)[-1] == "--gres=tmpfs:20G,gpu:1"


def test_a_gpu_is_added_to_resources_or_is_in_them(tmp_path: Path) -> None:
    mine = {"resource_spec": "select=1:ncpus=4:host=gpu01"}
    assert "host=gpu01:ngpus=1" in script("pbs", tmp_path, gpus=1, options=mine)
    mine = {"resource_spec": "select=1:ncpus=4:ngpus=1"}
    assert script("pbs", tmp_path, gpus=1, options=mine).count("ngpus") == 1
    with dask.config.set({"jobqueue.pbs.resource-spec": "select=1:ncpus=36:mem=109GB"}):
        assert "-l select=1:ncpus=36:mem=109GB:ngpus=1" in script("pbs", tmp_path, gpus=1)
    oar = OF_THE_SITE["oar"]
    mine = {"resource_spec": "{gpu_model='A100'}/host=1/gpu=1", **oar}
    assert f"-l {mine['resource_spec']}" in script("oar", tmp_path, gpus=1, options=mine)
    mine = {"resource_spec": "{gpu_count>0}/nodes=1/core=4", **oar}
    with pytest.raises(ConfigurationError, match="gpus=1 asks for a GPU and resource_spec"):
        script("oar", tmp_path, gpus=1, options=mine)


ONE_TEXT = {
    "job_script_prologue": "module load cuda",
    "worker_extra_args": "--lifetime '1 hour' --local-directory $TMPDIR",
}


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_text_stands_for_a_list_of_one_line(kind: str, tmp_path: Path) -> None:
    options = {**ONE_TEXT, **OF_THE_SITE.get(kind, {})}
    if kind != "htcondor":
        options |= {"job_extra_directives": "-m both", "job_directives_skip": "dask-worker"}
    text = script(kind, tmp_path, options=options)
    assert text == script(
        kind,
        tmp_path,
        options=options
        | {name: [value] for name, value in options.items() if name in {*ONE_TEXT, *FORMER_NAMES}},
    )
    assert "module load cuda" in text
    assert "$TMPDIR --preload torch" in text
    if kind != "htcondor":
        assert re.search("^#.* -m both$", text, re.MULTILINE)
        assert "dask-worker\n" not in text
        assert len(re.findall("^#", text, re.MULTILINE)) >= 3


def test_a_text_stands_for_a_list_in_the_configuration_of_the_site(tmp_path: Path) -> None:
    site = {"job-script-prologue": "module load cuda", "job-extra-directives": "--exclusive"}
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in site.items()}):
        text = script("slurm", tmp_path, gpus=1)
        lines = text.splitlines()
        assert {"module load cuda", "#SBATCH --exclusive", "#SBATCH --gres=gpu:1"} <= set(lines)
    with (
        dask.config.set({"jobqueue.slurm.job-script-prologue": 5}),
        pytest.raises(
            ConfigurationError, match=r"jobqueue.slurm in Dask's .*: job_script_prologue must be"
        ),
    ):
        script("slurm", tmp_path)


@pytest.mark.filterwarnings("ignore:.* has been renamed to:FutureWarning")
def test_the_former_names_of_options_are_not_forgotten(tmp_path: Path) -> None:
    options = {"job_extra": ["-C gpu"], "env_extra": "module load cuda", "extra": ["--lifetime", 1]}
    text = script("slurm", tmp_path, gpus=1, env={"A": "b"}, options=options)
    assert "#SBATCH -C gpu\n#SBATCH --gres=gpu:1\n" in text
    assert "\nmodule load cuda\n" in text
    assert "--lifetime 1 --preload torch" in text


def test_words_of_htcondors_own_commands_are_not_cut_into_letters(tmp_path: Path) -> None:
    async def made() -> str:
        options = {"submit_command_extra": "-name 'a b'"}
        request = ClusterRequest(kind="htcondor", options=options)
        cluster = make_cluster(request, folder=tmp_path, asynchronous=True)
        command = str(cluster._dummy_job.submit_command)
        await cluster.close()
        return command

    assert asyncio.run(made()) == "condor_submit -name 'a b'"


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
