"""Which communicator connects ranks, by where they are."""

from __future__ import annotations

import pytest

from dask_nn.collectives.choose import NAMES, RankPlace, choose, host_sizes, possible
from dask_nn.errors import ConfigurationError


def places(*hosts: str, machine: str = "x86_64", encrypted: bool = False) -> list[RankPlace]:
    """Put ranks, each in a process of its own, on hosts."""
    return [
        RankPlace(host=host, process=number, machine=machine, encrypted=encrypted)
        for number, host in enumerate(hosts)
    ]


@pytest.mark.parametrize(
    ("hosts", "clear", "encrypted"),
    [
        ("a", "serial", "serial"),
        ("aa", "shared_memory", "shared_memory"),
        ("ab", "gloo", "dask"),
        ("abc", "gloo", "dask"),
        ("aabb", "shared_memory+gloo", "shared_memory+dask"),
        ("aab", "shared_memory+gloo", "shared_memory+dask"),
        ("abbc", "shared_memory+gloo", "shared_memory+dask"),
        ("aba", "gloo", "dask"),
    ],
)
def test_the_best_by_hosts(hosts, clear, encrypted):
    assert choose(places(*hosts)) == clear
    assert choose(places(*hosts, encrypted=True)) == encrypted


def test_threads_of_one_process_need_no_file():
    threads = [RankPlace(host="a", process=1, machine="x86_64") for _ in range(3)]
    assert choose(threads) == "threads"


@pytest.mark.parametrize("hosts", ["aa", "aabb"])
def test_processors_that_do_not_order_stores_share_no_memory(hosts):
    assert choose(places(*hosts, machine="aarch64")) == "gloo"
    assert choose(places(*hosts, machine="aarch64", encrypted=True)) == "dask"


@pytest.mark.parametrize("hosts", ["aa", "aabb"])
def test_gpus_take_nccl_but_never_where_their_gradients_must_be_encrypted(hosts):
    assert choose(places(*hosts), device="cuda") == "nccl"
    assert choose(places(*hosts, encrypted=True), device="cuda") == "dask"


def test_nccl_on_one_host_of_a_cluster_with_tls_is_for_those_who_ask():
    one, two = places("a", "a", encrypted=True), places("a", "b", encrypted=True)
    assert choose(one, device="cuda", wanted="nccl") == "nccl"
    with pytest.raises(ConfigurationError, match=r"'nccl'.*does not encrypt.*over TLS; .*dask"):
        choose(two, device="cuda", wanted="nccl")


@pytest.mark.parametrize("name", ["gloo", "shared_memory+gloo"])
def test_gloo_is_refused_by_name_where_dask_encrypts(name):
    ranks = places("a", "a", "b", "b", encrypted=True)
    with pytest.raises(ConfigurationError, match=f"'{name.replace('+', '.')}'.*does not encrypt"):
        choose(ranks, wanted=name)


def test_letters_connect_any_ranks():
    for hosts in ("a", "aa", "aba", "aabb"):
        for device in ("cpu", "cuda"):
            assert choose(places(*hosts), device=device, wanted="dask") == "dask"


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigurationError, match=f"one of {', '.join(NAMES[:2])}.*got 'mpi'"):
        choose(places("a"), wanted="mpi")


def test_every_name_is_judged():
    for encrypted in (False, True):
        assert sorted(possible(places("a", "b", encrypted=encrypted))) == sorted(NAMES)


def test_ranks_of_a_host_are_counted_in_order():
    assert host_sizes(places(*"aabcc")) == (2, 1, 2)
    assert host_sizes(places(*"aba")) == (1, 1, 1)
