from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aws_machines
import dask
import pytest
import training_job
import yaml
from dask_cloudprovider.aws import ecs
from dask_cloudprovider.generic import vmcluster
from distributed import Security
from moto.server import ThreadedMotoServer

import dask_nn
from dask_nn.clusters.aws import SURPRISED
from dask_nn.clusters.aws_account import InstanceType
from dask_nn.clusters.aws_ec2 import (
    NamedWorker,
    NNEC2Cluster,
    check_machine,
    ec2_arguments,
    ended_workers,
)
from dask_nn.clusters.aws_ending import end_machines
from dask_nn.clusters.aws_fargate import fargate_arguments, fargate_size
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = "registry.example.com/dask-nn:1"
EC2 = {"image": IMAGE, "instance_type": "m7i.large", "security_groups": ["sg-1"]}
MACHINE = InstanceType(name="m7i.large", cores=2, memory_bytes=8 * 2**30, gpus=0)
GPU_MACHINE = InstanceType(name="g6.xlarge", cores=4, memory_bytes=16 * 2**30, gpus=1)
# Starting and ending processes takes long where others use the machine too.
JOB_TIMEOUT_S = 200


def request(options: dict[str, Any] | None = None, **asked: Any) -> ClusterRequest:
    return ClusterRequest(kind="aws", options=EC2 if options is None else options, **asked)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "missing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def account(no_account: None, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**aws_machines.ACCOUNT, "AWS_ENDPOINT_URL": moto}.items():
        monkeypatch.setenv(name, value)


def test_a_worker_gets_its_threads_memory_and_preloads():
    options = EC2 | {"instance_tags": {"owner": "me", "dask-nn-cluster": "another"}}
    asked = request(options, cores=2, memory="3 GB", preload=("torch", "json"))
    arguments = ec2_arguments(asked, "token")
    assert arguments["worker_options"] == {
        "nthreads": 2,
        "memory_limit": 3_000_000_000,
        "preload": ["torch", "json"],
        "death_timeout": "300s",
    }
    assert arguments["instance_tags"] == {"owner": "me", "dask-nn-cluster": "token"}
    assert arguments["docker_image"] == IMAGE


@pytest.mark.parametrize(("machine", "gpus"), [(MACHINE, False), (GPU_MACHINE, True)])
def test_what_a_machine_starts_with_is_yaml_that_fits_and_gives_it_its_gpu(machine, gpus):
    security = Security.temporary()
    asked = request(gpus=int(gpus), security=security, env={"TEXT": 'it\'s "5 $" `x`'})

    async def render() -> str:
        cluster = NNEC2Cluster(MACHINE, machine, **ec2_arguments(asked, "token"))
        options = {**cluster.worker_options, "scheduler": "tls://10.0.0.1:8786", "name": 7}
        text = cluster.render_process_cloud_init(NamedWorker(**options))
        await cluster.close()
        return text

    # The library writes the certificates into it and leaves them there.
    before = copy.deepcopy(dask.config.config)
    try:
        text = asyncio.run(render())
    finally:
        dask.config.config.clear()
        dask.config.config.update(before)
    *_, docker, shutdown = yaml.safe_load(text)["runcmd"]
    assert ("--gpus=all" in docker) == gpus
    assert r'-e TEXT="it' + "'s" + r' \"5 \$\" \`x\`"' in docker
    assert "ubuntu-drivers" in text if gpus else "ubuntu-drivers install" not in text
    assert '"name": 7' in docker
    assert shutdown == "shutdown -h now"


