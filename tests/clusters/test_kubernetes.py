from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import training_job
from distributed import Security
from kubernetes_api import NOWHERE, KubernetesApi
from kubernetes_schemas import errors_of

import dask_nn
from dask_nn.clusters.kubernetes_pods import merge_pod
from dask_nn.clusters.kubernetes_resources import (
    KubernetesOptions,
    autoscaler_resource,
    cluster_resource,
)
from dask_nn.clusters.kubernetes_tls import security_in, tls_secret
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE = "registry.example.com/dask-nn:1"
# Starting and ending processes takes long where others use the machine too.
JOB_TIMEOUT_S = 200


def resource(options: dict[str, Any] | None = None, **asked: Any) -> dict[str, Any]:
    request = ClusterRequest(kind="kubernetes", **{"workers": 2, **asked}).with_certificates()
    given = KubernetesOptions.of({"image": IMAGE, "name": "nn", **(options or {})})
    return cluster_resource(request, given)


def pod_of(part: str, cluster: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = cluster["spec"][part]["spec"]
    [container] = pod["containers"]
    return pod, container


FULL = {
    "cores": 4,
    "memory": "16 GB",
    "gpus": 1,
    "security": True,
    "env": {"NCCL_DEBUG": "WARN"},
}
FULL_OPTIONS = {
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "shared_memory": "8 GB",
    "worker_pod": {"serviceAccountName": "trainer", "imagePullSecrets": [{"name": "registry"}]},
    "service_type": "LoadBalancer",
    "scheduler_service": {"loadBalancerSourceRanges": ["192.0.2.0/24"]},
}


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return resource(FULL_OPTIONS, **FULL)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        yield api
        assert not any(api.objects.values())
        assert not api.containers


def test_the_resource_with_everything_is_what_the_operators_schema_allows(full):
    assert errors_of(full) == []


def test_a_load_balancer_lets_those_in_whom_the_user_names(full):
    service = full["spec"]["scheduler"]["service"]
    assert service["type"] == "LoadBalancer"
    assert service["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert len(service["ports"]) == 2


def test_the_smallest_resource_is_what_the_operators_schema_allows():
    assert errors_of(resource(workers=None)) == []


def test_a_worker_has_one_gpu_and_its_cores_and_memory_as_request_and_limit(full):
    _, container = pod_of("worker", full)
    amounts = {"cpu": "4", "memory": "16000000000", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert "nvidia.com/gpu" not in json.dumps(full["spec"]["scheduler"])
    assert full["spec"]["worker"]["replicas"] == 2


def test_the_workers_command_says_threads_memory_and_preloads(full):
    _, container = pod_of("worker", full)
    command = " ".join(container["args"])
    assert command.startswith("dask worker tls://nn-scheduler:8786 --nthreads 4 ")
    assert "--memory-limit 16000000000" in command
    assert "--preload torch" in command
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]


def test_dev_shm_is_as_large_as_asked_for_not_the_64_mb_of_containers(full):
    pod, container = pod_of("worker", full)
    mount = {"name": "shared-memory", "mountPath": "/dev/shm"}  # noqa: S108 - a pod's own
    assert mount in container["volumeMounts"]
    volume = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8000000000"}}
    assert volume in pod["volumes"]


def test_with_tls_each_role_finds_its_own_keys_where_the_secret_is_mounted(full):
    for part, roles in (("scheduler", {"scheduler"}), ("worker", {"worker", "client"})):
        pod, container = pod_of(part, full)
        [mount] = [m for m in container["volumeMounts"] if m["name"] == "tls"]
        [volume] = [v for v in pod["volumes"] if v["name"] == "tls"]
        assert volume["secret"]["secretName"] == "nn-tls"
        mounted = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
        env = {item["name"]: item["value"] for item in container["env"]}
        assert env["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "True"
        named = {value for name, value in env.items() if "__TLS__" in name}
        assert named == mounted
        assert {Path(name).stem for name in named} == roles | {"ca"}


def test_a_users_own_fields_leave_shared_memory_and_certificates_where_they_are(full):
    own = {
        "volumes": [{"name": "data", "hostPath": {"path": "/data"}}],
        "containers": [
            {"name": "worker", "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
            {"name": "sidecar", "image": "sidecar:1"},
        ],
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "nodeSelector": {"zone": "a"},
        "priorityClassName": "low",
    }
    cluster = resource({**FULL_OPTIONS, "worker_pod": own}, **FULL)
    assert errors_of(cluster) == []
    pod, before = cluster["spec"]["worker"]["spec"], full["spec"]["worker"]["spec"]
    assert pod["volumes"] == before["volumes"] + own["volumes"]
    assert pod["tolerations"] == before["tolerations"] + own["tolerations"]
    assert pod["nodeSelector"] == {"pool": "gpu", "zone": "a"}
    assert pod["priorityClassName"] == "low"
    [container, sidecar] = pod["containers"]
    [unchanged] = before["containers"]
    mounts = unchanged["volumeMounts"] + own["containers"][0]["volumeMounts"]
    assert container == unchanged | {"volumeMounts": mounts}
    assert sidecar == own["containers"][1]


def test_of_two_entries_with_one_name_the_users_counts():
    pod = {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}], "args": ["a"]}]}
    own = {"containers": [{"name": "worker", "env": [{"name": "A", "value": "2"}], "args": ["b"]}]}
    assert merge_pod(pod, own) == own


