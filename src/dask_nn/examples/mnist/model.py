"""The guide's network and the scaling of its images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dask_nn.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NUM_CLASSES", "NUM_PIXELS", "SimpleNN", "make_model", "model_from_weights", "scale"]

NUM_PIXELS = 784
NUM_CLASSES = 10


class SimpleNN(nn.Module):
    """Two linear layers with a ReLU between them: 784 pixels, `hidden_size`, 10 digits.

    Parameters
    ----------
    hidden_size : int, default 128
        Width of the hidden layer.
    """

    def __init__(self, hidden_size: int = 128) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NUM_PIXELS, hidden_size)
        self.fc2 = nn.Linear(hidden_size, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 784) of float32 in [0, 1] to logits (n, 10)."""
        return self.fc2(torch.relu(self.fc1(images)))  # type: ignore[no-any-return]


def make_model(hidden_size: int = 128, seed: int = 0) -> SimpleNN:
    """Make a freshly initialised network; equal arguments give equal weights.

    Torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimpleNN(hidden_size)


def model_from_weights(weights: Mapping[str, torch.Tensor]) -> SimpleNN:
    """Make the network that has the given weights.

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
        ``fc1.weight`` (hidden, 784), ``fc1.bias`` (hidden,), ``fc2.weight`` (10, hidden) and
        ``fc2.bias`` (10,), float32.

    Raises
    ------
    ModelError
        If names, shapes or dtypes are others.
    """
    first = weights.get("fc1.weight")
    hidden_size = int(first.shape[0]) if first is not None and first.ndim else 128
    model = SimpleNN(hidden_size)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected or any(tensor.dtype != torch.float32 for tensor in weights.values()):
        types = sorted({str(tensor.dtype) for tensor in weights.values()})
        message = (
            f"the weights are not those of the network of `dask-nn mnist`: expected the float32 "
            f"tensors {expected}, got {found} of {', '.join(types) or 'no dtype'}"
        )
        raise ModelError(message)
    model.load_state_dict(dict(weights))
    return model


def scale(images: torch.Tensor) -> torch.Tensor:
    """Bring bytes (n, 784) to float32 in [0, 1]."""
    # Quicker than one product of bytes and a number, and equal to it bit for bit.
    return images.float().mul_(1 / 255)
