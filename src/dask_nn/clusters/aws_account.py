"""Who asks AWS, and where: credentials and region, tried before anything is started."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.optional import import_optional
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Account", "InstanceType"]

CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class InstanceType:
    """What a kind of virtual machine has.

    Parameters
    ----------
    name : str
        Such as ``"m7i.large"``.
    cores : int
        Virtual processors.
    memory_bytes : int
        Memory.
    gpus : int
        GPUs.
    """

    name: str
    cores: int
    memory_bytes: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Account:
    """Credentials that AWS has accepted, and a region.

    Parameters
    ----------
    session : botocore.session.Session
        Makes clients.
    region : str
        Such as ``"eu-central-1"``.
    """

    session: Any
    region: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Account:
        """Find the credentials and the region, and let AWS confirm them.

        Parameters
        ----------
        options : mapping
            ``region``; that of AWS's own configuration where it is missing.

        Raises
        ------
        ConfigurationError
            If credentials or region are missing or refused.
        ClusterError
            If AWS does not answer.
        """
        session = import_optional("botocore.session", "aws", "aws").Session()
        exceptions = import_optional("botocore.exceptions", "aws", "aws")
        try:
            region = options.get("region") or session.get_config_variable("region")
            credentials = session.get_credentials()
        except exceptions.BotoCoreError as error:
            raise ConfigurationError(
                f"AWS's own configuration cannot be used: {error}; see `aws configure "
                "list-profiles` and AWS_PROFILE"
            ) from error
        if not isinstance(region, str):
            raise ConfigurationError(
                f"AWS needs a region, got {region!r}; give region= such as "
                '"eu-central-1", or set AWS_DEFAULT_REGION'
            )
        if credentials is None:
            raise ConfigurationError(
                "no AWS credentials were found; run `aws configure`, or set AWS_PROFILE, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        account = cls(session=session, region=region)
        account.ask("sts", lambda client: client.get_caller_identity())
        return account

    def client(self, service: str) -> Any:
        """Make a client of one of AWS's services; the caller closes it."""
        config = import_optional("botocore.config", "aws", "aws").Config(
            connect_timeout=CONNECT_TIMEOUT_S, retries={"max_attempts": 2}
        )
        return self.session.create_client(service, region_name=self.region, config=config)

    def ask(self, service: str, call: Callable[[Any], Any]) -> Any:
        """Make one call, and turn what goes wrong into an error of this package.

        Raises
        ------
        ConfigurationError
            If AWS refuses the call.
        ClusterError
            If it does not answer.
        """
        exceptions = import_optional("botocore.exceptions", "aws", "aws")
        try:
            with closing(self.client(service)) as client:
                return call(client)
        except exceptions.ClientError as error:
            raise ConfigurationError(f"AWS refused in region {self.region}: {error}") from error
        except exceptions.BotoCoreError as error:
            raise ClusterError(
                f"AWS could not be asked ({service} in region {self.region}): {error}"
            ) from error

    def instance_type(self, name: str) -> InstanceType:
        """Look up what a kind of virtual machine has.

        Raises
        ------
        ConfigurationError
            If it does not exist in this region.
        """
        answer = self.ask(
            "ec2", lambda client: client.describe_instance_types(InstanceTypes=[name])
        )
        [found] = answer["InstanceTypes"]
        gpus = found.get("GpuInfo", {}).get("Gpus", ())
        return InstanceType(
            name=name,
            cores=found["VCpuInfo"]["DefaultVCpus"],
            memory_bytes=found["MemoryInfo"]["SizeInMiB"] * 2**20,
            gpus=sum(gpu["Count"] for gpu in gpus),
        )

    def instances(self, tag: str, value: str) -> list[dict[str, Any]]:
        """List the machines with a tag, also those that have just ended."""
        filters = [{"Name": f"tag:{tag}", "Values": [value]}]

        def pages(client: Any) -> list[dict[str, Any]]:
            return [
                instance
                for page in client.get_paginator("describe_instances").paginate(Filters=filters)
                for reservation in page["Reservations"]
                for instance in reservation["Instances"]
            ]

        found: list[dict[str, Any]] = self.ask("ec2", pages)
        return found
