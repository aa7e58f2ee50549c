"""Which faster network is worth a word: not those that containers of one host have among them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from tests.diagnosis.made_facts import FIRST, SECOND, cluster, worker

from dask_nn.diagnosis import probe
from dask_nn.diagnosis.examine import examine
from dask_nn.diagnosis.facts import ProcessFacts

# The bridges of containers and their cables, a host's own network, and tunnels above both.
INTERFACES = """
set -e
mount -t sysfs sysfs /sys
ip link add docker0 type bridge
ip link add cable0 type veth peer name cable1
ip link set cable1 master docker0
ip link add overlay0 type vxlan id 5 dstport 4789 dev cable0
ip address add 172.17.0.1/16 dev docker0
ip address add 10.9.0.1/24 dev cable0
ip address add 10.8.0.1/24 dev overlay0
for name in lo docker0 cable0 cable1 overlay0; do ip link set $name up; done
exec "$@"
"""
DESCRIBE = """
import asyncio, json
from dask_nn.diagnosis.probe import describe_process
print(json.dumps(asyncio.run(describe_process())["interfaces"]))
"""


def interface(name, speed, *addresses, virtual=False):
    return {"name": name, "addresses": list(addresses), "mbit_per_s": speed, "virtual": virtual}


def line(first, second=(), **changes):
    """Look at two hosts whose workers use eth0 with 1,000 Mbit/s, and have other networks too."""
    return examine(
        cluster(
            first={"interfaces": [interface("eth0", 1_000, "10.0.0.1"), *first]},
            second={"interfaces": [interface("eth0", 1_000, "10.0.0.2"), *second]},
            **changes,
        )
    )["interfaces"]


def test_a_bridge_of_containers_is_not_recommended():
    docker = interface("docker0", 10_000, "172.17.0.1", "fe80::42:1%docker0", virtual=True)
    assert line([docker]).status == "ok"
    found = line([docker, interface("ib0", 5_000, "10.1.0.1")])
    assert found.status == "warn"
    assert f"{FIRST} uses eth0 with 1,000 Mbit/s, ib0 has 5,000" in found.found
    assert "docker0" not in found.found


@pytest.mark.parametrize("elsewhere", ["second", "scheduler", "client"])
def test_an_address_that_several_hosts_have_is_not_recommended(elsewhere):
    """Nothing says there that the interface is virtual."""
    bridge = interface("virbr0", 10_000, "192.168.122.1", "fe80::1")
    other = interface("virbr0", 10_000, "192.168.122.1", "fe80::2")
    if elsewhere == "second":
        assert line([bridge], [other]).status == "ok"
        return
    process = ProcessFacts(machine="laptop", network="laptop", interfaces=[other])
    if elsewhere == "scheduler":
        process = worker("tcp://10.0.0.9:8786", interfaces=[other])
    assert line([bridge], **{elsewhere: process}).status == "ok"


def test_workers_of_one_host_have_its_addresses_together():
    fast = interface("ib0", 100_000, "10.1.0.1")
    eth0 = interface("eth0", 1_000, "10.0.0.1")
    host = {"machine": "host", "network": "host", "interfaces": [eth0, fast]}
    found = examine(cluster(first=host, second=host))["interfaces"]
    assert found.status == "warn"
    assert "ib0 has 100,000" in found.found


def test_an_interface_without_an_address_of_a_network_is_not_recommended():
    assert line([interface("ib0", 100_000, "fe80::1%ib0")]).status == "ok"


def test_a_virtual_interface_may_be_the_one_in_use():
    """As eth0 is in a container: against it others are compared, and it is not warned of."""
    own = interface("eth0", 10_000, "10.0.0.1", virtual=True)
    slower = interface("eth1", 1_000, "10.2.0.1")
    faster = interface("net1", 100_000, "10.1.0.1")
    facts = cluster(first={"interfaces": [own, slower]})
    assert examine(facts)["interfaces"].status == "ok"
    facts = cluster(second={"interfaces": [interface("eth0", 10_000, "10.0.0.2"), faster]})
    assert f"{SECOND} uses eth0 with 10,000" in examine(facts)["interfaces"].found


@pytest.fixture
def in_a_network_of_its_own(unavailable):
    """Give the words before a command that run it among interfaces made for it."""
    found = shutil.which("unshare") or "unshare"
    command = [found, "--net", "--mount", "sh", "-c", INTERFACES, "sh"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        unavailable(f"interfaces are made with root, unshare and ip: {error}")
    return command


def test_a_process_tells_bridges_cables_and_tunnels_of_its_host(in_a_network_of_its_own):
    done = subprocess.run(
        [*in_a_network_of_its_own, sys.executable, "-c", DESCRIBE],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert {"docker0", "cable0", "overlay0"} <= set(found)
    assert found["docker0"]["addresses"][0] == "172.17.0.1"
    assert {name for name, each in found.items() if not each["virtual"]} == set()


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write what the kernel says of interfaces that no machine of a test has."""

    def add(name, *parts, type_="1", kind=""):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "type").write_text(f"{type_}\n")
        (folder / "uevent").write_text(f"DEVTYPE={kind}\nINTERFACE={name}\n" if kind else "")
        for part in parts:
            (folder / part).mkdir()

    monkeypatch.setattr(probe, "INTERFACES", str(tmp_path))
    add("eth0", "device")
    add("eth1", "device")
    add("ib0", "device", type_="32")
    add("ib0.8001", type_="32")
    add("bond0", "bonding", "lower_eth0", "lower_eth1", kind="bond")
    add("bond0.7", "lower_bond0", kind="vlan")
    add("team0", "lower_eth0")
    add("br0", "bridge", "lower_eth1", "lower_veth1", kind="bridge")
    add("veth1", "brport")
    add("docker0", "bridge", "lower_veth1", kind="bridge")
    add("virbr0", "bridge", kind="bridge")
    add("flannel.1", "lower_eth0", kind="vxlan")
    add("tun0", type_="65534")
    add("lo", type_="772")


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(
    "name", ["eth0", "ib0", "ib0.8001", "bond0", "bond0.7", "team0", "br0", "of-another-system"]
)
def test_what_has_a_device_below_it_is_a_network(name):
    assert not probe._is_virtual(name)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("name", ["lo", "veth1", "docker0", "virbr0", "flannel.1", "tun0"])
def test_what_has_none_is_virtual(name):
    assert probe._is_virtual(name)
