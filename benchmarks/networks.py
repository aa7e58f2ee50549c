"""What is trained: the guide's network, and a small convolutional one in which computing dominates.

Nothing but PyTorch is behind them, so every system that is compared trains the same module.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from dask_nn.examples.mnist.model import make_model

__all__ = ["Network", "SmallCNN", "make_network"]

Network = Literal["guide", "cnn"]


class SmallCNN(nn.Module):
    """Two 3x3 convolutions, 1 -> 16 -> 32 channels, each with ReLU and pooling, then linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 784) of float32 in [0, 1] to logits (n, 10)."""
        return self.layers(images)  # type: ignore[no-any-return]


def make_network(network: Network, seed: int) -> nn.Module:
    """Make a freshly initialised network; equal arguments give equal weights."""
    if network == "guide":
        return make_model(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN()
