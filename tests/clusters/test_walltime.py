from __future__ import annotations

import pytest

from dask_nn.clusters.walltime import walltime_s
from dask_nn.errors import ConfigurationError


@pytest.mark.parametrize(
    ("kind", "text", "seconds"),
    [
        ("slurm", "90", 5400),
        ("slurm", "10:30", 630),
        ("slurm", "02:30:00", 9000),
        ("slurm", "1-12", 129600),
        ("slurm", "1-12:30", 131400),
        ("slurm", "1-00:00:01", 86401),
        ("pbs", "3600", 3600),
        ("pbs", "02:30:00", 9000),
        ("sge", "3600", 3600),
        ("oar", "2", 7200),
        ("oar", "2:30", 9000),
        ("lsf", "90", 5400),
        ("lsf", "02:30", 9000),
    ],
)
def test_each_batch_system_has_its_own_units(kind: str, text: str, seconds: int) -> None:
    assert walltime_s(kind, text) == seconds


@pytest.mark.parametrize(
    ("kind", "text"),
    [("slurm", "2h"), ("slurm", ""), ("slurm", "1:2:3:4"), ("pbs", "1-12"), ("lsf", "02:30:00")],
)
def test_what_it_would_not_understand_is_refused(kind: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"as {kind} does"):
        walltime_s(kind, text)
