"""Virtual machines of EC2 through dask-cloudprovider: one for the scheduler, one for each worker.

Imported only where dask-cloudprovider is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import format_bytes, parse_bytes
from dask_cloudprovider.aws import EC2Cluster
from dask_cloudprovider.aws.ec2 import EC2Scheduler, EC2Worker
from distributed.core import Status

from dask_nn.clusters.aws_ending import GONE, TAG, describe, end_machines, is_schedulers
from dask_nn.clusters.aws_options import check_known
from dask_nn.clusters.loop import see_through
from dask_nn.clusters.option_types import (
    COUNT,
    LINES,
    OF_SCHEDULERS,
    OF_WORKERS,
    SWITCH,
    TAGS,
    TEXT,
    TEXTS,
    check_types,
    lines,
)
from dask_nn.clusters.request import DEATH_TIMEOUT, IDLE_TIMEOUT
from dask_nn.clusters.serve import serve
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from dask_nn.clusters.aws_account import Account, InstanceType
    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_options", "ec2_arguments", "open_cluster"]

OWN = ("service", "image", "protocol")
TYPES = {
    **dict.fromkeys(("ami", "key_name", "subnet_id", "vpc", "docker_args", "worker_class"), TEXT),
    **dict.fromkeys(("instance_type", "scheduler_instance_type", "worker_instance_type"), TEXT),
    **dict.fromkeys(("bootstrap", "auto_shutdown", "debug", "spot", "use_private_ip"), SWITCH),
    **dict.fromkeys(("availability_zone", "security_groups"), TEXTS),
    **dict.fromkeys(("instance_tags", "volume_tags", "iam_instance_profile"), TAGS),
    "enable_detailed_monitoring": SWITCH,
    "extra_bootstrap": LINES,
    "filesystem_size": COUNT,
    "scheduler_options": OF_SCHEDULERS,
    "worker_options": OF_WORKERS,
}
TAKEN = ("docker_image", "gpu_instance", "worker_module", "command")
# EC2 takes so much text for a machine to start with.
LARGEST_USER_DATA = 16384
END_TIMEOUT_S = 60
ENDED = GONE | {"stopping", "stopped"}
CONTAINER_FAILED = (
    "most often because its container did not run; look at `aws ec2 get-console-output "
    "--instance-id ...`"
)
UNREACHED = (
    "the scheduler's machine runs, and its port 8786 does not answer here: either the security "
    "group does not let you reach ports 8786 and 8787, or the image is still being pulled; `aws "
    "ec2 get-console-output --instance-id ...` tells which"
)


class ReachableScheduler(EC2Scheduler):  # type: ignore[misc]  # ships no annotations
    """A scheduler that workers find inside of AWS, whoever else reaches it from outside."""

    contact_address: str

    async def start(self) -> None:
        """Make the machine, and wait for its scheduler."""
        await super().start()
        # A rule that lets the members of a security group in is about private addresses alone.
        private = self.instance["PrivateIpAddress"]
        self.contact_address = f"{self.cluster.protocol}://{private}:{self.port}"

    async def wait_for_scheduler(self) -> None:
        """Wait until the scheduler's port is open; the library's own waiting blocks the loop."""
        host, _, port = self.address.rpartition("://")[2].rpartition(":")
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(5):
                    _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                return
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        """End the machine, once."""
        if self.status != Status.closed:
            await super().close()


class NamedWorker(EC2Worker):  # type: ignore[misc]  # ships no annotations
    """A worker that Dask knows by the name that its cluster has for it.

    The library gives it another one, by which its cluster would never know which machine was lost,
    nor which one to end when there are to be fewer.
    """

    command: str

    def __init__(self, *arguments: Any, name: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        named = self.command.replace(json.dumps(self.name), json.dumps(name))
        if named == self.command:
            raise ClusterError(
                "this version of dask-cloudprovider does not tell its workers their names as "
                "dask-nn expects it; install one that `pip install 'dask-nn[aws]'` takes"
            )
        self.command = named


class NNEC2Cluster(EC2Cluster):  # type: ignore[misc]  # ships no annotations
    """A cluster whose machines know their GPUs, and fit into what EC2 accepts."""

    def __init__(self, scheduler: InstanceType, worker: InstanceType, **options: Any) -> None:
        super().__init__(asynchronous=True, **options)
        self.quiet = True
        self.scheduler_class = ReachableScheduler
        self.worker_class = NamedWorker
        # The library tells by the name of one type alone.
        self.scheduler_options["gpu_instance"] = scheduler.gpus > 0
        self.worker_options["gpu_instance"] = worker.gpus > 0

    def render_process_cloud_init(self, process: Any) -> str:
        """Write what a machine does when it starts."""
        text = str(super().render_process_cloud_init(process))
        if len(text.encode()) > LARGEST_USER_DATA:
            raise ClusterError(
                f"what a machine starts with is {len(text.encode())} bytes, and EC2 takes at most "
                f"{LARGEST_USER_DATA}; give fewer env, or less of Dask's own configuration, which "
                "is sent too"
            )
        return text


@contextmanager
def open_cluster(request: ClusterRequest, account: Account) -> Iterator[Client]:
    """Run the EC2 cluster of a request; at its end no machine is left, whatever happened.

    Raises
    ------
    ConfigurationError
        If the type of machine does not exist or is too small.
    ClusterError
        If AWS refuses something, or the workers do not come in time.
    """
    names = _instance_types(request)
    scheduler, worker = map(account.instance_type, names)
    check_machine(request, worker)
    _check_security_groups(request, account)
    token = secrets.token_hex(8)
    arguments = ec2_arguments(request, token) | {"region": account.region}

    async def explain(cluster: Any) -> str:
        instances = await asyncio.to_thread(account.instances, TAG, token)
        lines = list(map(describe, instances))
        runs = any(instance["State"]["Name"] == "running" for instance in instances)
        if runs and not cluster.scheduler_info.get("address"):
            lines.append(UNREACHED)
        return "\n".join(lines)

    async def lost(cluster: Any) -> set[Any]:
        return ended_workers(cluster, await asyncio.to_thread(account.instances, TAG, token))

    async def hopeless(_: Any) -> str:
        ended = [
            instance
            for instance in await asyncio.to_thread(account.instances, TAG, token)
            if instance["State"]["Name"] in ENDED
        ]
        if not ended:
            return ""
        told = "\n".join(map(describe, ended))
        of_scheduler = any(is_schedulers(instance) for instance in ended)
        which = "the scheduler's machine ended" if of_scheduler else "a worker's machine ended"
        return f"{which}, {CONTAINER_FAILED}\n{told}"

    try:
        with serve(
            request,
            lambda: NNEC2Cluster(scheduler, worker, **arguments),
            explain=explain,
            lost=lost,
            hopeless=hopeless,
            close_timeout_s=END_TIMEOUT_S,
        ) as client:
            yield client
    finally:
        # Also what was being made while the start was interrupted.
        with ThreadPoolExecutor(1) as pool:
            see_through(pool.submit(end_machines, account, token), threading.TIMEOUT_MAX)


def ended_workers(cluster: Any, instances: list[dict[str, Any]]) -> set[Any]:
    """Give the names of workers whose machines have ended."""
    ended = {one["InstanceId"] for one in instances if one["State"]["Name"] in ENDED}
    machines = {name: worker.instance for name, worker in cluster.workers.items()}
    return {name for name, one in machines.items() if one and one["InstanceId"] in ended}


def check_options(request: ClusterRequest) -> None:
    """Check the options of a request, without a connection.

    Raises
    ------
    ConfigurationError
        If one cannot work.
    """
    check_known(request.options, EC2Cluster, OWN, TAKEN)
    check_types(request.options, TYPES)
    _instance_types(request)
    for name, value in request.env.items():
        if "\n" in value:
            raise ConfigurationError(f"env {name} has several lines, which EC2 cannot hand on")


def check_machine(request: ClusterRequest, machine: InstanceType) -> None:
    """Refuse a type of machine that cannot hold the worker that was asked for.

    Raises
    ------
    ConfigurationError
        Says what the type has.
    """
    if request.cores > machine.cores:
        raise ConfigurationError(
            f"a worker of {request.cores} cores does not fit a {machine.name} with {machine.cores}"
        )
    if request.memory and parse_bytes(request.memory) > machine.memory_bytes:
        raise ConfigurationError(
            f"a worker of {request.memory} does not fit a {machine.name} with "
            f"{format_bytes(machine.memory_bytes)}"
        )
    if request.gpus and machine.gpus != 1:
        raise ConfigurationError(
            f"a {machine.name} has {machine.gpus} GPUs, and a machine runs one worker, which uses "
            "one; take a type with one GPU, such as g6.xlarge, and more workers"
        )


def ec2_arguments(request: ClusterRequest, token: str) -> dict[str, Any]:
    """Turn a request into the arguments of ``dask_cloudprovider.aws.EC2Cluster``.

    Parameters
    ----------
    request : ClusterRequest
        What is asked for.
    token : str
        Written on every machine as a tag, by which it is found and ended.
    """
    options = {name: value for name, value in request.options.items() if name not in OWN}
    for name in {"extra_bootstrap", "security_groups"} & set(options):
        if options[name] is not None:
            options[name] = lines(options[name])

    def given(name: str) -> dict[str, Any]:
        return options.get(name) or {}

    worker: dict[str, Any] = {"nthreads": request.cores, "death_timeout": DEATH_TIMEOUT}
    if request.memory is not None:
        worker["memory_limit"] = parse_bytes(request.memory)
    if request.preload:
        worker["preload"] = list(request.preload)
    return options | {
        "docker_image": request.options["image"],
        "security": request.security or False,
        "env_vars": {name: _quoted(value) for name, value in request.env.items()},
        "worker_options": {**worker, **given("worker_options")},
        "scheduler_options": {"idle_timeout": IDLE_TIMEOUT, **given("scheduler_options")},
        "instance_tags": {**given("instance_tags"), TAG: token},
    }


def _quoted(value: str) -> str:
    """Protect a value that is put between double quotes of a shell, inside single ones of YAML."""
    for special in '\\"$`':
        value = value.replace(special, f"\\{special}")
    return value.replace("'", "''")


def _instance_types(request: ClusterRequest) -> tuple[str, str]:
    """Give the types of the scheduler's machine and of the workers' machines."""
    options = request.options
    both: Any = options.get("instance_type")
    pair: Any = (options.get("scheduler_instance_type"), options.get("worker_instance_type"))
    if both is not None and any(pair):
        raise ConfigurationError(
            "instance_type is for all machines, scheduler_instance_type and worker_instance_type "
            "for theirs: give either"
        )
    names: tuple[str, str] = (both, both) if both is not None else pair
    if not all(names):
        raise ConfigurationError(
            'EC2 needs instance_type, such as "m7i.large" (or "g6.xlarge" with a GPU), or '
            "scheduler_instance_type and worker_instance_type; got "
            f"{both if both is not None else pair!r}"
        )
    return names


def _check_security_groups(request: ClusterRequest, account: Account) -> None:
    if request.options.get("security_groups") or dask.config.get(
        "cloudprovider.ec2.security_groups", None
    ):
        return
    # The library looks for this one, and fails where it would have to make it.
    answer = account.ask(
        "ec2",
        lambda client: client.describe_security_groups(
            Filters=[{"Name": "group-name", "Values": ["dask-default"]}]
        ),
    )
    if not answer["SecurityGroups"]:
        raise ConfigurationError(
            "EC2 needs security_groups, the ids of groups that let their members talk to each "
            "other and you reach ports 8786 and 8787; there is none called dask-default either"
        )