def test_amounts_may_be_written_as_kubernetes_writes_them():
    cluster = resource({"scheduler_cores": "500m", "scheduler_memory": "3Gi"})
    assert errors_of(cluster) == []
    _, container = pod_of("scheduler", cluster)
    assert container["resources"]["limits"] == {"cpu": "500m", "memory": str(3 * 2**30)}


def test_without_tls_there_is_no_secret_anywhere():
    assert "tls" not in json.dumps(resource())


def test_the_secret_holds_certificates_given_as_text_or_as_files(tmp_path):
    security = Security.temporary()
    (tmp_path / "key.pem").write_text(security.tls_worker_key)
    as_file = Security.temporary()
    as_file.tls_worker_key = str(tmp_path / "key.pem")
    assert tls_secret("s", as_file)["stringData"]["worker.key"] == security.tls_worker_key
    assert tls_secret("s", security)["stringData"]["ca.crt"] == security.tls_ca_file


def test_a_secret_that_lacks_a_certificate_of_the_client_is_named():
    secret = {"metadata": {"name": "own"}, "data": {"ca.crt": "", "client.key": ""}}
    with pytest.raises(ConfigurationError, match=r"'own' has no client\.crt; it has ca\.crt,"):
        security_in(secret)


@pytest.mark.parametrize("value", [None, "/nowhere/key.pem"])
def test_a_certificate_that_is_missing_is_named(value):
    security = Security.temporary()
    security.tls_worker_cert = value
    with pytest.raises(ConfigurationError, match="tls_worker_cert"):
        tls_secret("s", security)


def _misspell(cluster: dict[str, Any], path: str, wrong: str) -> dict[str, Any]:
    *inside, name = path.split(".")
    place: Any = cluster
    for step in inside:
        place = place[int(step) if step.isdigit() else step]
    place[wrong] = place.pop(name)
    return cluster


CONTAINER = "spec.worker.spec.containers.0"


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("spec.worker.replicas", "replica"),
        ("spec.worker.spec.nodeSelector", "nodeselector"),
        ("spec.worker.spec.volumes.0.emptyDir.sizeLimit", "size"),
        ("spec.worker.spec.tolerations.0.effect", "effects"),
        (f"{CONTAINER}.image", "imagee"),
        (f"{CONTAINER}.resources.limits", "limit"),
        (f"{CONTAINER}.env.0.value", "val"),
        (f"{CONTAINER}.volumeMounts.0.mountPath", "path"),
        ("spec.scheduler.service.ports.0.targetPort", "target"),
        ("metadata.name", "nam"),
    ],
)
def test_a_misspelt_field_is_refused(path, wrong):
    errors = errors_of(_misspell(resource(FULL_OPTIONS, **FULL), path, wrong))
    assert any(f"'{wrong}' was unexpected" in error for error in errors)


def test_the_autoscaler_is_what_the_operators_schema_allows():
    assert errors_of(autoscaler_resource("nn", 1, 4)) == []
    assert errors_of(autoscaler_resource("nn", 1, "four")) != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs image"),
        ({"image": IMAGE, "nodeselector": {}}, "did you mean 'node_selector'"),
        ({"image": IMAGE, "service_type": "Ingress"}, "must be one of ClusterIP"),
        ({"image": IMAGE, "shared_memory": "large"}, "must be a size with its unit"),
        ({"image": IMAGE, "worker_pod": "x"}, "worker_pod must be a mapping"),
        (
            {"image": IMAGE, "scheduler_service": {"type": "LoadBalancer"}},
            "cannot set type; give service_type",
        ),
        ({"image": IMAGE, "scheduler_service": []}, "scheduler_service must be a mapping"),
        ({"image": IMAGE, "scheduler_cores": "half"}, "scheduler_cores must be a positive number"),
        ({"image": IMAGE, "scheduler_memory": "0 GB"}, "scheduler_memory must be a size"),
        ({"image": IMAGE, "tolerations": {"key": "x"}}, "tolerations must be a list of mappings"),
        ({"image": IMAGE, "node_selector": {"gpu": True}}, "node_selector must be a mapping of"),
        ({"image": IMAGE, "idle_timeout_s": "1h"}, "idle_timeout_s must be a whole number"),
        ({"image": IMAGE, "name": "My_Cluster"}, "name must be small letters"),
        ({"image": IMAGE, "name": "n" * 54}, "name must be small letters, .* at most 53"),
    ],
)
def test_an_option_that_cannot_work_is_answered_before_anything_is_posted(options, message):
    with (
        pytest.raises(ConfigurationError, match=message),
        dask_nn.cluster("kubernetes", workers=1, **options),
    ):
        pass


