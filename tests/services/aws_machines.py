"""A region of AWS in a network of its own: moto answers the API, machines are processes here.

``python aws_machines.py FOLDER INTERRUPT -- COMMAND...`` runs the command with the region's
credentials, and prints as JSON how it ended and what has become of every machine and container.
It has to run as the first process of a network namespace (``unshare --net``): every machine gets
the address that moto made up for it, on the loopback device.

A machine of EC2 does what its user data says, as cloud-init would; ``docker run`` starts the
container's command in this file system. A task of ECS runs the command of its definition. With a
number as INTERRUPT the command is sent SIGINT once so many machines or tasks have started.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import yaml

PORT = 5000
REGION = "us-east-1"
ACCOUNT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "moto",
    "AWS_SECRET_ACCESS_KEY": "moto",
    "AWS_DEFAULT_REGION": REGION,
    "NO_PROXY": "*",
}
DOCKER = """\
#!{python}
import os, sys
arguments = sys.argv[1:]
assert arguments.pop(0) == "run"
environment = dict(os.environ)
while arguments[0].startswith("-"):
    option = arguments.pop(0)
    if option == "-e":
        name, _, value = arguments.pop(0).partition("=")
        environment[name] = value
    else:
        assert option == "--net=host", option
arguments.pop(0)
os.execvpe(arguments[0], arguments, environment)
"""


class Region:
    """Follows what moto was asked for, and makes it so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ec2, self.ecs = boto3.client("ec2"), boto3.client("ecs")
        self.iam = boto3.client("iam")
        # As in every account of today.
        self.ecs.put_account_setting(name="taskLongArnFormat", value="enabled")
        # A task runs until it is stopped.
        transition = {"progression": "manual", "times": 1_000_000}
        _post(
            "/moto-api/state-manager/set-transition", model_name="ecs::task", transition=transition
        )
        self.seen_tasks: list[dict[str, Any]] = []
        self.machines: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (
            ("docker", DOCKER.format(python=sys.executable)),
            ("shutdown", "#!/bin/sh\n"),
            ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
            ("dask-scheduler", f'#!/bin/sh\nexec {sys.executable} -m dask scheduler "$@"\n'),
            ("dask-worker", f'#!/bin/sh\nexec {sys.executable} -m dask worker "$@"\n'),
        ):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (programs / "env").symlink_to(shutil.which("env"))
        self.programs = str(programs)

    def instances(self) -> list[dict[str, Any]]:
        return [
            instance
            for reservation in self.ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        ]

    def follow(self) -> None:
        for instance in self.instances():
            name, state = instance["InstanceId"], instance["State"]["Name"]
            if state == "running" and name not in self.machines:
                self._boot(name, instance)
            elif state in {"shutting-down", "terminated"} and name in self.machines:
                self._end(name)
            elif state == "running" and self.machines[name][0].poll() is not None:
                # It shut itself down. At AWS it would be terminated then, but moto, unlike AWS,
                # does not let it be terminated once more.
                self.ec2.stop_instances(InstanceIds=[name])
        for task in self.tasks():
            self._follow_task(task)

    def tasks(self) -> list[dict[str, Any]]:
        found = []
        for cluster in self.ecs.list_clusters()["clusterArns"]:
            for status in ("RUNNING", "STOPPED"):
                names = self.ecs.list_tasks(cluster=cluster, desiredStatus=status)["taskArns"]
                if names:
                    found += self.ecs.describe_tasks(cluster=cluster, tasks=names)["tasks"]
        return found

    def _follow_task(self, task: dict[str, Any]) -> None:
        name = task["taskArn"].rpartition("/")[2]
        if task["desiredStatus"] == "STOPPED":
            if name in self.machines:
                self._end(name)
        elif name not in self.machines:
            self._run_task(name, task)

    def _run_task(self, name: str, task: dict[str, Any]) -> None:
        definition = self.ecs.describe_task_definition(taskDefinition=task["taskDefinitionArn"])
        [container] = definition["taskDefinition"]["containerDefinitions"]
        [overrides] = task["overrides"]["containerOverrides"]
        env = {"PATH": self.programs, "HOME": str(self.folder)}
        for item in (*container["environment"], *overrides["environment"]):
            env[item["name"]] = item["value"]
        [interface] = task["attachments"]
        details = {item["name"]: item["value"] for item in interface["details"]}
        _give_address(details["privateIPv4Address"])
        command = overrides["command"]
        # The path of the container's own shell.
        command = [str(Path(self.programs, command[0])), *command[1:]]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.machines[name] = (process, details["privateIPv4Address"])
        self.seen_tasks.append({"task": task, "definition": definition["taskDefinition"]})

    def left(self) -> dict[str, Any]:
        """Say what the account still has."""
        groups = self.ec2.describe_security_groups()["SecurityGroups"]
        return {
            "clusters": [
                cluster["clusterName"]
                for cluster in self.ecs.describe_clusters(
                    clusters=self.ecs.list_clusters()["clusterArns"]
                )["clusters"]
                if cluster["status"] == "ACTIVE"
            ],
            "definitions": self.ecs.list_task_definitions(status="ACTIVE")["taskDefinitionArns"],
            "roles": [role["RoleName"] for role in self.iam.list_roles()["Roles"]],
            "groups": [g["GroupName"] for g in groups if g["GroupName"] != "default"],
        }

    def _boot(self, name: str, instance: dict[str, Any]) -> None:
        answer = self.ec2.describe_instance_attribute(InstanceId=name, Attribute="userData")
        text = base64.b64decode(answer["UserData"]["Value"]).decode()
        assert text.startswith("#cloud-config")
        commands = yaml.safe_load(text)["runcmd"]
        # Nothing else may run on the machine that plays this one.
        assert [command.split()[0] for command in commands] == ["docker", "shutdown"], commands
        address = instance["PublicIpAddress"]
        for each in (address, instance["PrivateIpAddress"]):
            _give_address(each)
        (self.folder / f"{name}.yaml").write_text(text)
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", "\n".join(commands)],
                env={"PATH": self.programs, "HOME": str(self.folder)},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.machines[name] = (process, address)

    def _end(self, name: str) -> None:
        process, _ = self.machines[name]
        _kill_group(process)

    def end(self) -> None:
        for process, _ in self.machines.values():
            _kill_group(process)


