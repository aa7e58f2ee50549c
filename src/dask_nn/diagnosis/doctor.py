"""The public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import default_client

from dask_nn.diagnosis.examine import examine
from dask_nn.diagnosis.gather import gather
from dask_nn.diagnosis.read_data import read_data
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

    from dask_nn.diagnosis.report import Report

__all__ = ["doctor"]


def doctor(
    X: Any = None,
    y: Any = None,
    *,
    client: Client | None = None,
    modules: Sequence[str] = (),
    parameters: int = 10_000_000,
    gpus: int = 0,
    timeout_s: float = 60.0,
) -> Report:
    """Look whether a cluster can train, and say what is wrong.

    Processes of the cluster are asked to describe themselves and to reach each other, workers
    import PyTorch and compute one small batch. No task is submitted, no file is written.

    Parameters
    ----------
    X, y : collection, optional
        Data of any kind that :func:`dask_nn.train` takes, to look at its blocks.
    client : Client, optional
        Of the cluster; the current one by default.
    modules : sequence of str
        Packages that workers need besides dask-nn's own, such as ``("zarr",)``.
    parameters : int, default 10,000,000
        Parameters of the model for which there shall be shared memory.
    gpus : int, default 0
        GPUs that each worker shall see, 0 or 1: what the cluster was asked for.
    timeout_s : float, default 60
        Deadline of one question. What has not answered by then is named in the report; all
        questions together take a few times as long at most.

    Returns
    -------
    Report
        One line for each check; ``report.status`` is the worst, ``print(report)`` shows it.

    Raises
    ------
    ConfigurationError
        If there is no client, or a number is not what it can be.
    """
    for name, value in (("parameters", parameters), ("timeout_s", timeout_s)):
        if value <= 0:
            raise ConfigurationError(f"{name} must be positive, got {value}")
    if isinstance(gpus, bool) or gpus not in {0, 1}:
        raise ConfigurationError(f"gpus must be 0 or 1, as a rank uses one, got {gpus!r}")
    if client is None:
        try:
            client = default_client()
        except ValueError as error:
            message = "there is no Dask client: make one first, Client(ADDRESS), or pass client="
            raise ConfigurationError(message) from error
    data = None if X is None else read_data(X, y, client)
    facts = gather(
        client,
        X=X,
        data=data,
        modules=modules,
        parameters=parameters,
        gpus=gpus,
        timeout_s=timeout_s,
    )
    return examine(facts)
