"""Train, evaluate and run PyTorch networks on Dask clusters.

Names are imported on first use, so that ``import dask_nn`` does not import torch: a scheduler's
image may lack it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_nn.api import evaluate, predict, train
    from dask_nn.callbacks.base import Callback
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.clusters.open import cluster
    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.data.urls import open_data
    from dask_nn.diagnosis.doctor import doctor
    from dask_nn.training.result import TrainingResult
    from dask_nn.training.strategies import Synchronous

__version__ = "0.1.0"

_HOME = {
    "Callback": "dask_nn.callbacks.base",
    "Checkpoint": "dask_nn.checkpoints.options",
    "Recovery": "dask_nn.controller.failure_policy",
    "Synchronous": "dask_nn.training.strategies",
    "TrainingResult": "dask_nn.training.result",
    "cluster": "dask_nn.clusters.open",
    "doctor": "dask_nn.diagnosis.doctor",
    "evaluate": "dask_nn.api",
    "open_data": "dask_nn.data.urls",
    "predict": "dask_nn.api",
    "train": "dask_nn.api",
}

__all__ = [
    "Callback",
    "Checkpoint",
    "Recovery",
    "Synchronous",
    "TrainingResult",
    "cluster",
    "doctor",
    "evaluate",
    "open_data",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    message = f"module 'dask_nn' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
