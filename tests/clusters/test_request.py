from __future__ import annotations

from typing import Any

import pytest
from distributed import Security

from dask_nn.clusters.request import ClusterRequest
from dask_nn.errors import ConfigurationError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": 2.5}, "workers must be a whole number, got 2.5"),
        ({"cores": 0}, "cores must be at least 1, got 0"),
        ({"workers": 2, "adapt": (1, 2)}, "give either"),
        ({"adapt": (2, 1)}, "minimum must not be above its maximum"),
        ({"adapt": (0, 1)}, "adapt's minimum must be at least 1"),
        ({"adapt": 3}, "smallest and the largest number"),
        ({"gpus": 2}, "ask for more workers"),
        ({"memory": "much"}, "such as \"16 GB\", got 'much'"),
        ({"memory": 16}, "with its unit"),
        ({"walltime": 3600}, 'such as "02:00:00", got 3600'),
        ({"security": "tls"}, "security must be a distributed.Security"),
        ({"env": {"A B": "x"}}, "env must map names"),
        ({"env": {"A": 1}}, "env must map names"),
        ({"start_timeout_s": 0}, "start_timeout_s must be a positive number"),
        ({"options": {"cores": 4}}, "cores is an argument of the cluster itself"),
    ],
)
def test_a_value_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClusterRequest(kind="local", **values)


def test_it_waits_for_all_of_a_fixed_number_and_the_minimum_of_a_range() -> None:
    assert ClusterRequest(kind="local", workers=3).wanted == 3
    assert ClusterRequest(kind="local", adapt=[2, 5]).wanted == 2
    assert ClusterRequest(kind="local").wanted is None


def test_temporary_certificates_are_made_when_asked_for() -> None:
    request = ClusterRequest(kind="local", security=True).with_certificates()
    assert isinstance(request.security, Security)
    assert ClusterRequest(kind="local", security=False).with_certificates().security is None
