from __future__ import annotations

import dataclasses
import random

import pytest

from dask_nn.controller.placement import WorkerFacts, seat_ranks
from dask_nn.errors import ConfigurationError


def worker(name: str, host: str = "a", *, cores: int = 4, threads: int = 1, num_gpus: int = 0):
    return WorkerFacts(
        address=f"tcp://{host}:{name}",
        host=host,
        process=1,
        machine="x86_64",
        cores=cores,
        threads=threads,
        memory_bytes=0,
        num_gpus=num_gpus,
        versions={},
    )


def addresses(seating):
    return [seat.address for seat in seating.workers]


def test_one_rank_for_each_worker_where_cores_suffice():
    seating = seat_ranks([worker("1"), worker("2")], shards=8)
    assert addresses(seating) == ["tcp://a:1", "tcp://a:2"]
    assert seating.threads_per_rank == 1


def test_never_more_ranks_on_a_host_than_cores():
    workers = [worker(str(number), cores=2, threads=2) for number in range(4)]
    seating = seat_ranks(workers, shards=8)
    assert len(seating.workers) == 2
    assert seating.threads_per_rank == 1


@pytest.mark.parametrize(("threads", "ranks"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_wanted_threads_of_all_ranks_fit_into_the_cores(threads, ranks):
    workers = [worker(str(number), cores=4, threads=9) for number in range(8)]
    seating = seat_ranks(workers, shards=8, threads_per_rank=threads)
    assert len(seating.workers) == ranks
    assert seating.threads_per_rank == threads


def test_never_more_ranks_than_shards():
    workers = [worker("1", host) for host in "abcd"]
    assert len(seat_ranks(workers, shards=3).workers) == 3
    assert len(seat_ranks(workers, shards=1).workers) == 1


def test_threads_are_the_cores_divided_by_the_ranks_but_at_most_those_of_the_worker():
    assert seat_ranks([worker("1", cores=8, threads=8)], shards=4).threads_per_rank == 8
    assert seat_ranks([worker("1", cores=8, threads=3)], shards=4).threads_per_rank == 3
    pair = [worker(name, cores=8, threads=8) for name in "12"]
    assert seat_ranks(pair, shards=4).threads_per_rank == 4


def test_all_ranks_have_the_threads_of_the_poorest_host():
    workers = [worker("1", "a", cores=16, threads=16), worker("1", "b", cores=2, threads=16)]
    assert seat_ranks(workers, shards=4).threads_per_rank == 2


def test_ranks_of_a_host_follow_each_other_whatever_the_order_of_workers():
    workers = [worker(str(number), host) for number in range(3) for host in "ba"]
    expected = addresses(seat_ranks(workers, shards=8))
    assert [address[6] for address in expected] == ["a"] * 3 + ["b"] * 3
    for seed in range(5):
        shuffled = random.Random(seed).sample(workers, len(workers))
        assert addresses(seat_ranks(shuffled, shards=8)) == expected


def test_a_worker_of_many_threads_still_gets_one_rank():
    assert len(seat_ranks([worker("1", cores=64, threads=64)], shards=64).workers) == 1


def test_cuda_seats_only_workers_that_see_a_device():
    workers = [worker("1", num_gpus=1), worker("2"), worker("3", "b", num_gpus=2)]
    seating = seat_ranks(workers, shards=8, device="cuda")
    assert addresses(seating) == ["tcp://a:1", "tcp://b:3"]


def test_no_device_is_an_error_that_says_how_to_mend_it():
    with pytest.raises(ConfigurationError, match=r"no worker of 1 .* 'cuda'.*device='cpu'"):
        seat_ranks([worker("1")], shards=8, device="cuda")


def test_a_host_without_a_known_core_still_gets_a_rank():
    facts = dataclasses.replace(worker("1"), cores=0, threads=0)
    seating = seat_ranks([facts], shards=8)
    assert len(seating.workers) == 1
    assert seating.threads_per_rank == 1