def test_a_missing_package_is_answered_with_the_install_line(monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("dask_kubernetes"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dask_kubernetes", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'dask-nn\[kubernetes\]'"),
        dask_nn.cluster("kubernetes", workers=1, image=IMAGE),
    ):
        pass


def start_job(through: list[str] | None = None, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            *(through or ()),
            training_job.__file__,
            "kubernetes",
            json.dumps({"image": IMAGE, "port_forward": True, **options}),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_training_over_tls_on_the_pods_of_the_resource_gives_the_bits_of_local_training(api):
    job = start_job(workers=2, memory="2 GB", env={"GREETING": "hello"}, security=True)
    out, err = job.communicate(timeout=JOB_TIMEOUT_S)
    assert job.returncode == 0, err
    said = json.loads(out)
    assert said["cluster"] == said["local"]
    assert said["workers"] == 2
    assert said["env"] == ["hello", "hello"]
    assert said["address"].startswith("tls://")
    [posted] = api.posted("DaskCluster")
    assert errors_of(posted) == []
    assert len(api.posted("Secret")) == 1


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_adapt_posts_an_autoscaler_and_ctrl_c_deletes_everything_but_a_users_own_secret(api):
    """The autoscaler is posted when workers are there, and so over TLS."""
    api.store("secrets", tls_secret("own", Security.temporary()), "training")
    job = start_job(adapt=[1, 3], tls_secret="own")  # noqa: S106 - the name of a secret
    try:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not api.posted("DaskAutoscaler"):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [posted] = api.posted("DaskAutoscaler")
        assert posted["spec"]["minimum"] == 1
        assert posted["spec"]["maximum"] == 3
        [cluster] = api.posted("DaskCluster")
        assert "tls://" in json.dumps(cluster)
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=JOB_TIMEOUT_S)
    finally:
        job.kill()
        job.wait(10)
    assert job.returncode != 0
    assert list(api.objects["secrets"]) == ["own"]
    api.objects["secrets"].clear()
    assert not api.posted("Secret")


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
def test_a_scheduler_for_all_to_reach_has_tls_and_ctrl_c_at_the_start_deletes_what_was_posted(api):
    job = start_job(workers=1, service_type="NodePort")
    try:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not api.posted("DaskCluster"):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(api.posted("Secret")) == 1
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=JOB_TIMEOUT_S)
    finally:
        job.kill()
        job.wait(10)
    assert job.returncode != 0


REFUSED = """
import json, sys
import dask_nn
for options in json.loads(sys.argv[1]):
    try:
        with dask_nn.cluster("kubernetes", **options):
            pass
    except dask_nn.errors.DaskNNError as error:
        print(type(error).__name__, error)
"""


def test_what_kubernetes_lacks_or_has_already_is_said_and_left_as_it_is(tmp_path):
    with KubernetesApi(tmp_path, installed=False) as api:
        theirs = resource({"name": "theirs"})
        api.store("daskclusters", theirs, "training")
        asked = ({"security": True}, {"name": "theirs"}, {"tls_secret": "own"})
        job = subprocess.run(
            [sys.executable, "-c", REFUSED, json.dumps([{"image": IMAGE, **own} for own in asked])],
            env={**os.environ, "KUBECONFIG": str(api.kubeconfig)},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        without_operator, same_name, without_secret = job.stdout.splitlines()
        assert without_operator.startswith(ClusterError.__name__)
        assert "install the Dask operator" in without_operator
        assert "theirs already exists" in same_name
        assert without_secret.startswith(ConfigurationError.__name__)
        assert "there is no tls_secret 'own' in 'training'" in without_secret
        assert len(api.posted("Secret")) == 1
        assert api.objects["daskclusters"].pop("theirs") is theirs
        assert not any(api.objects.values())


IMPATIENT = """
import runpy, sys
from dask_nn.clusters import kubernetes_status
kubernetes_status.PATIENCE_S = 3
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.timeout(2 * JOB_TIMEOUT_S)
@pytest.mark.parametrize("security", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image": f"{NOWHERE}dask:1"},
            r'pod .*-scheduler.*: Pending; ImagePullBackOff Back-off pulling image "registry\.inv',
        ),
        (
            {"env": {"PYTHONHOME": "/nowhere"}},
            r"pod .*-scheduler.*: CrashLoopBackOff (?s:.*)its log ends with:(?s:.*)Fatal Python er",
        ),
    ],
)
def test_a_scheduler_that_does_not_start_is_told_long_before_the_deadline(
    api, options, message, security
):
    began = time.monotonic()
    asked = {"workers": 1, "start_timeout_s": JOB_TIMEOUT_S, "security": security, **options}
    job = start_job(**asked, through=["-c", IMPATIENT])
    _, err = job.communicate(timeout=JOB_TIMEOUT_S)
    assert time.monotonic() - began < JOB_TIMEOUT_S / 2
    assert job.returncode != 0
    assert re.search(message, err), err
    assert not api.objects["daskclusters"]
