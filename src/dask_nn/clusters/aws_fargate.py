"""Containers of Fargate through dask-cloudprovider: no machines to look after, and no GPUs.

Imported only where dask-cloudprovider is installed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError
from dask.utils import parse_bytes
from dask_cloudprovider.aws import FargateCluster
from distributed import Security

from dask_nn.clusters.aws_options import check_known
from dask_nn.clusters.certificates import as_environment, pem_texts, tls_settings
from dask_nn.clusters.option_types import (
    ARGUMENTS,
    COUNT,
    MAPPING,
    PORT,
    SECONDS,
    SWITCH,
    TAGS,
    TEXT,
    TEXTS,
    arguments,
    check_types,
    lines,
)
from dask_nn.clusters.request import IDLE_TIMEOUT
from dask_nn.clusters.serve import serve
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from distributed import Client

    from dask_nn.clusters.aws_account import Account
    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_options", "fargate_arguments", "fargate_size", "open_cluster"]

logger = logging.getLogger(__name__)

OWN = ("service", "region", "protocol")
_TEXTS = ("security_groups", "subnets", "task_role_policies")
TYPES = {
    **dict.fromkeys(("cluster_arn", "execution_role_arn", "task_role_arn", "vpc"), TEXT),
    **dict.fromkeys(("cluster_name_template", "cpu_architecture", "platform_version"), TEXT),
    **dict.fromkeys(("scheduler_cpu", "scheduler_mem"), COUNT),
    **dict.fromkeys(("scheduler_extra_args", "worker_extra_args"), ARGUMENTS),
    **dict.fromkeys(("skip_cleanup", "fargate_use_private_ip", "fargate_spot"), SWITCH),
    **dict.fromkeys(("scheduler_task_kwargs", "worker_task_kwargs"), MAPPING),
    **dict.fromkeys(_TEXTS, TEXTS),
    "mount_volumes_on_scheduler": SWITCH,
    "scheduler_port": PORT,
    "scheduler_timeout": SECONDS,
    "tags": TAGS,
}
TAKEN = ("worker_cpu", "worker_mem", "worker_nthreads", "worker_gpu", "region_name")
# GiB that Fargate sells with so many processors: from, to, in steps of.
SIZES = {1: (2, 8, 1), 2: (4, 16, 1), 4: (8, 30, 1), 8: (16, 60, 4), 16: (32, 120, 8)}
LEAST_MEMORY_GIB = 4
END_TIMEOUT_S = 150
DELETE_TIMEOUT_S = 90
LOOK_EVERY_S = 2.0
ABSENT = {"NoSuchEntity", "ClusterNotFoundException"}


class NNFargateCluster(FargateCluster):  # type: ignore[misc]  # ships no annotations
    """A cluster that hands its certificates to its containers, and deletes what it made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(asynchronous=True, **options)
        self.quiet = True
        self._cluster_is_given = options.get("cluster_arn") is not None
        if self.security.require_encryption:
            self.session.register("provide-client-params.ecs.RegisterTaskDefinition", self._encrypt)

    def _encrypt(self, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add the certificates to a definition: a task's own environment may not be so large."""
        variables = as_environment(tls_settings(pem_texts(self.security)))
        settings = [{"name": name, "value": value} for name, value in variables.items()]
        for container in params["containerDefinitions"]:
            container["environment"] = [*container.get("environment", ()), *settings]
            if "scheduler" in container["name"]:
                container["command"] = [*container["command"], "--protocol", "tls"]
        return params

    def _check_scheduler_tls_config(self) -> None:
        """Be still: the library warns of certificates that are not on the command line."""

    def sync(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a method; at the end of the process there is nothing left to delete."""
        # The library has Python call these then, when their event loop is gone.
        if getattr(func, "__name__", "").startswith("_delete"):
            return None
        return super().sync(func, *args, **kwargs)

    async def _close(self) -> None:
        try:
            await super()._close()
        finally:
            await self._delete_everything()

    async def _delete_everything(self) -> None:
        """Delete what was made; the names hold the name of this cluster, which nobody else has."""
        if self.cluster_name and not self._cluster_is_given:
            # AWS takes a name where an interrupt came before the answer.
            self.cluster_arn: str | None = self.cluster_arn or self.cluster_name
            await _tried(self._delete_cluster())
        if self.scheduler_task_definition_arn:
            await _tried(self._delete_scheduler_task_definition_arn())
        if self.worker_task_definition_arn:
            await _tried(self._delete_worker_task_definition_arn())
        for role in (self._execution_role_name, self._task_role_name):
            await _tried(self._delete_role(role))
        await _tried(self._delete_groups())

    async def _delete_groups(self) -> None:
        filters = [{"Name": "group-name", "Values": [self._security_group_name]}]
        async with self._client("ec2") as ec2, asyncio.timeout(DELETE_TIMEOUT_S):
            answer = await ec2.describe_security_groups(Filters=filters)
            for group in answer["SecurityGroups"]:
                while True:
                    try:
                        await ec2.delete_security_group(GroupId=group["GroupId"])
                    except ClientError as error:
                        # The addresses of containers that have just ended still belong to it.
                        if error.response["Error"]["Code"] != "DependencyViolation":
                            raise
                        await asyncio.sleep(LOOK_EVERY_S)
                    else:
                        break


@contextmanager
def open_cluster(request: ClusterRequest, account: Account) -> Iterator[Client]:
    """Run the Fargate cluster of a request.

    Raises
    ------
    ConfigurationError
        If an option cannot work.
    ClusterError
        If AWS refuses something, or the workers do not come in time.
    """
    arguments = fargate_arguments(request) | {"region_name": account.region}
    with serve(
        request, lambda: NNFargateCluster(**arguments), close_timeout_s=END_TIMEOUT_S
    ) as client:
        yield client


def check_options(request: ClusterRequest) -> None:
    """Check the options of a request, without a connection.

    Raises
    ------
    ConfigurationError
        If one cannot work.
    """
    check_known(request.options, FargateCluster, OWN, TAKEN)
    check_types(request.options, TYPES)
    if request.gpus:
        raise ConfigurationError(
            "Fargate has no GPUs; take virtual machines: service='ec2' with instance_type such as "
            "'g6.xlarge'"
        )
    fargate_size(request.cores, request.memory)


def fargate_size(cores: int, memory: str | None) -> tuple[int, int]:
    """Give what Fargate sells that holds a worker.

    Parameters
    ----------
    cores : int
        Processors of the worker.
    memory : str or None
        Its memory; at least 4 GiB where None.

    Returns
    -------
    cpu : int
        In 1024ths of a processor.
    memory_mib : int
        In MiB.

    Raises
    ------
    ConfigurationError
        If nothing is large enough; says what there is.
    """
    if cores not in SIZES:
        raise ConfigurationError(
            f"Fargate has containers of {', '.join(map(str, SIZES))} processors, got cores={cores}"
        )
    least, most, step = SIZES[cores]
    wanted = LEAST_MEMORY_GIB if memory is None else math.ceil(parse_bytes(memory) / 2**30)
    if wanted > most:
        raise ConfigurationError(
            f"a Fargate container of {cores} processors has {least} to {most} GiB, got "
            f"memory={memory!r}; take more cores or less memory"
        )
    steps = max(0, math.ceil((wanted - least) / step))
    return cores * 1024, min(most, least + steps * step) * 1024


def fargate_arguments(request: ClusterRequest) -> dict[str, Any]:
    """Turn a request into the arguments of ``dask_cloudprovider.aws.FargateCluster``."""
    options = {name: value for name, value in request.options.items() if name not in OWN}
    for name in set(_TEXTS) & set(options):
        if options[name] is not None:
            options[name] = lines(options[name])
    if options.get("scheduler_extra_args") is not None:
        options["scheduler_extra_args"] = arguments(options["scheduler_extra_args"])
    cpu, memory_mib = fargate_size(request.cores, request.memory)
    preload = [part for module in request.preload for part in ("--preload", module)]
    return {
        # It would delete what belongs to another cluster of the account that is just starting.
        "skip_cleanup": True,
        **options,
        "scheduler_timeout": str(options.get("scheduler_timeout") or IDLE_TIMEOUT),
        "worker_cpu": cpu,
        "worker_mem": memory_mib,
        "worker_nthreads": request.cores,
        "worker_extra_args": [*preload, *arguments(options.get("worker_extra_args"))],
        "environment": dict(request.env),
        "security": request.security or Security(),
    }


async def _tried(deletion: Coroutine[Any, Any, None]) -> None:
    try:
        await deletion
    except ClientError as error:
        if error.response["Error"]["Code"] not in ABSENT:
            logger.warning("AWS did not delete a part of the cluster: %s", error)
    except (BotoCoreError, TimeoutError) as error:
        logger.warning("AWS did not delete a part of the cluster: %s", error)
