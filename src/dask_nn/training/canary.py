"""Do all ranks compute the same bits? Asked once, on one fixed batch, before training.

The weights of the question are fixed as well: a run that goes on from a checkpoint asks again, with
a module that was initialised anew.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from dask_nn.errors import IncompatibleWorkers
from dask_nn.training.layout import LeafLayout
from dask_nn.training.step import ShardStep

if TYPE_CHECKING:
    from torch import nn

    from dask_nn.collectives.base import Communicator
    from dask_nn.data.randomness import SeededRandomness
    from dask_nn.metrics.objective import Objective
    from dask_nn.training.spec import TrainingSpec

__all__ = ["canary_of", "compare_canaries", "expected_bits", "fingerprint"]

# Fingerprints of saved runs that were made in another way are not compared.
METHOD = b"2"
CANARY_STEP = -1
NAME_SEPARATOR = b"\0"
# Weights repeat after so many values: a prime, so that rows of no layer are equal.
PERIOD = 4093
MULTIPLIER = 2654435761


def canary_of(spec: TrainingSpec, bits: bytes) -> dict[str, str]:
    """Say what was computed from the spec's sample, for whoever goes on with the run."""
    return {"sample": _sum_of(spec), "bits": bits.hex()} if spec.sample is not None else {}


def expected_bits(canary: dict[str, str], spec: TrainingSpec) -> bytes:
    """Give the fingerprint in a canary; empty if it was made of another batch."""
    same = spec.sample is not None and canary.get("sample") == _sum_of(spec)
    return bytes.fromhex(canary["bits"]) if same else b""


def _sum_of(spec: TrainingSpec) -> str:
    digest = hashlib.sha256(METHOD)
    for array in spec.sample or ():
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _set_weights(model: nn.Module) -> None:
    """Set all weights to values that depend on nothing but their place, exactly."""
    places = np.arange(1, PERIOD + 1, dtype=np.int64)
    fractions = (places * MULTIPLIER % (1 << 24)) / (1 << 24) - 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            pattern = torch.from_numpy(fractions).to(parameter.dtype)
            values = torch.empty(parameter.numel(), dtype=parameter.dtype)
            whole = len(values) // PERIOD * PERIOD
            values[:whole].view(-1, PERIOD).copy_(pattern)
            values[whole:].copy_(pattern[: len(values) - whole])
            if parameter.dim() > 1:  # a power of two: scaling by it is exact
                values *= 2.0 ** -round(math.log2(max(1, parameter[0].numel())) / 2)
            parameter.copy_(values.view(parameter.shape))


def fingerprint(
    model: nn.Module,
    objective: Objective,
    spec: TrainingSpec,
    *,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    randomness: SeededRandomness,
) -> bytes:
    """Hash what this process computes for the spec's sample; the model stays as it is.

    Whoever changes what is hashed counts `METHOD` up.

    Returns
    -------
    bytes
        SHA-256 digest; empty if the spec has no sample.
    """
    if spec.sample is None:
        return b""
    probe = copy.deepcopy(model)
    _set_weights(probe)
    layout = LeafLayout(probe)
    step = ShardStep(
        probe,
        objective=objective,
        layout=layout,
        randomness=randomness,
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
    result = views.flat[: layout.num_result_elements]
    return hashlib.sha256(result.cpu().numpy().tobytes()).digest()


def compare_canaries(
    digest: bytes,
    comm: Communicator,
    *,
    place: str,
    refuse: bool,
    expected: bytes = b"",
    origin: str = "in the run's first gang",
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
    origin : str
        When that was, for an error.

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
        before = origin if expected else f"on rank 0 ({parsed[0][1]})"
        message = (
            f"the same batch gives other bits on {named} than {before}: processors, libraries or "
            "thread settings differ, so the weights would depend on who computes what. Use workers "
            "of one kind, or Synchronous(bitwise=False) to train all the same"
        )
        raise IncompatibleWorkers(message, tuple(different))
    return not different
