"""A cluster in Kubernetes, kept by the Dask operator."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from distributed import Security

from dask_nn.clusters.kubernetes_resources import (
    KubernetesOptions,
    cluster_resource,
    has_tls,
    is_reachable,
)
from dask_nn.clusters.kubernetes_tls import tls_secret
from dask_nn.clusters.optional import import_optional
from dask_nn.clusters.serve import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from distributed import Client

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["check_request", "open_cluster"]

EXTRA = "kubernetes"


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Run the Kubernetes cluster of a request, through the Dask operator.

    The operator itself starts a worker again that ended, and deletes the cluster that nobody uses.

    Raises
    ------
    ConfigurationError
        If dask-kubernetes is not installed or an option cannot work.
    ClusterError
        If Kubernetes, the operator or the workers did not answer in time.
    """
    check_request(request)
    options = KubernetesOptions.of(request.options).named(f"dask-nn-{secrets.token_hex(4)}")
    from dask_nn.clusters.kubernetes_cluster import (
        NNKubeCluster,
        delete_what_is_left,
        describe,
        hopeless,
    )

    request = _secured(request, options)
    resource = cluster_resource(request, options)
    secret: dict[str, Any] | None = None
    security: Security | None = None
    # Who names a secret takes all certificates from there.
    if isinstance(request.security, Security) and options.tls_secret is None:
        security = request.security
        secret = tls_secret(f"{options.name}-tls", security)

    def make() -> NNKubeCluster:
        return NNKubeCluster(resource, secret, security, options)

    with serve(
        request,
        make,
        # The operator starts a pod again that ended.
        keep=False,
        explain=describe,
        hopeless=hopeless,
        close=delete_what_is_left,
    ) as client:
        yield client


def _secured(request: ClusterRequest, options: KubernetesOptions) -> ClusterRequest:
    """Ask for TLS where the scheduler can be reached from outside, if nothing is said of it."""
    if has_tls(request, options) or not is_reachable(options):
        return request
    return replace(request, security=True).with_certificates()


def check_request(request: ClusterRequest) -> None:
    """Check the options, without Kubernetes.

    Raises
    ------
    ConfigurationError
        If one cannot work, or dask-kubernetes is not installed.
    """
    KubernetesOptions.of(request.options)
    import_optional("dask_kubernetes.operator", EXTRA, request.kind)
