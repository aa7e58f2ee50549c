"""One fixed batch through one fixed network: processes that give the same hash give equal bits."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from dask_nn.data.blocks import Field
from dask_nn.data.randomness import SeededRandomness, own_generator
from dask_nn.diagnosis.probe import in_thread
from dask_nn.metrics.objective import Objective
from dask_nn.training.canary import fingerprint
from dask_nn.training.runtime import task_runtime
from dask_nn.training.spec import TrainingSpec

__all__ = ["standard_fingerprint", "standard_fingerprint_here"]

ROWS, SIDE, CLASSES = 32, 12, 10


class Canary(nn.Module):
    """Whatever kernels differ between processors: convolution, matrices, exponentials, means."""

    def __init__(self) -> None:
        super().__init__()
        inner = 8 * (SIDE - 2) ** 2
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(inner, 96),
            nn.LayerNorm(96),
            nn.Tanh(),
            nn.Linear(96, 48),
            nn.Sigmoid(),
            nn.Linear(48, CLASSES),
        )
        with torch.no_grad():
            # Not random: the generator's own kernels differ between processors too.
            for number, parameter in enumerate(self.parameters()):
                values = torch.from_numpy(_spread(parameter.numel(), number))
                parameter.copy_(values.reshape(parameter.shape) / parameter[0].numel() ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take images of shape (rows, 1, 12, 12), give (rows, 10)."""
        output: torch.Tensor = self.layers(x)
        return output


async def standard_fingerprint() -> str:
    """Compute the hash beside the event loop of the worker that is asked."""
    return await in_thread(standard_fingerprint_here)


def standard_fingerprint_here() -> str:
    """Compute the hash of the canary's gradients with one thread, in hexadecimal."""
    # The generator is the user's, and of a rank that trains here, or of another worker of this
    # process: layers draw their first values from it.
    with task_runtime(1), own_generator():
        return _fingerprint().hex()


def _fingerprint() -> bytes:
    x = _spread(ROWS * SIDE * SIDE, 1_000).reshape(ROWS, 1, SIDE, SIDE)
    y = np.arange(ROWS) % CLASSES
    spec = TrainingSpec(
        model=Canary(),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(SGD, lr=0.01),
        fields=(
            Field(name="X", shape=x.shape[1:], dtype=x.dtype),
            Field(name="y", shape=(), dtype=y.dtype),
        ),
        block_lengths=(ROWS,),
        epochs=1,
        batch_size=ROWS,
        shards=1,
        window=1,
        threads_per_rank=1,
        sample=(x, y),
    )
    return fingerprint(
        spec.model,
        Objective(spec.loss, weighted=False),
        spec,
        dtypes=(torch.float32, torch.int64),
        device=torch.device("cpu"),
        randomness=SeededRandomness(spec.seed),
    )


def _spread(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Spread numbers over -1 to 1, exactly the same everywhere."""
    steps = (np.arange(count, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B1)
    high = ((steps >> np.uint64(8)) & np.uint64(0xFFFF)).astype(np.float32)
    return high / np.float32(32768) - np.float32(1)
