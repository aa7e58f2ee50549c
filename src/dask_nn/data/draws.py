"""Seeing random numbers of PyTorch be drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WatchedDraws"]


class WatchedDraws(TorchDispatchMode):
    """Sees what this thread draws from PyTorch's own generators, not from one that it passes.

    Attributes
    ----------
    drew : bool
        Whether anything was drawn.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags
        self.drew |= draws and kwargs.get("generator") is None
        return func(*args, **kwargs)
