"""Do all ranks compute the same bits? Asked once, on one fixed batch, before training."""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from dask_nn.errors import IncompatibleWorkers
from dask_nn.training.layout import LeafLayout
from dask_nn.training.randomness import ShardRandomness
from dask_nn.training.step import ShardStep

if TYPE_CHECKING:
    from torch import nn

    from dask_nn.collectives.base import Communicator
    from dask_nn.metrics.objective import Objective
    from dask_nn.training.spec import TrainingSpec

__all__ = ["compare_canaries", "fingerprint"]

CANARY_STEP = -1
NAME_SEPARATOR = b"\0"


def fingerprint(
    model: nn.Module,
    objective: Objective,
    spec: TrainingSpec,
    *,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    shared: bool,
) -> bytes:
    """Hash the leaf that this process computes for the spec's sample; the model stays as it is.

    Returns
    -------
    bytes
        SHA-256 digest; empty if the spec has no sample.
    """
    if spec.sample is None:
        return b""
    probe = copy.deepcopy(model)
    layout = LeafLayout(probe)
    step = ShardStep(
        probe,
        objective=objective,
        layout=layout,
        randomness=ShardRandomness(spec.seed, shared=shared),
        transform=spec.transform,
        grouping=spec.grouping,
        device=device,
    )
    batch = tuple(
        torch.from_numpy(np.array(array)).to(dtype)
        for array, dtype in zip(spec.sample, dtypes, strict=True)
    )
    views = layout.views(torch.zeros(layout.size, dtype=layout.dtype, device=device))
    count = len(batch[0])
    step.compute(views, batch, step=CANARY_STEP, shard=0, count=count, step_count=count)
    return hashlib.sha256(views.flat.cpu().numpy().tobytes()).digest()


def compare_canaries(
    digest: bytes, comm: Communicator, *, place: str, refuse: bool, expected: bytes = b""
) -> bool:
    """Compare the fingerprints of all ranks.

    Parameters
    ----------
    digest : bytes
        This rank's.
    comm : Communicator
        An open one.
    place : str
        How to name this rank's worker in an error.
    refuse : bool
        Whether a difference is an error.
    expected : bytes
        What the run's first gang agreed on; rank 0's fingerprint if empty.

    Returns
    -------
    bool
        Whether all ranks agree.

    Raises
    ------
    IncompatibleWorkers
        If ranks differ and that is refused; names those that differ.
    """
    answers = comm.all_gather_bytes(digest + NAME_SEPARATOR + place.encode())
    parsed = [
        (answer[: len(digest)], answer[len(digest) + 1 :].decode(errors="replace"))
        for answer in answers
    ]
    right = expected or parsed[0][0]
    different = {name: rank for rank, (found, name) in enumerate(parsed) if found != right}
    if different and refuse:
        named = ", ".join(f"rank {rank} ({name})" for name, rank in different.items())
        before = "in the run's first gang" if expected else f"on rank 0 ({parsed[0][1]})"
        message = (
            f"the same batch gives other bits on {named} than {before}: processors, libraries or "
            "thread settings differ, so the weights would depend on who computes what. Use workers "
            "of one kind, or Synchronous(bitwise=False) to train all the same"
        )
        raise IncompatibleWorkers(message, tuple(different))
    return not different
