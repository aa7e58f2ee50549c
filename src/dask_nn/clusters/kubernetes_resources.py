"""What is posted to Kubernetes for a request: pure functions from words to resources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_bytes

from dask_nn.clusters.known_names import nearest
from dask_nn.clusters.kubernetes_pods import merge_pod
from dask_nn.clusters.kubernetes_tls import TLS_FOLDER, tls_environment, tls_volume
from dask_nn.clusters.kubernetes_values import (
    check_labels,
    check_name,
    check_number,
    check_tolerations,
    cpu,
    memory,
)
from dask_nn.clusters.option_types import MAPPING, SWITCH, check_types
from dask_nn.clusters.optional import import_optional
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from dask_nn.clusters.request import ClusterRequest

__all__ = ["KubernetesOptions", "autoscaler_resource", "cluster_resource", "has_tls"]

GPU = "nvidia.com/gpu"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - mounted inside a pod of its own
SCHEDULER_PORT = 8786
# With what the operator adds to it, it must not be longer than a name may be.
LONGEST_NAME = 63 - len("-scheduler")
# How long a worker looks for its scheduler, and Kubernetes starts it again after that.
DEATH_TIMEOUT_S = 300
# Of the scheduler's service.
TAKEN = {"clusterIP", "ports", "selector", "type"}
# Beside those whose values have rules of their own.
TYPES = {
    "port_forward": SWITCH,
    "scheduler_pod": MAPPING,
    "scheduler_service": MAPPING,
    "worker_pod": MAPPING,
}


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """The options of cluster kind ``"kubernetes"``.

    Parameters
    ----------
    image : str
        Container image with dask-nn and PyTorch, for the scheduler and the workers.
    name : str, optional
        Name of the DaskCluster; one that nobody has yet by default.
    namespace : str, optional
        Where it is made; that of the kubeconfig's context by default.
    node_selector : mapping of str to str
        Labels that a node must have to get a worker.
    tolerations : sequence of mappings
        Taints of nodes that workers bear, as Kubernetes writes them.
    shared_memory : str, optional
        Most that a worker's /dev/shm may hold; half of the worker's memory by default. Kubernetes
        counts what lies there as the worker's memory.
    scheduler_cores : float or str
        Cores of the scheduler; also as Kubernetes writes them, such as ``"500m"``.
    scheduler_memory : str
        Memory of the scheduler.
    service_type : str
        Kubernetes service of the scheduler: ``"ClusterIP"``, or ``"NodePort"`` or
        ``"LoadBalancer"``, which others reach too, so that there is always TLS then. They also
        reach the dashboard's port, without TLS; see docs/clusters/kubernetes.md.
    scheduler_service : mapping
        Further fields of the scheduler's service, such as ``loadBalancerSourceRanges``.
    idle_timeout_s : int
        The operator deletes a cluster that had nothing to do for so long, which ends the pods of a
        client that died; 0 never does.
    tls_secret : str, optional
        A secret with the certificates that exists already, instead of a new one; the client's own
        are read from it, too.
    worker_pod, scheduler_pod : mapping
        Further fields of the pods, such as ``serviceAccountName`` or ``imagePullSecrets``; see
        `merge_pod`. Their containers are named ``worker`` and ``scheduler``.
    resource_timeout_s : int
        How long the operator may take to see the cluster.
    port_forward : bool
        Reach the scheduler through the API server, without trying its name first.

    Raises
    ------
    ConfigurationError
        If the image is missing or a value cannot work.
    """

    image: str
    name: str | None = None
    namespace: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    shared_memory: str | None = None
    scheduler_cores: float | str = 1
    scheduler_memory: str = "2 GiB"
    service_type: str = "ClusterIP"
    scheduler_service: Mapping[str, Any] = field(default_factory=dict)
    idle_timeout_s: int = 3600
    tls_secret: str | None = None
    worker_pod: Mapping[str, Any] = field(default_factory=dict)
    scheduler_pod: Mapping[str, Any] = field(default_factory=dict)
    resource_timeout_s: int = 60
    port_forward: bool = False

    def __post_init__(self) -> None:
        check_types(vars(self), TYPES)
        for name in TAKEN & set(self.scheduler_service):
            why = "give service_type" if name == "type" else "the operator needs it as it is"
            raise ConfigurationError(f"scheduler_service cannot set {name}; {why}")
        services = ("ClusterIP", "NodePort", "LoadBalancer")
        if self.service_type not in services:
            raise ConfigurationError(
                f"service_type must be one of {', '.join(services)}, got {self.service_type!r}"
            )
        for name, longest in (("name", LONGEST_NAME), ("namespace", 63), ("tls_secret", 63)):
            if getattr(self, name) is not None:
                check_name(name, getattr(self, name), longest)
        check_number("idle_timeout_s", self.idle_timeout_s)
        check_number("resource_timeout_s", self.resource_timeout_s)
        check_labels("node_selector", self.node_selector)
        check_tolerations(self.tolerations)
        cpu("scheduler_cores", self.scheduler_cores)
        memory("scheduler_memory", self.scheduler_memory)
        if self.shared_memory is not None:
            memory("shared_memory", self.shared_memory)
        object.__setattr__(self, "tolerations", tuple(self.tolerations))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> KubernetesOptions:
        """Read the options of a request.

        Raises
        ------
        ConfigurationError
            If one is unknown, with the nearest that exists; or the image is missing.
        """
        known = list(cls.__dataclass_fields__)
        for name in options:
            if name not in known:
                raise ConfigurationError(
                    f"cluster kind 'kubernetes' has no option {name!r}{nearest(name, known)}"
                )
        if not isinstance(options.get("image"), str) or not options["image"]:
            raise ConfigurationError(
                "cluster kind 'kubernetes' needs image, a container image with dask-nn and PyTorch "
                f'such as "registry.example.com/me/dask-nn:1"; got {options.get("image")!r}'
            )
        return cls(**{name: value for name, value in options.items() if value is not None})

    def named(self, name: str) -> KubernetesOptions:
        """Give the cluster a name if it has none."""
        return self if self.name else replace(self, name=name)


def cluster_resource(request: ClusterRequest, options: KubernetesOptions) -> dict[str, Any]:
    """Describe the cluster of a request as a DaskCluster resource of the Dask operator.

    A worker has a pod of its own, with the cores and the memory that were asked for as request and
    as limit, and with ``gpus=1`` one whole GPU.

    Parameters
    ----------
    request : ClusterRequest
        What is asked for.
    options : KubernetesOptions
        With a name.

    Returns
    -------
    dict
        The resource, ready to be posted.

    Raises
    ------
    ConfigurationError
        If dask-kubernetes is not installed.
    """
    operator = import_optional("dask_kubernetes.operator", "kubernetes", "kubernetes")
    resource: dict[str, Any] = operator.make_cluster_spec(
        name=options.name,
        image=options.image,
        n_workers=request.wanted or 1,
        env=dict(request.env),
        worker_command=_worker_command(request, options),
        scheduler_service_type=options.service_type,
        idle_timeout=options.idle_timeout_s,
    )
    worker = resource["spec"]["worker"]["spec"]
    scheduler = resource["spec"]["scheduler"]["spec"]

    [container] = worker["containers"]
    container["resources"] = _worker_resources(request)
    container["volumeMounts"] = [{"name": "shared-memory", "mountPath": SHARED_MEMORY}]
    worker["volumes"] = [_shared_memory(request, options)]
    if options.node_selector:
        worker["nodeSelector"] = dict(options.node_selector)
    if options.tolerations:
        worker["tolerations"] = [dict(toleration) for toleration in options.tolerations]

    [container] = scheduler["containers"]
    amounts = {
        "cpu": cpu("scheduler_cores", options.scheduler_cores),
        "memory": memory("scheduler_memory", options.scheduler_memory),
    }
    container["resources"] = {"requests": dict(amounts), "limits": amounts}
    container["args"] = ["dask", "scheduler", "--host", "0.0.0.0"]  # noqa: S104 - in its own pod
    if has_tls(request, options):
        container["args"] += ["--protocol", "tls"]
        container["env"] = [*container["env"], _with_api()]
        for role, pod in (("scheduler", scheduler), ("worker", worker)):
            _add_certificates(role, pod, options)
    resource["spec"]["worker"]["spec"] = merge_pod(worker, options.worker_pod)
    resource["spec"]["scheduler"]["spec"] = merge_pod(scheduler, options.scheduler_pod)
    resource["spec"]["scheduler"]["service"].update(options.scheduler_service)
    return resource


def is_reachable(options: KubernetesOptions) -> bool:
    """Tell whether the scheduler's service lets others in than those of the same Kubernetes."""
    return options.service_type != "ClusterIP" or bool(options.scheduler_service.get("externalIPs"))


