"""An API server of Kubernetes with the Dask operator's custom resources, and one node.

It records every request, refuses resources that the operator's own schemas do not allow, and makes
of a DaskCluster what the operator makes of it, with the operator's own functions: a scheduler, its
service, a group of workers. Their containers run as processes of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aiohttp import WSMsgType, web
from dask_kubernetes.operator.controller import controller as operator
from kubernetes_node import Container
from kubernetes_schemas import errors_of

DASK = "kubernetes.dask.org/v1"
PLURALS = {
    "daskclusters": ("DaskCluster", DASK),
    "daskworkergroups": ("DaskWorkerGroup", DASK),
    "daskautoscalers": ("DaskAutoscaler", DASK),
    "pods": ("Pod", "v1"),
    "services": ("Service", "v1"),
    "secrets": ("Secret", "v1"),
}
# A registry from which nothing can be pulled.
NOWHERE = "registry.invalid/"


class KubernetesApi:
    """The server, in a thread of its own for the length of a ``with`` block.

    Parameters
    ----------
    folder : Path
        For the kubeconfig, secrets and logs.
    installed : bool
        Whether the operator's custom resources are.
    """

    def __init__(self, folder: Path, *, installed: bool = True) -> None:
        self.folder = folder
        self.installed = installed
        self.requests: list[tuple[str, str, Any]] = []
        self.objects: dict[str, dict[str, Any]] = {plural: {} for plural in PLURALS}
        self.containers: dict[str, Container] = {}
        self.kubeconfig = folder / "kubeconfig"
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def posted(self, kind: str) -> list[Any]:
        """Return the resources of a kind that were posted, in that order."""
        plural = next(p for p, (k, _) in PLURALS.items() if k == kind)
        return [
            body
            for method, path, body in self.requests
            if method == "POST" and path.endswith(plural)
        ]

    def store(self, plural: str, item: dict[str, Any], namespace: str) -> None:
        """Let there be a resource, without what follows from it."""
        if texts := item.pop("stringData", None):
            encoded = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
            item["data"] = item.get("data", {}) | encoded
        item["metadata"] |= {
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": datetime.now(UTC).isoformat(),
        }
        self.objects[plural][item["metadata"]["name"]] = item

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/version/", _version)
        app.router.add_get("/api{slash:/?}", _api_versions)
        app.router.add_get("/apis{slash:/?}", _api_groups)
        for base in ("/api/v1", f"/apis/{DASK}"):
            app.router.add_get(f"{base}{{slash:/?}}", self._resource_list)
            place = f"{base}/namespaces/{{namespace}}/{{plural}}"
            app.router.add_get(place, self._list)
            app.router.add_post(place, self._create)
            app.router.add_get(f"{place}/{{name}}", self._get)
            app.router.add_patch(f"{place}/{{name}}", self._patch)
            app.router.add_delete(f"{place}/{{name}}", self._delete)
            app.router.add_get(f"{place}/{{name}}/portforward", self._forward)
            app.router.add_get(f"{place}/{{name}}/log", self._log)
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        [address] = runner.addresses
        self.kubeconfig.write_text(_KUBECONFIG.format(port=address[1]))
        self._started.set()
        await self._stop.wait()
        await asyncio.gather(*map(self._end_pod, list(self.containers)))
        await runner.cleanup()

    # What an API server does.

    async def _resource_list(self, request: web.Request) -> web.Response:
        version = "v1" if request.path.startswith("/api/v1") else DASK
        resources = [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True}
            | {"verbs": ["create", "delete", "get", "list", "patch", "watch"]}
            for plural, (kind, of) in PLURALS.items()
            if of == version
        ]
        return web.json_response(
            {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        )

    async def _list(self, request: web.Request) -> web.Response:
        kind, version = PLURALS[request.match_info["plural"]]
        labels = _pairs(request.query.get("labelSelector", ""))
        fields = _pairs(request.query.get("fieldSelector", ""))
        items = [
            item
            for item in map(self._seen, self._of(request).values())
            if labels <= item["metadata"].get("labels", {}).items()
            and all(_field(item, path) == value for path, value in fields)
        ]
        return web.json_response({"kind": f"{kind}List", "apiVersion": version, "items": items})

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(("POST", request.path, copy.deepcopy(body)))
        plural = request.match_info["plural"]
        if plural.startswith("dask"):
            if not self.installed:
                return _refuse(404, "NotFound", "the server could not find the requested resource")
            posted = {**body, "metadata": dict(body["metadata"])}
            if errors := errors_of(posted):
                return _refuse(422, "Invalid", "; ".join(errors))
        self.store(plural, body, request.match_info["namespace"])
        if plural == "daskclusters":
            await self._operate(body)
        if plural == "daskautoscalers":
            _owned(body, self.objects["daskclusters"][body["spec"]["cluster"]])
        return web.json_response(body, status=201)

    async def _get(self, request: web.Request) -> web.Response:
        found = self._of(request).get(request.match_info["name"])
        if found is None:
            return _refuse(404, "NotFound", f"{request.path} not found")
        return web.json_response(self._seen(found))

    async def _patch(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(("PATCH", request.path, body))
        found = self._of(request).get(request.match_info["name"])
        if found is None:
            return _refuse(404, "NotFound", f"{request.path} not found")
        _merge(found, body)
        if found["kind"] == "DaskWorkerGroup":
            await self._scale(found)
        return web.json_response(self._seen(found))

    async def _delete(self, request: web.Request) -> web.Response:
        self.requests.append(("DELETE", request.path, None))
        found = self._of(request).pop(request.match_info["name"], None)
        if found is None:
            return _refuse(404, "NotFound", f"{request.path} not found")
        await self._collect(found)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _log(self, request: web.Request) -> web.Response:
        lines = self.containers[request.match_info["name"]].log.read_text().splitlines()
        wanted = int(request.query.get("tailLines", len(lines)))
        return web.Response(text="".join(f"{line}\n" for line in lines[-wanted:]))

    async def _forward(self, request: web.Request) -> web.WebSocketResponse:
        """Carry one connection to a port of a pod, as `kubectl port-forward` does."""
        container = self.containers[request.match_info["name"]]
        asked = int(request.query["ports"])
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        for channel in (b"\0", b"\1"):
            await socket.send_bytes(channel + asked.to_bytes(2, "little"))
        reader, writer = await asyncio.open_connection("127.0.0.1", container.ports[asked])

        async def back() -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 20):
                    await socket.send_bytes(b"\0" + data)
            await socket.close()

        task = asyncio.create_task(back())
        with contextlib.suppress(ConnectionError):
            async for message in socket:
                if message.type == WSMsgType.BINARY:
                    writer.write(message.data[1:])
                    await writer.drain()
        writer.close()
        await task
        return socket

    # What the operator does, with its own functions.

    async def _operate(self, cluster: dict[str, Any]) -> None:
        name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        spec = copy.deepcopy(cluster["spec"])
        deployment = operator.build_scheduler_deployment_spec(
            name, spec["scheduler"]["spec"], {}, {}
        )
        self._start_pod(deployment, cluster)
        service = operator.build_scheduler_service_spec(name, spec["scheduler"]["service"], {}, {})
        service["spec"]["clusterIP"] = "10.96.0.10"
        self.store("services", _owned(service, cluster), namespace)
        group = operator.build_default_worker_group_spec(name, spec["worker"], {}, {})
        self.store("daskworkergroups", _owned(group, cluster), namespace)
        await self._scale(group)
        cluster["status"] = {"phase": "Running"}

    async def _scale(self, group: dict[str, Any]) -> None:
        name = group["metadata"]["name"]
        labels = {"dask.org/workergroup-name": name}
        pods = [
            pod["metadata"]["name"]
            for pod in self.objects["pods"].values()
            if labels.items() <= pod["metadata"]["labels"].items()
        ]
        wanted = group["spec"]["worker"]["replicas"]
        for _ in range(wanted - len(pods)):
            deployment = operator.build_worker_deployment_spec(
                worker_group_name=name,
                namespace=group["metadata"]["namespace"],
                cluster_name=group["spec"]["cluster"],
                uuid=uuid.uuid4().hex[:10],
                pod_spec=group["spec"]["worker"]["spec"],
                annotations={},
                labels={"dask.org/cluster-name": group["spec"]["cluster"]},
            )
            self._start_pod(deployment, group)
        await asyncio.gather(*map(self._end_pod, pods[wanted:]))

    def _start_pod(self, deployment: dict[str, Any], owner: dict[str, Any]) -> None:
        template = deployment["spec"]["template"]
        pod = {"kind": "Pod", "apiVersion": "v1", **copy.deepcopy(template)}
        namespace = owner["metadata"]["namespace"]
        self.store("pods", _owned(pod, owner), namespace)
        cluster = pod["metadata"]["labels"]["dask.org/cluster-name"]
        service = f"{cluster}-scheduler"
        names = {}
        if service in self.containers:
            place = f"127.0.0.1:{self.containers[service].ports[8786]}"
            for alias in (f"{service}.{namespace}.svc.cluster.local:8786", f"{service}:8786"):
                names[alias] = place
        if _image(pod).startswith(NOWHERE):
            return
        self.containers[pod["metadata"]["name"]] = Container(
            pod, self.folder, names, self.objects["secrets"]
        )

    async def _end_pod(self, name: str) -> None:
        self.objects["pods"].pop(name, None)
        if container := self.containers.pop(name, None):
            await asyncio.to_thread(container.end)

    async def _collect(self, owner: dict[str, Any]) -> None:
        """Delete what a resource owned, as Kubernetes' garbage collector does."""
        owned = [
            item
            for objects in self.objects.values()
            for item in objects.values()
            if any(
                reference["uid"] == owner["metadata"]["uid"]
                for reference in item["metadata"].get("ownerReferences", ())
            )
        ]
        pods = [item["metadata"]["name"] for item in owned if item["kind"] == "Pod"]
        await asyncio.gather(*map(self._end_pod, pods))
        for item in owned:
            for objects in self.objects.values():
                if objects.get(item["metadata"]["name"]) is item:
                    del objects[item["metadata"]["name"]]
            await self._collect(item)

    def _of(self, request: web.Request) -> dict[str, Any]:
        return self.objects[request.match_info["plural"]]

    def _seen(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["kind"] != "Pod":
            return item
        container = self.containers.get(item["metadata"]["name"])
        phase, waiting = "Running", None
        if container is None:
            phase = "Pending"
            waiting = {
                "reason": "ImagePullBackOff",
                "message": f'Back-off pulling image "{_image(item)}"',
            }
        elif container.process.poll() is not None:
            # What the kubelet says between two starts; this one does not start it again.
            waiting = {"reason": "CrashLoopBackOff", "message": "back-off restarting container"}
        ready = str(container is not None and container.ready)
        conditions = [{"type": name, "status": ready} for name in ("Ready", "ContainersReady")]
        status: dict[str, Any] = {"phase": phase, "conditions": conditions}
        if waiting:
            status["containerStatuses"] = [{"state": {"waiting": waiting}, "restartCount": 3}]
        return {**item, "status": status}


def _image(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def _owned(item: dict[str, Any], owner: dict[str, Any]) -> dict[str, Any]:
    reference = {"kind": owner["kind"], "name": owner["metadata"]["name"]}
    reference["uid"] = owner["metadata"]["uid"]
    item["metadata"] = {**item["metadata"], "ownerReferences": [reference]}
    return item


def _pairs(selector: str) -> set[tuple[str, str]]:
    found = (pair.partition("=") for pair in selector.split(",") if pair)
    return {(name, value) for name, _, value in found}


def _field(item: Any, path: str) -> Any:
    for name in path.split("."):
        item = item.get(name, {})
    return item


def _merge(into: dict[str, Any], patch: dict[str, Any]) -> None:
    for name, value in patch.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _refuse(code: int, reason: str, message: str) -> web.Response:
    status = {"kind": "Status", "status": "Failure", "code": code}
    return web.json_response(status | {"reason": reason, "message": message}, status=code)


async def _version(_: web.Request) -> web.Response:
    return web.json_response({"major": "1", "minor": "33", "gitVersion": "v1.33.0"})


async def _api_versions(_: web.Request) -> web.Response:
    return web.json_response({"kind": "APIVersions", "versions": ["v1"]})


async def _api_groups(_: web.Request) -> web.Response:
    version = {"groupVersion": DASK, "version": "v1"}
    group = {"name": "kubernetes.dask.org", "versions": [version], "preferredVersion": version}
    return web.json_response({"kind": "APIGroupList", "groups": [group]})


_KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: test
clusters: [{{name: test, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: test, user: {{token: not-checked}}}}]
contexts: [{{name: test, context: {{cluster: test, user: test, namespace: training}}}}]
"""
