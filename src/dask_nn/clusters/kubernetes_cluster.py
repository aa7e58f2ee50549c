"""dask-kubernetes' own cluster class, taught to use TLS and to say what Kubernetes refused.

Imported only where dask-kubernetes is installed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import kr8s
from dask_kubernetes.operator import KubeCluster
from dask_kubernetes.operator._objects import DaskAutoscaler, DaskCluster
from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode, wait_for_service
from dask_kubernetes.operator.networking import get_scheduler_address, wait_for_scheduler
from distributed.core import rpc
from kr8s.asyncio.objects import Pod, Secret
from tornado.ioloop import IOLoop

from dask_nn.clusters.kubernetes_resources import autoscaler_resource
from dask_nn.clusters.kubernetes_status import StuckPods, containers_in, state_of, troubles
from dask_nn.clusters.kubernetes_tls import security_in
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distributed import Security

    from dask_nn.clusters.kubernetes_resources import KubernetesOptions

__all__ = ["NNKubeCluster", "delete_what_is_left", "describe", "hopeless"]

DELETE_TIMEOUT_S = 30
LOG_TAIL_LINES = 10


class NNKubeCluster(KubeCluster):  # type: ignore[misc]  # dask-kubernetes ships no annotations
    """A cluster of the Dask operator.

    Parameters
    ----------
    resource : dict
        The DaskCluster to post.
    secret : dict or None
        A secret to post before it.
    security : distributed.Security or None
        The client's certificates; dask-kubernetes itself knows connections without TLS only. They
        are read from ``options.tls_secret`` where that is given.
    options : KubernetesOptions
        Where, and how to reach it.
    """

    def __init__(
        self,
        resource: dict[str, Any],
        secret: dict[str, Any] | None,
        security: Security | None,
        options: KubernetesOptions,
    ) -> None:
        self.security = security
        self._secret = secret
        self._tls_secret = options.tls_secret
        self.stuck_pods = StuckPods()
        # Whether this client made it, and so ends it.
        self.posted = False
        super().__init__(
            custom_cluster_spec=resource,
            namespace=options.namespace,
            resource_timeout=options.resource_timeout_s,
            port_forward_cluster_ip=options.port_forward,
            create_mode=CreateMode.CREATE_ONLY,
            asynchronous=True,
            loop=IOLoop.current(),
            quiet=True,
        )

    @property
    def plan(self) -> set[int]:
        """The workers that the cluster is made with, by number."""
        return set(range(self._custom_cluster_spec["spec"]["worker"]["replicas"]))

    async def _create_cluster(self) -> None:
        try:
            if self._tls_secret is not None:
                self.security = await _read_security(self._tls_secret, self.namespace)
            self.posted = True
            if self._secret is not None:
                await (await Secret(self._secret, namespace=self.namespace)).create()
            if self.security is None:
                await super()._create_cluster()
            else:
                await self._create_with_tls(self.security)
        except kr8s.ServerError as error:
            raise ClusterError(_refusal(error, self.namespace)) from error

    async def _create_with_tls(self, security: Security) -> None:
        cluster = await DaskCluster(self._custom_cluster_spec, namespace=self.namespace)
        await cluster.create()
        if self._secret is not None:
            # Kubernetes deletes the secret with the cluster, even if this client dies.
            await cluster.adopt(await Secret(self._secret, namespace=self.namespace))
        await self._wait_for_controller()
        await wait_for_scheduler(self.name, self.namespace, timeout=self._resource_timeout)
        service = f"{self.name}-scheduler"
        await wait_for_service(service, self.namespace)
        address = (await self._get_scheduler_address()).replace("tcp://", "tls://")
        arguments = security.get_connection_args("client")
        self.scheduler_comm = rpc(address, timeout=60, connection_args=arguments)
        dashboard = await get_scheduler_address(
            service,
            self.namespace,
            port_name="http-dashboard",
            port_forward_cluster_ip=self.port_forward_cluster_ip,
        )
        self.forwarded_dashboard_port = dashboard.rpartition(":")[2]

    async def _adapt(self, minimum: int, maximum: int) -> None:
        # The library's own has labels that a strict API server refuses.
        resource = autoscaler_resource(self.name, minimum, maximum)
        autoscaler = await DaskAutoscaler(resource, namespace=self.namespace)
        if await autoscaler.exists():
            await autoscaler.patch({"spec": resource["spec"]})
        else:
            await autoscaler.create()

    async def _close(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the library's
        # Whoever closes this cluster wants its pods gone, but not those of another one.
        self.shutdown_on_close = self.posted
        await super()._close(timeout or DELETE_TIMEOUT_S)


async def _read_security(name: str, namespace: str) -> Security:
    secret = await Secret(name, namespace=namespace)
    try:
        await secret.refresh()
    except kr8s.NotFoundError:
        raise ConfigurationError(f"there is no tls_secret {name!r} in {namespace!r}") from None
    return security_in(secret.to_dict())


async def delete_what_is_left(cluster: Any) -> None:
    """Delete the resources of a cluster whose start or end was interrupted."""
    if not cluster.posted:
        return
    kinds = [(DaskCluster, cluster.name)]
    if cluster._secret is not None:  # noqa: SLF001 - of this module
        kinds.append((Secret, cluster._secret["metadata"]["name"]))  # noqa: SLF001
    for kind, name in kinds:
        with contextlib.suppress(kr8s.NotFoundError):
            await (await kind(name, namespace=cluster.namespace)).delete()


async def describe(cluster: Any) -> str:
    """Say of each pod that is not ready what Kubernetes says of it, and how its log ends."""
    return await _told(pod for pod in await _pods(cluster) if troubles(_status(pod)))


async def hopeless(cluster: Any) -> str:
    """Say which pods Kubernetes cannot start, or has tried to often enough."""
    pods = await _pods(cluster)
    stuck = cluster.stuck_pods.among({pod.name: _status(pod) for pod in pods})
    told = await _told(pod for pod in pods if pod.name in stuck)
    return told and f"these pods do not start:\n{told}"


async def _told(pods: Iterable[Pod]) -> str:
    lines = []
    for pod in pods:
        lines.append(f"pod {pod.name}: {'; '.join(troubles(_status(pod)))}")
        lines += await _log_end(pod)
    return "\n".join(lines)


async def _pods(cluster: Any) -> list[Pod]:
    selector = f"dask.org/cluster-name={cluster.name}"
    listed = Pod.list(namespace=cluster.namespace, label_selector=selector)
    return [pod async for pod in listed if isinstance(pod, Pod)]


async def _log_end(pod: Pod) -> list[str]:
    """Give the last lines of a container that ended and is started again."""
    if not any(state_of(one)[0] == "CrashLoopBackOff" for one in containers_in(_status(pod))):
        return []
    try:
        lines = [line async for line in pod.logs(tail_lines=LOG_TAIL_LINES)]
    except kr8s.ServerError:
        return []
    return ["its log ends with:", *lines] if lines else []


def _status(pod: Pod) -> dict[str, Any]:
    status: dict[str, Any] = pod.to_dict().get("status", {})
    return status


def _refusal(error: kr8s.ServerError, namespace: str) -> str:
    status = error.response.status_code if error.response is not None else None
    remedy = {
        403: f"give this account the rights of docs/clusters/kubernetes.md in {namespace!r}",
        404: "install the Dask operator in this Kubernetes cluster (its custom resources are "
        "missing), or mend the namespace",
        422: "mend the option that it names",
    }.get(status or 0, "see the log of the API server")
    return f"Kubernetes refused the cluster ({status}): {error}; {remedy}"