@pytest.mark.parametrize(
    ("asked", "machine", "message"),
    [
        ({"cores": 4}, MACHINE, "4 cores does not fit a m7i.large with 2"),
        ({"memory": "16 GB"}, MACHINE, "16 GB does not fit a m7i.large with 8.00 GiB"),
        ({"gpus": 1}, MACHINE, "has 0 GPUs"),
        (
            {"gpus": 1},
            InstanceType(name="g5.12xlarge", cores=48, memory_bytes=2**37, gpus=4),
            "has 4 GPUs, and a machine runs one worker",
        ),
    ],
)
def test_a_machine_that_cannot_hold_the_worker_is_refused(asked, machine, message):
    with pytest.raises(ConfigurationError, match=message):
        check_machine(request(**asked), machine)
    check_machine(request(cores=2, memory="8 GB"), MACHINE)
    check_machine(request(gpus=1), GPU_MACHINE)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({"service": "lambda"}, {}, "service must be"),
        ({"instance_type": "m7i.large"}, {}, "needs image"),
        ({"image": IMAGE}, {}, "needs instance_type"),
        ({"service": "fargate", "image": ""}, {}, "needs image"),
        (EC2 | {"worker_instance_type": "m7i.large"}, {}, "give either"),
        (EC2 | {"instancetype": "x"}, {}, "did you mean 'instance_type'"),
        (EC2 | {"protocol": "tcp"}, {"security": True}, "is without TLS"),
        (EC2, {"env": {"KEY": "two\nlines"}}, "several lines"),
        (EC2, {"walltime": "01:00:00"}, "walltime"),
        ({"service": "fargate", "image": IMAGE}, {"gpus": 1}, "Fargate has no GPUs"),
        ({"service": "fargate", "image": IMAGE}, {"cores": 3}, "1, 2, 4, 8, 16 processors"),
        ({"service": "fargate", "image": IMAGE}, {"memory": "9 GB"}, "2 to 8 GiB"),
        ({"service": "fargate", "image": IMAGE, "vpcs": "x"}, {}, "did you mean 'vpc'"),
    ],
)
def test_an_option_that_cannot_work_is_answered_without_an_account(
    no_account, options, asked, message
):
    with (
        pytest.raises(ConfigurationError, match=message),
        dask_nn.cluster("aws", workers=1, **asked, **options),
    ):
        pass


def test_a_missing_package_is_answered_with_the_install_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dask_cloudprovider")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dask_cloudprovider", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'dask-nn\[aws\]'"),
        dask_nn.cluster("aws", workers=1, **EC2),
    ):
        pass


@pytest.mark.parametrize(
    ("region", "message"), [(None, "needs a region"), ("eu-central-1", "no AWS credentials")]
)
def test_a_missing_account_is_one_clear_error(no_account, region, message):
    options = EC2 if region is None else EC2 | {"region": region}
    with (
        pytest.raises(ConfigurationError, match=message),
        dask_nn.cluster("aws", workers=1, **options),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AWS_PROFILE", {}, "configuration cannot be used: .*nobody"),
        ("X", {"region": "no region"}, "no region"),
    ],
)
def test_a_profile_or_region_that_cannot_be_is_one_clear_error(
    account, monkeypatch, name, options, message
):
    monkeypatch.setenv(name, "nobody")
    with (
        pytest.raises((ConfigurationError, ClusterError), match=message),
        dask_nn.cluster("aws", workers=1, **(EC2 | options)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_type": "m7x.large"}, "AWS refused .*do not exist: .m7x.large"),
        ({"security_groups": []}, "needs security_groups"),
    ],
)
def test_what_aws_does_not_have_is_refused_before_a_machine_starts(account, options, message):
    with (
        pytest.raises(ConfigurationError, match=message),
        dask_nn.cluster("aws", workers=1, **(EC2 | options)),
    ):
        pass


