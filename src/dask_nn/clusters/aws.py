"""Clusters at Amazon Web Services: virtual machines of EC2, or containers of Fargate."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import dask
from distributed import Security

from dask_nn.clusters.aws_account import Account
from dask_nn.clusters.certificates import pem_texts, security_of_texts, tls_settings
from dask_nn.clusters.option_types import TEXT, check_types
from dask_nn.clusters.optional import import_optional
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_request", "open_cluster"]

TYPES = dict.fromkeys(("image", "protocol", "region", "service"), TEXT)
# dask-cloudprovider says so once the machines are there, if they took more than ten seconds; they
# always do.
SURPRISED = "Creating your cluster is taking a surprisingly long time"
SERVICES = {"ec2": "dask_nn.clusters.aws_ec2", "fargate": "dask_nn.clusters.aws_fargate"}


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Run the cluster of a request at AWS: ``options["service"]`` is ``"ec2"`` or ``"fargate"``.

    The traffic is encrypted even if nothing is said of it, with temporary certificates, because
    scheduler and workers may be reached from outside; the option ``protocol="tcp"`` leaves it open.
    From now on this process does not show dask-cloudprovider's warning of a slow start.

    Raises
    ------
    ConfigurationError
        If there are no credentials or no region, or an option cannot work.
    ClusterError
        If AWS refuses something, or the workers do not come in time.
    """
    check_request(request)
    # For good: it comes from the thread of an event loop, and others may change filters meanwhile.
    warnings.filterwarnings("ignore", message=SURPRISED, category=UserWarning)
    account = Account.of(request.options)
    if request.options.get("protocol") != "tcp" and request.security is None:
        request = replace(request, security=True).with_certificates()
    service = import_module(SERVICES[request.options.get("service", "ec2")])
    settings: dict[str, Any] = {}
    if isinstance(request.security, Security):
        # On another machine there are no files of this one.
        texts = pem_texts(request.security)
        request = replace(request, security=security_of_texts(texts))
        settings = tls_settings(texts)
    # dask-cloudprovider writes the certificates into Dask's configuration and leaves them there.
    with (
        dask.config.set(settings),
        service.open_cluster(request, account) as client,
    ):
        yield client


def check_request(request: ClusterRequest) -> None:
    """Check the options, without a connection.

    Raises
    ------
    ConfigurationError
        If one cannot work, or dask-cloudprovider is not installed.
    """
    check_types(request.options, TYPES)
    name: Any = request.options.get("service", "ec2")
    if name not in SERVICES:
        raise ConfigurationError(
            f'service must be "ec2" (virtual machines) or "fargate" (containers), got {name!r}'
        )
    protocol = request.options.get("protocol")
    if protocol not in {None, "tls", "tcp"}:
        raise ConfigurationError(f'protocol must be "tls" or "tcp", got {protocol!r}')
    if protocol == "tcp" and request.security:
        raise ConfigurationError('protocol="tcp" is without TLS and security asks for it')
    import_optional("dask_cloudprovider.aws", "aws", "aws")
    import_module(SERVICES[name]).check_options(request)
    image: Any = request.options.get("image")
    if not isinstance(image, str) or not image:
        raise ConfigurationError(
            f"service {name!r} needs image, a Docker image with dask-nn and PyTorch that AWS can "
            f"pull; got {image!r}"
        )
