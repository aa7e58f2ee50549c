from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from dask_nn.cli.cluster_options import ClusterChoice, choose_cluster, cluster_options, from_table
from dask_nn.cli.main import nn
from dask_nn.errors import ConfigurationError


def chosen(*arguments: str) -> ClusterChoice | None:
    found = []

    @click.command
    @cluster_options
    def command(**options: Any) -> None:
        found.append(choose_cluster(**options))

    result = CliRunner().invoke(command, arguments)
    if result.exit_code:
        raise click.UsageError(result.stderr)
    return found[0]


def test_nothing_said_is_no_choice() -> None:
    assert chosen() is None


def test_a_cluster_is_described_by_options() -> None:
    arguments = (
        *("--cluster", "slurm", "--workers", "20", "--cores", "8", "--memory", "16 GB"),
        *("--walltime", "02:00:00", "--gpus", "1", "--tls", "--cluster-option", "queue=gpu"),
        *("--cluster-option", "processes=2", "--cluster-option", 'hosts=["a", "b"]'),
        *("--cluster-option", "port = 2222", "--cluster-option", "when=a=b"),
        *("--env", "GREETING=it's = me", "--env", "EMPTY=", "--start-timeout", "86400"),
    )
    assert chosen(*arguments) == ClusterChoice(
        kind="slurm",
        arguments={
            "workers": 20,
            "cores": 8,
            "memory": "16 GB",
            "walltime": "02:00:00",
            "gpus": 1,
            "security": True,
            "env": {"GREETING": "it's = me", "EMPTY": ""},
            "start_timeout_s": 86400.0,
        },
        options={
            "queue": "gpu",
            "processes": 2,
            "hosts": ["a", "b"],
            "port": 2222,
            "when": "a=b",
        },
    )


def test_a_number_of_workers_alone_means_this_machine() -> None:
    choice = chosen("--adapt", "1", "4")
    assert choice == ClusterChoice(kind="local", arguments={"adapt": (1, 4)})


def test_a_scheduler_is_short_for_an_address() -> None:
    choice = chosen("--scheduler", "tcp://10.0.0.5:8786")
    assert choice is not None
    assert (choice.kind, choice.options) == ("address", {"address": "tcp://10.0.0.5:8786"})
    assert choice.arguments == {"start_timeout_s": 5}
    choice = chosen("--scheduler", "tcp://10.0.0.5:8786", "--start-timeout", "60")
    assert choice is not None
    assert choice.arguments == {"start_timeout_s": 60}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "tcp://a:1", "--workers", "2"), "give either"),
        (("--cluster", "slurm", "--cluster-option", "queue"), "KEY=VALUE"),
        (("--cluster", "slurm", "--env", "queue"), "NAME=VALUE"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(click.UsageError, match=message):
        chosen(*arguments)


def test_an_unknown_kind_is_refused_before_anything_is_trained() -> None:
    result = CliRunner().invoke(nn, ["mnist", "--cluster", "slrum"])
    assert result.exit_code == 2
    assert result.stderr == "Error: unknown kind of cluster 'slrum'; did you mean 'slurm'?\n"


def test_a_table_of_a_job_file_says_the_same() -> None:
    table = {"kind": "ssh", "workers": 2, "tls": True, "options": {"hosts": ["a", "b"]}}
    assert from_table(table, "[cluster]") == ClusterChoice(
        kind="ssh",
        arguments={"workers": 2, "security": True},
        options={"hosts": ["a", "b"]},
    )


def test_a_table_may_say_how_long_to_wait_for_a_scheduler() -> None:
    choice = from_table({"scheduler": "tcp://a:1", "start_timeout_s": 300}, "[cluster]")
    assert choice == chosen("--scheduler", "tcp://a:1", "--start-timeout", "300")
    assert from_table({"scheduler": "tcp://a:1"}, "") == chosen("--scheduler", "tcp://a:1")


def test_older_words_are_understood() -> None:
    choice = from_table({"threads_per_worker": 2, "memory_limit": "1 GB"}, "[cluster]")
    assert choice.arguments == {"cores": 2, "memory": "1 GB"}
    assert from_table({"memory_limit": "auto"}, "[cluster]").arguments == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "slrum"}, r"\[cluster\] unknown kind of cluster 'slrum'"),
        ({"workers": 2, "adapt": [1, 2]}, "give either"),
        ({"scheduler": "tcp://a:1", "workers": 2}, "workers start one: give either"),
        (
            {"scheduler": "tcp://a:1", "start_timeout_s": "long"},
            r"\[cluster\] start_timeout_s must be a positive number, got 'long'",
        ),
        ({"cores": 1, "threads_per_worker": 1}, "mean the same"),
        ({"kind": ["slurm"]}, r"\[cluster\] kind of cluster must be a text"),
        ({"tls": "false"}, r"\[cluster\] tls must be True or False .*without quotes, got 'false'"),
        ({"tls": "no"}, "tls must be True or False"),
        ({"scheduler": 8786}, "scheduler must be a text"),
        ({"gpus": [1]}, "gpus must be 0 or 1"),
        ({"options": {"processes": "false"}}, "processes must be True or False"),
        ({"options": 3}, "options must be a mapping"),
        ({"kind": "ssh", "options": {"host": "a"}}, "no option 'host'"),
    ],
)
def test_a_table_that_cannot_work_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_table(table, "[cluster]")
