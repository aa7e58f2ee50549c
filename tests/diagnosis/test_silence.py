"""Why a scheduler does not answer, asked of real ones: with TLS, without, and of none at all."""

from __future__ import annotations

import json
import socket

import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster, Security

from dask_nn.cli.main import nn
from dask_nn.clusters.certificates import pem_texts, security_of_texts, tls_settings
from dask_nn.clusters.connect import connect
from dask_nn.diagnosis.doctor import doctor
from dask_nn.diagnosis.silence import silent_scheduler
from dask_nn.errors import SchedulerUnreachable

SETTINGS = "distributed.comm.tls.ca-file, client.cert and client.key"
# Distributed forgets to close a socket that was refused.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def security():
    return Security.temporary()


@pytest.fixture(scope="module")
def encrypted(_quiet_dask, security):
    """Give the address of a scheduler with TLS, without protocol."""
    options = {"n_workers": 0, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options, protocol="tls", security=security) as cluster:
        yield cluster.scheduler_address.removeprefix("tls://")


@pytest.fixture(scope="module")
def plain(_quiet_dask):
    """Give the address of a scheduler without TLS, without protocol."""
    options = {"n_workers": 0, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options, protocol="tcp") as cluster:
        yield cluster.scheduler_address.removeprefix("tcp://")


def scheduler_line(address):
    done = CliRunner().invoke(nn, ["doctor", "--json", "--scheduler", address])
    assert done.exit_code == 1, done.output
    [line] = json.loads(done.stdout)["lines"]
    assert (line["check"], line["status"]) == ("scheduler", "fail")
    assert line["found"].startswith(f"{address} does not answer: ")
    return line


def with_certificates(security):
    """Configure this client as the remedy says."""
    return dask.config.set(tls_settings(pem_texts(security)))


def test_a_client_without_certificates_is_told_so_and_where_they_go(encrypted):
    line = scheduler_line(f"tls://{encrypted}")
    assert "this client has no certificates for TLS (TLS expects a `ssl_context`" in line["found"]
    assert SETTINGS in line["remedy"]
    assert "docs/clusters/security.md" in line["remedy"]
    assert "firewall" not in line["remedy"]


def test_what_the_remedy_says_mends_it(encrypted, security):
    with with_certificates(security):
        done = CliRunner().invoke(nn, ["doctor", "--json", "--scheduler", f"tls://{encrypted}"])
    lines = {line["check"]: line for line in json.loads(done.stdout)["lines"]}
    assert lines["scheduler"]["status"] == "ok"
    assert lines["encryption"]["found"] == "Dask's connections use tls"


@pytest.mark.parametrize("protocol", ["tcp://", ""])
def test_a_scheduler_with_tls_is_recognised_at_an_address_without(encrypted, protocol):
    line = scheduler_line(f"{protocol}{encrypted}")
    assert line["found"].endswith("it speaks TLS, and is addressed without")
    assert line["remedy"].startswith(f"use tls://{encrypted} with the cluster's TLS certificates: ")
    assert SETTINGS in line["remedy"]


def test_certificates_of_another_cluster_are_told(encrypted):
    with with_certificates(Security.temporary()):
        line = scheduler_line(f"tls://{encrypted}")
    assert "it speaks TLS, but not with the certificates of this client" in line["found"]
    assert "certificate verify failed" in line["found"]
    assert "authority has signed" in line["remedy"]


def test_a_certificate_that_the_scheduler_does_not_take_is_told(encrypted, security):
    """The client knows the authority of the cluster, which has not signed its certificate."""
    texts = pem_texts(security)
    other = pem_texts(Security.temporary())
    mixed = security_of_texts(
        texts | {name: text for name, text in other.items() if name.startswith("client")}
    )
    with with_certificates(mixed):
        line = scheduler_line(f"tls://{encrypted}")
    assert "it speaks TLS, but not with the certificates of this client" in line["found"]
    assert "authority has signed" in line["remedy"]


@pytest.mark.parametrize("configured", [True, False])
def test_a_scheduler_without_tls_is_recognised_at_an_address_with_it(plain, security, configured):
    with with_certificates(security if configured else Security.temporary()):
        line = scheduler_line(f"tls://{plain}")
    assert line["found"].endswith("it does not speak TLS")
    assert f"use tcp://{plain}, or start the scheduler with TLS" in line["remedy"]


def test_encryption_that_this_client_requires_is_told(plain):
    with dask.config.set({"distributed.comm.require-encryption": True}):
        line = scheduler_line(f"tcp://{plain}")
    assert "encryption required by Dask configuration" in line["found"]
    assert "distributed.comm.require-encryption is set" in line["remedy"]


def test_what_connecting_said_is_kept(threads_cluster2):
    """A worker answers at this address."""
    line = scheduler_line(threads_cluster2.workers[0].address)
    assert line["found"].endswith("as a Dask scheduler does (a Dask worker did)")


@pytest.mark.usefixtures("_quiet_dask")
def test_a_worker_of_an_encrypted_cluster_is_no_matter_of_certificates(security):
    options = {"n_workers": 1, "processes": False, "dashboard_address": ":0"}
    with (
        LocalCluster(**options, protocol="tls", security=security) as cluster,
        with_certificates(security),
    ):
        line = scheduler_line(cluster.workers[0].address)
    assert line["found"].endswith("as a Dask scheduler does (a Dask worker did)")


def test_what_listens_and_says_nothing_is_not_taken_for_tls():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        facts = silent_scheduler(address, "no answer", timeout_s=0.5)
    assert facts.tls == ""
    assert facts.problem.endswith("does not answer as a Dask scheduler does (no answer)")


def test_a_closed_port_is_no_matter_of_certificates():
    assert silent_scheduler("tls://127.0.0.1:9", "TLS expects a `ssl_context`").tls == ""


def test_the_reason_of_an_error_is_what_began_it(encrypted):
    with pytest.raises(SchedulerUnreachable, match="certificate verify failed") as caught:
        connect(f"tls://{encrypted}", 5, security=Security.temporary())
    assert "certificate verify failed" in caught.value.reason


@pytest.mark.usefixtures("_quiet_dask")
def test_a_scheduler_that_came_back_with_tls_is_recognised(security):
    """The client was connected while it had none."""
    options = {"n_workers": 0, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options, protocol="tcp") as first:
        address = first.scheduler_address
        client = Client(address, set_as_default=False)
    with client:
        port = int(address.rpartition(":")[2])
        with LocalCluster(
            **options, protocol="tls", security=security, scheduler_port=port, host="127.0.0.1"
        ):
            found = doctor(client=client, timeout_s=5)
    [line] = found.lines
    assert line.found.endswith("it speaks TLS, and is addressed without")
