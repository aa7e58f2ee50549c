"""A node of a Kubernetes cluster: runs the containers of pods as processes of this machine.

What a pod would have for itself and a process has not, its own address and its own folders, is put
in place by name: ports, names of services and folders of volumes are replaced in the container's
arguments and environment. Everything else is the pod's own.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

END_TIMEOUT_S = 10
# A container has so long to end by itself.
GRACE_S = 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Container:
    """The one container of a pod, as a process."""

    def __init__(
        self, pod: dict[str, Any], folder: Path, names: dict[str, str], secrets: dict[str, Any]
    ) -> None:
        [container] = pod["spec"]["containers"]
        self.ports = {port["containerPort"]: free_port() for port in container["ports"]}
        places = dict(names)
        for mount in container.get("volumeMounts", ()):
            [volume] = [v for v in pod["spec"]["volumes"] if v["name"] == mount["name"]]
            if "secret" in volume:
                inside = folder / pod["metadata"]["name"] / mount["name"]
                _write_secret(inside, volume["secret"], secrets)
                places[mount["mountPath"]] = str(inside)

        env = {item["name"]: item["value"] for item in container.get("env", ())}
        env = {name: _replaced(value, places) for name, value in env.items()}
        args = [_replaced(_expanded(arg, env), places) for arg in container["args"]]
        assert args[0] == "dask"
        command = [sys.executable, "-m", *args]
        if args[1] == "scheduler":
            command += ["--port", str(self.ports[8786])]
            command += ["--dashboard-address", f"127.0.0.1:{self.ports[8787]}"]
        else:
            command += ["--dashboard-address", f"127.0.0.1:{self.ports[8788]}"]
        self.log = folder / f"{pod['metadata']['name']}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], "HOME": str(folder)} | env,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ready(self) -> bool:
        """Whether the first port is open, as a probe would see it."""
        port = next(iter(self.ports.values()))
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_TIMEOUT_S)
        _end_group(self.process.pid)


def _end_group(group: int) -> None:
    """Kill what the process started, as the end of a container does, and wait for it."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def _write_secret(folder: Path, volume: dict[str, Any], secrets: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    data = secrets[volume["secretName"]]["data"]
    for item in volume["items"]:
        (folder / item["path"]).write_bytes(base64.b64decode(data[item["key"]]))


def _expanded(arg: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], arg)


def _replaced(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text
