"""Options of the wrong type, of every kind of cluster: refused by name before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dask_nn
from dask_nn.cli.main import nn
from dask_nn.clusters import option_types
from dask_nn.clusters.open import check_request
from dask_nn.clusters.option_types import OptionType, arguments, check_types, lines
from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ConfigurationError

# What each kind needs to be checked further than for what is missing.
NEEDED: dict[str, dict[str, Any]] = {
    "ssh": {"hosts": ["node1", "node2"]},
    "kubernetes": {"image": "me/dask-nn:1"},
    "aws": {"image": "me/dask-nn:1", "instance_type": "m7i.large"},
    "fargate": {"image": "me/dask-nn:1", "service": "fargate"},
}
MAPPING = "must be a mapping with names"
SWITCH = "must be True or False"


def request(kind: str, options: dict[str, Any]) -> ClusterRequest:
    name = "aws" if kind == "fargate" else kind
    return ClusterRequest(kind=name, options={**NEEDED.get(kind, {}), **options})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("local", {"processes": "false"}, f"processes {SWITCH}.*, got 'false'"),
        ("local", {"memory_limit": "lots"}, "memory_limit must be a size such as .*, got 'lots'"),
        ("local", {"memory_limit": True}, "memory_limit must be a size"),
        ("local", {"scheduler_kwargs": "port=0"}, f"scheduler_kwargs {MAPPING}"),
        ("local", {"dashboard_address": [1]}, "dashboard_address must be an address such as"),
        ("ssh", {"worker_options": "interface=eth0"}, f"worker_options {MAPPING}.*interface=eth0"),
        ("ssh", {"worker_options": {"preload": 5}}, "worker_options: preload must be .*, got 5"),
        ("ssh", {"worker_options": {"env": ["A=b"]}}, f"worker_options: env {MAPPING}"),
        ("ssh", {"worker_options": {"nthreads": "two"}}, "nthreads must be a whole number"),
        ("ssh", {"worker_options": {"name": Path("x")}}, "JSON"),
        ("ssh", {"scheduler_options": ["eth0"]}, f"scheduler_options {MAPPING}"),
        ("ssh", {"connect_options": "port=22"}, f"connect_options {MAPPING}.*one for each host"),
        ("ssh", {"connect_options": [{}, "port=22"]}, f"connect_options {MAPPING}"),
        ("ssh", {"connect_options": {"port": "ssh"}}, "port must be the number of a port"),
        ("ssh", {"remote_python": 3}, "remote_python must be a text"),
        ("slurm", {"scheduler_options": "eth0"}, f"scheduler_options {MAPPING}"),
        ("slurm", {"scheduler_options": {"interface": 0}}, "interface must be a text, got 0"),
        ("slurm", {"processes": 0}, "processes must be a whole number, at least 1, got 0"),
        ("slurm", {"processes": "2"}, "processes must be a whole number"),
        ("slurm", {"job_script_prologue": 5}, "job_script_prologue must be a list of lines"),
        ("slurm", {"job_extra_directives": {"a": "b"}}, "job_extra_directives must be a list"),
        ("slurm", {"job_extra_directives": ["-n", 2]}, "job_extra_directives must be a list"),
        ("slurm", {"worker_extra_args": {"lifetime": 1}}, "worker_extra_args must be a list of"),
        ("slurm", {"worker_extra_args": "--name 'a"}, "worker_extra_args must be .* command line"),
        ("slurm", {"nanny": "no"}, f"nanny {SWITCH}"),
        ("pbs", {"death_timeout": "soon"}, 'death_timeout must be a time such as "60s"'),
        ("htcondor", {"job_extra_directives": ["a = b"]}, f"job_extra_directives {MAPPING}"),
        ("kubernetes", {"port_forward": "false"}, f"port_forward {SWITCH}"),
        ("kubernetes", {"scheduler_pod": ["x"]}, f"scheduler_pod {MAPPING}"),
        ("aws", {"service": ["x"]}, r"service must be a text, got \['x'\]"),
        ("aws", {"protocol": ["tcp"]}, "protocol must be a text"),
        ("aws", {"worker_options": "x"}, f"worker_options {MAPPING}"),
        ("aws", {"scheduler_options": {"port": 70000}}, "port must be the number of a port"),
        ("aws", {"instance_tags": "a"}, "instance_tags must be texts by name"),
        ("aws", {"instance_tags": {"a": 1}}, "instance_tags must be texts by name"),
        ("aws", {"extra_bootstrap": 1}, "extra_bootstrap must be a list of lines"),
        ("aws", {"spot": "false"}, f"spot {SWITCH}"),
        ("fargate", {"worker_extra_args": 5}, "worker_extra_args must be a list of arguments"),
        ("fargate", {"subnets": 5}, "subnets must be a text or a list of texts"),
        ("fargate", {"tags": ["a"]}, "tags must be texts by name"),
        ("fargate", {"fargate_use_private_ip": "false"}, f"fargate_use_private_ip {SWITCH}"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_request(request(kind, options))


def test_what_a_library_takes_and_we_do_not_know_is_handed_on() -> None:
    options = {
        "worker_options": {
            "lifetime": "1h",
            "resources": {"GPU": 1},
            "nthreads": 0,
            "port": [1, 2],
        },
        "scheduler_options": {"port": "8786", "idle_timeout": 60, "allowed_failures": 5},
        "connect_options": [{"port": 22, "known_hosts": None}, {"client_keys": ["a", "b"]}],
        "remote_python": None,
    }
    check_request(request("ssh", options))


def test_a_table_in_place_of_a_text_is_bad_input_on_the_command_line() -> None:
    for kind, *settings in (
        ("slurm", "scheduler_options=eth0"),
        ("slurm", "processes=0"),
        ("ssh", 'hosts=["a", "b"]', "worker_options=interface=eth0"),
        ("local", "processes=False"),
    ):
        options = [word for setting in settings for word in ("--cluster-option", setting)]
        result = CliRunner().invoke(nn, ["doctor", "--cluster", kind, *options])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("Error: ")
        assert " must be " in result.stderr


def test_a_kind_and_modules_are_texts() -> None:
    with (
        pytest.raises(
            ConfigurationError, match=r"must be a text such as \"slurm\", got \['slurm'\]"
        ),
        dask_nn.cluster(["slurm"]),  # type: ignore[arg-type]
    ):
        pass
    with pytest.raises(ConfigurationError, match="preload must be a text or a list of texts"):
        ClusterRequest(kind="local", preload=5)  # type: ignore[arg-type]
    assert ClusterRequest(kind="local", preload="torch").preload == ("torch",)


def test_a_module_to_preload_is_not_cut_into_letters() -> None:
    options = {"processes": False, "dashboard_address": ":0"}
    with dask_nn.cluster("local", workers=1, preload="torch", **options) as client:
        assert client.scheduler_info(n_workers=-1)["workers"]


def test_a_text_stands_for_its_list() -> None:
    assert lines("module load cuda") == ["module load cuda"]
    assert lines("one\ntwo") == ["one", "two"]
    assert lines(["a b"]) == ["a b"]
    assert lines(None) == []
    assert arguments("--lifetime '1 hour'") == ["--lifetime", "1 hour"]
    assert arguments(["--lifetime", 3600]) == ["--lifetime", "3600"]
    assert arguments(None) == []


TYPES = {name: value for name, value in vars(option_types).items() if isinstance(value, OptionType)}
GOOD: dict[str, list[Any]] = {
    "ARGUMENTS": ["--a 'b c'", ["--a", 1], ()],
    "COUNT": [1, 2],
    "LINES": ["a", ["a", "b"], ()],
    "MAPPING": [{}, {"a": [1]}],
    "MEMORY_LIMIT": ["auto", "4 GB", 0, 0.5, 10**9],
    "NUMBER": [0, 0.5],
    "OF_SCHEDULERS": [{}, {"port": 0, "other": object()}],
    "OF_WORKERS": [{}, {"memory_limit": "auto"}],
    "PATH": ["a", Path("a")],
    "PORT": [0, 8786, "8786"],
    "ADDRESS": [":8787", "127.0.0.1:0", 8787],
    "SECONDS": [0, 1.5, "60", "60s"],
    "SWITCH": [True, False],
    "TAGS": [{}, {"a": "b"}],
    "TEXT": ["", "a"],
    "TEXTS": ["a", ["a"], ()],
    "WHOLE": [0, 3],
    "WORD": ["a", 5],
}
BAD: dict[str, list[Any]] = {
    "ARGUMENTS": ["'", [None], {"a": 1}, 5, True],
    "COUNT": [0, -1, 1.0, "1", True],
    "LINES": [[1], {"a": "b"}, 5],
    "MAPPING": ["a=b", [("a", 1)], {1: "a"}, 5],
    "MEMORY_LIMIT": ["lots", "1e400 GB", "-1 GB", -1, True, []],
    "NUMBER": [-1, "1", True],
    "OF_SCHEDULERS": ["a", {"port": "x"}],
    "OF_WORKERS": [[], {"dashboard": "no"}],
    "PATH": [5, ["a"]],
    "PORT": [-1, 65536, 1.5, "x", "-1", True],
    "ADDRESS": [-1, 70000, [":8787"], True],
    "SECONDS": ["soon", "", -1, True, []],
    "SWITCH": ["true", "", 0, 1],
    "TAGS": [{"a": 1}, "a", ["a"]],
    "TEXT": [5, ["a"], b"a", True],
    "TEXTS": [["a", 1], 5, {"a": "b"}],
    "WHOLE": [-1, 0.5, "0", True],
    "WORD": [True, ["a"], {}],
}


@pytest.mark.parametrize("name", TYPES)
def test_what_a_type_takes(name: str) -> None:
    for value in (*GOOD[name], None):
        check_types({"option": value}, {"option": TYPES[name]})
    for value in BAD[name]:
        with pytest.raises(ConfigurationError, match="option"):
            check_types({"option": value}, {"option": TYPES[name]})
