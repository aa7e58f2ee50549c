"""A model of a job file with weights that were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.cli.cluster_options import from_table
from dask_nn.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from dask_nn.cli.cluster_options import ClusterChoice
    from dask_nn.cli.job_file import JobFile

__all__ = ["cluster_of_job", "load_model"]


def cluster_of_job(job: JobFile | None) -> ClusterChoice | None:
    """Give the cluster that a job describes; None if it describes none."""
    if job is None or not job.cluster:
        return None
    return from_table(job.cluster, f"{job.path}: [cluster]")


def load_model(job: JobFile, weights: Path) -> nn.Module:
    """Make a job's model and load weights into it.

    Raises
    ------
    ModelError
        If it cannot be made.
    CheckpointError
        If the weights cannot be read, or belong to another model.
    """
    from torch import nn

    from dask_nn.checkpoints.serialization import load_weights

    state, _ = load_weights(weights)
    model = job.make_model()()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{job.path}: [model] {job.model['module']} makes a {type(model).__name__}, expected "
            "a torch.nn.Module"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights} does not fit {job.model['module']}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.eval()
