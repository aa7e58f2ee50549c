"""The data of a job file: for training, for testing and for predicting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from dask_nn.cli.job_file import JobFile

__all__ = ["open_features", "open_test", "open_training"]


def open_training(job: JobFile) -> tuple[Any, Any, Any, tuple[Any, ...] | None]:
    """Open X, y and weights, and the same of the validation data as a tuple, or None.

    Raises
    ------
    ConfigurationError, DataError
        If there is no such data, or it is not said where its targets are.
    """
    from dask_nn.cli.data import select

    X, y, weight = select(
        job.data_url(job.data["train"]),
        x=job.data.get("x"),
        y=_resolved(job, "y"),
        sample_weight=_resolved(job, "sample_weight"),
    )
    if "validation" not in job.data:
        for key in ("validation_y", "validation_sample_weight"):
            if key in job.data:
                raise ConfigurationError(f"{job.path}: [data] {key} needs validation")
        return X, y, weight, None
    found = select(
        job.data_url(job.data["validation"]),
        x=job.data.get("x"),
        y=_other(job, "y", "validation_y"),
        sample_weight=_other(job, "sample_weight", "validation_sample_weight"),
    )
    return X, y, weight, tuple(part for part in found if part is not None)


def open_test(job: JobFile, url: str, y: str | None) -> tuple[Any, Any, Any]:
    """Open X, y and weights of other data, whose arrays or columns have the job's names.

    Parameters
    ----------
    job : JobFile
        The job.
    url : str
        Of the data.
    y : str, optional
        Name or URL of its targets; the job's name by default.
    """
    from dask_nn.cli.data import is_url, select

    target = y if y is not None else job.data.get("y")
    if y is None and is_url(target):
        raise ConfigurationError(
            f"{job.path}: [data] y is {target}, the targets of the training data; say with --y "
            f"where those of {url} are"
        )
    weight = job.data.get("sample_weight")
    return select(
        url, x=job.data.get("x"), y=target, sample_weight=None if is_url(weight) else weight
    )


def open_features(job: JobFile, url: str) -> Any:
    """Open X of other data, which may have targets and weights beside it, or not."""
    from dask_nn.cli.data import select_features

    others = [job.data.get(key) for key in ("y", "sample_weight")]
    return select_features(url, x=job.data.get("x"), without=others)


def _resolved(job: JobFile, key: str) -> Any:
    from dask_nn.cli.data import is_url

    value = job.data.get(key)
    return job.data_url(str(value)) if is_url(value) else value


def _other(job: JobFile, key: str, own: str) -> Any:
    """Give the validation data's own targets or weights: a URL of their own, or the same name."""
    from dask_nn.cli.data import is_url

    if own in job.data:
        return _resolved(job, own)
    value = job.data.get(key)
    if is_url(value):
        raise ConfigurationError(
            f"{job.path}: [data] {key} is a URL, so that of the validation data has to be given "
            f'too: {own} = "..."'
        )
    return value