def has_tls(request: ClusterRequest, options: KubernetesOptions) -> bool:
    """Tell whether the cluster encrypts."""
    return bool(request.security) or options.tls_secret is not None


def autoscaler_resource(name: str, minimum: int, maximum: int) -> dict[str, Any]:
    """Describe the DaskAutoscaler that keeps a cluster between two numbers of workers."""
    labels = {"dask.org/cluster-name": name, "dask.org/component": "autoscaler"}
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskAutoscaler",
        "metadata": {"name": name, "labels": labels},
        "spec": {"cluster": name, "minimum": minimum, "maximum": maximum},
    }


def _worker_command(request: ClusterRequest, options: KubernetesOptions) -> list[str]:
    command = ["dask", "worker"]
    if has_tls(request, options):
        # The operator tells workers an address without TLS.
        command.append(f"tls://{options.name}-scheduler:{SCHEDULER_PORT}")
    command += ["--nthreads", str(request.cores), "--death-timeout", str(DEATH_TIMEOUT_S)]
    if request.memory is not None:
        command += ["--memory-limit", str(parse_bytes(request.memory))]
    for module in request.preload:
        command += ["--preload", module]
    return command


def _worker_resources(request: ClusterRequest) -> dict[str, Any]:
    amounts = {"cpu": str(request.cores)}
    if request.memory is not None:
        amounts["memory"] = str(parse_bytes(request.memory))
    if request.gpus:
        amounts[GPU] = str(request.gpus)
    # Equal requests and limits: the node keeps them free, and evicts these pods last.
    return {"requests": dict(amounts), "limits": amounts}


def _shared_memory(request: ClusterRequest, options: KubernetesOptions) -> dict[str, Any]:
    volume: dict[str, Any] = {"medium": "Memory"}
    if options.shared_memory is not None:
        volume["sizeLimit"] = memory("shared_memory", options.shared_memory)
    elif request.memory is not None:
        volume["sizeLimit"] = str(parse_bytes(request.memory) // 2)
    return {"name": "shared-memory", "emptyDir": volume}


def _with_api() -> dict[str, str]:
    """Let the operator ask the scheduler over HTTP, as it cannot speak TLS with it."""
    routes = list(dask.config.get("distributed.scheduler.http.routes"))
    routes.append("distributed.http.scheduler.api")
    return {"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": repr(routes)}


def _add_certificates(role: str, pod: dict[str, Any], options: KubernetesOptions) -> None:
    secret = options.tls_secret or f"{options.name}-tls"
    pod["volumes"] = [*pod.get("volumes", ()), tls_volume(role, secret)]
    [container] = pod["containers"]
    mount = {"name": "tls", "mountPath": TLS_FOLDER, "readOnly": True}
    container["volumeMounts"] = [*container.get("volumeMounts", ()), mount]
    container["env"] = [*container["env"], *tls_environment(role)]
