from __future__ import annotations

import itertools

from dask_nn.diagnosis.facts import ProcessFacts
from dask_nn.diagnosis.pairs import pairs_to_measure, targets_of


def test_a_small_cluster_tries_every_pair():
    names = list("abcde")
    found = {(a, b) for a, others in targets_of(names).items() for b in others}
    assert found == set(itertools.permutations(names, 2))


def test_a_large_cluster_tries_every_worker_a_few_times():
    names = [str(number) for number in range(1000)]
    targets = targets_of(names)
    assert {len(set(others)) for others in targets.values()} == {10}
    assert all(name not in others for name, others in targets.items())
    tried = [other for others in targets.values() for other in others]
    assert {tried.count(name) for name in names[:20]} == {10}


def test_pairs_of_different_hosts_are_measured_first_and_few():
    workers = [ProcessFacts(address=str(n), machine=str(n // 8)) for n in range(16)]
    pairs = list(itertools.permutations([worker.address for worker in workers], 2))
    found = pairs_to_measure(workers, pairs)
    assert len(set(found)) == 8
    assert all(int(a) // 8 != int(b) // 8 for a, b in found)


def test_pairs_of_one_host_fill_up():
    workers = [ProcessFacts(address=a, machine=m) for a, m in (("a", "x"), ("b", "x"), ("c", "y"))]
    found = pairs_to_measure(workers, {("a", "b"), ("a", "c"), ("a", "gone")})
    assert found == [("a", "c"), ("a", "b")]