def test_an_account_that_does_not_answer_is_an_error(account, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with (
        pytest.raises(ClusterError, match="AWS could not be asked"),
        dask_nn.cluster("aws", workers=1, **EC2),
    ):
        pass


def test_the_library_is_not_surprised_that_machines_take_their_time(no_account):
    """Its warning comes after ten seconds, when the machines are there."""
    said = inspect.getsource(vmcluster), inspect.getsource(ecs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigurationError), dask_nn.cluster("aws", workers=1, **EC2):
            pass
        for source in said:
            assert SURPRISED in source
        warnings.warn(f"{SURPRISED}. Hang tight!", stacklevel=1)


class Looks:
    """An account in which each look at a machine finds the next of some states."""

    region = "eu-central-1"

    def __init__(self, *states: str | Exception) -> None:
        self.states = list(states)
        self.ended: list[list[str]] = []

    def instances(self, tag: str, value: str) -> list[dict[str, Any]]:
        assert (tag, value) == ("dask-nn-cluster", "token")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return [{"InstanceId": "i-1", "State": {"Name": state}}] if state else []

    def ask(self, service: str, call: Callable[[Any], Any]) -> None:
        call(self)

    def terminate_instances(self, InstanceIds: list[str]) -> None:
        self.ended.append(InstanceIds)


def test_a_machine_that_aws_shows_late_is_ended_as_well(caplog):
    account = Looks("", "pending", ClusterError("busy"), "running", "shutting-down", "terminated")
    end_machines(account, "token", look_every_s=0)
    assert account.ended == [["i-1"], ["i-1"]]
    assert account.states == ["terminated"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("states", "reason"),
    [(["running", ConfigurationError("expired")], "expired"), (["stopping"], "within 0 s")],
)
def test_machines_whose_end_cannot_be_seen_are_named_with_what_ends_them(caplog, states, reason):
    end_machines(Looks(*states), "token", look_every_s=0, timeout_s=0 if len(states) == 1 else 60)
    [record] = caplog.records
    for part in (reason, "i-1", "Name=tag:dask-nn-cluster,Values=token", "terminate-instances"):
        assert part in record.message


@pytest.mark.parametrize(
    ("cores", "memory", "size"),
    [
        (1, None, (1024, 4096)),
        (1, "100 MB", (1024, 2048)),
        (4, "16 GB", (4096, 15 * 1024)),
        (8, "17 GiB", (8192, 20 * 1024)),
        (16, "33 GiB", (16384, 40 * 1024)),
    ],
)
def test_fargate_sizes_are_those_it_sells_rounded_up(cores, memory, size):
    assert fargate_size(cores, memory) == size


def test_a_fargate_worker_gets_its_threads_memory_and_preloads():
    options = {"service": "fargate", "image": IMAGE, "vpc": "vpc-1"}
    arguments = fargate_arguments(request(options, cores=2, memory="5 GiB", env={"A": "b"}))
    wanted = {
        "worker_cpu": 2048,
        "worker_mem": 5120,
        "worker_nthreads": 2,
        "worker_extra_args": ["--preload", "torch"],
        "environment": {"A": "b"},
        "vpc": "vpc-1",
    }
    assert wanted.items() <= arguments.items()


def test_a_text_stands_for_a_list():
    options = {"service": "fargate", "image": IMAGE, "security_groups": "sg-1", "subnets": "s-1"}
    options |= {"worker_extra_args": "--name 'a b'", "scheduler_extra_args": "--show"}
    arguments = fargate_arguments(request(options | {"scheduler_timeout": 60}, preload=()))
    assert arguments["worker_extra_args"] == ["--name", "a b"]
    assert arguments["scheduler_extra_args"] == ["--show"]
    assert arguments["security_groups"] == ["sg-1"]
    assert arguments["subnets"] == ["s-1"]
    assert arguments["scheduler_timeout"] == "60"
    options = EC2 | {"security_groups": "sg-1", "extra_bootstrap": "apt-get update"}
    arguments = ec2_arguments(request(options), "token")
    assert arguments["security_groups"] == ["sg-1"]
    assert arguments["extra_bootstrap"] == ["apt-get update"]


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory, unavailable: Any) -> Any:
    """Run jobs, one after the other, in a region of AWS of their own."""
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    if unshare is None or ip is None:
        unavailable("a region needs unshare (util-linux) and ip (iproute2)")
    # With its processes, everything that it started ends.
    alone = [unshare, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        unavailable("a region needs namespaces for network and processes, which need root")

    def run(*jobs: dict[str, Any], interrupt: int = 0) -> dict[str, Any]:
        image = {"image": IMAGE, "security_groups": ["@GROUP@"]}
        python, folder = sys.executable, tmp_path_factory.mktemp("region")
        job = [python, training_job.__file__, "aws", *(json.dumps(image | own) for own in jobs)]
        machines = [*alone, python, aws_machines.__file__, folder, str(interrupt)]
        done = subprocess.run(
            [*machines, "--", *job],
            check=False,
            capture_output=True,
            text=True,
            timeout=JOB_TIMEOUT_S * len(jobs),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) | {"folder": folder}

    return run


EC2_JOB = {"instance_type": "m7i.large", "ami": "@AMI@", "bootstrap": False}


def states(said: dict[str, Any]) -> list[str]:
    return [instance["State"]["Name"] for instance in said["instances"]]


GREETING = 'it\'s "5 $" `x`'


@pytest.fixture(scope="module")
def trained(region) -> dict[str, Any]:
    """Train on machines, then in containers, from one client."""
    said = region(
        {"workers": 2, "memory": "3 GB", "env": {"GREETING": GREETING}, **EC2_JOB},
        {
            "service": "fargate",
            "workers": 2,
            "memory": "3 GiB",
            "env": {"GREETING": "hello"},
            "fargate_use_private_ip": True,
        },
    )
    assert said["returncode"] == 0, said["err"]
    said["told"] = [json.loads(line) for line in said["out"].splitlines()]
    return said


@pytest.mark.timeout(3 * JOB_TIMEOUT_S)
def test_training_on_ec2_gives_the_bits_of_local_training_and_ends_all_machines(trained):
    said = trained
    assert said["err"] == ""
    told, _ = said["told"]
    assert told["cluster"] == told["local"]
    assert told["workers"] == 2
    assert told["env"] == [GREETING, GREETING]
    assert told["address"].startswith("tls://")
    assert states(said) == ["terminated"] * 3
    [scheduler, *_] = said["instances"]
    # A rule for the members of a security group lets only these in.
    private = f"tls://{scheduler['PrivateIpAddress']}:8786"
    started = [file.read_text() for file in said["folder"].glob("i-*.yaml")]
    assert sum(private in text for text in started) == 2


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_ctrl_c_while_the_machines_start_ends_them(region):
    said = region({"workers": 2, **EC2_JOB}, interrupt=1)
    assert said["returncode"] != 0
    assert "KeyboardInterrupt" in said["err"]
    assert set(states(said)) == {"terminated"}


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_a_scheduler_whose_container_fails_is_an_error_and_its_machine_ends(region):
    said = region({"workers": 1, "scheduler_options": {"host": "203.0.113.1"}} | EC2_JOB)
    assert "the scheduler's machine ended" in said["err"]
    assert "get-console-output" in said["err"]
    assert states(said) == ["terminated"]


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_a_scheduler_that_runs_and_cannot_be_reached_is_told_with_what_may_be_the_reason(region):
    elsewhere = {"scheduler_options": {"host": "127.0.0.2"}}
    said = region({"workers": 1, "start_timeout_s": 8} | elsewhere | EC2_JOB)
    assert "was not there within 8 s" in said["err"]
    assert "its port 8786 does not answer here: either the security group" in said["err"]
    assert states(said) == ["terminated"]


@pytest.mark.timeout(3 * JOB_TIMEOUT_S)
def test_training_on_fargate_gives_the_bits_of_local_training_and_leaves_nothing(trained):
    said = trained
    _, told = said["told"]
    assert told["cluster"] == told["local"]
    assert told["env"] == ["hello", "hello"]
    assert told["address"].startswith("tls://")
    assert len(said["tasks"]) == 3
    for task in said["tasks"][1:]:
        [container] = task["definition"]["containerDefinitions"]
        assert (container["cpu"], container["memory"]) == (1024, 3072)
        assert container["image"] == IMAGE
        [overrides] = task["task"]["overrides"]["containerOverrides"]
        assert overrides["command"][-2:] == ["--preload", "torch"]
        assert task["task"]["launchType"] == "FARGATE"
    assert said["left"] == {"clusters": [], "definitions": [], "roles": [], "groups": []}


def test_workers_are_lost_whose_machines_ended():
    machines = {0: {"InstanceId": "i-0"}, 1: {"InstanceId": "i-1"}, 2: None}
    workers = {name: SimpleNamespace(instance=one) for name, one in machines.items()}
    states = {"i-0": "running", "i-1": "terminated"}
    instances = [{"InstanceId": one, "State": {"Name": state}} for one, state in states.items()]
    assert ended_workers(SimpleNamespace(workers=workers), instances) == {1}