def _post(path: str, **body: Any) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()


def _give_address(address: str) -> None:
    ip = shutil.which("ip")
    subprocess.run([ip, "address", "replace", f"{address}/32", "dev", "lo"], check=True)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(10)


def _start_moto(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "moto.log").open("wb") as log:
        moto = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)],
            # Roles need the policies of AWS. Its thousand images would take seconds to make.
            env={
                **os.environ,
                "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
                "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", PORT)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return moto
    raise TimeoutError((folder / "moto.log").read_text())


def main() -> None:
    folder, interrupt = Path(sys.argv[1]), int(sys.argv[2])
    command = sys.argv[sys.argv.index("--") + 1 :]
    subprocess.run([shutil.which("ip"), "link", "set", "lo", "up"], check=True)
    os.environ.update(ACCOUNT)
    moto = _start_moto(folder)
    job = region = None
    try:
        region = Region(folder)
        places = {
            "AMI": region.ec2.register_image(Name="docker")["ImageId"],
            "GROUP": region.ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"],
        }
        for name, place in places.items():
            command = [part.replace(f"@{name}@", place) for part in command]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            job = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        while job.poll() is None:
            region.follow()
            if interrupt and len(region.machines) >= interrupt:
                os.killpg(job.pid, signal.SIGINT)
                interrupt = 0
            time.sleep(0.1)
        said = {
            "returncode": job.returncode,
            "out": (folder / "out").read_text(),
            "err": (folder / "err").read_text(),
            "instances": region.instances(),
            "tasks": region.seen_tasks,
            "left": region.left(),
        }
        sys.stdout.write(json.dumps(said, default=str))
    finally:
        if job is not None and job.poll() is None:
            _kill_group(job)
        if region is not None:
            region.end()
        moto.terminate()
        moto.wait(10)


if __name__ == "__main__":
    main()
