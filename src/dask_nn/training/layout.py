"""What one shard contributes to a step, as one flat buffer: a leaf of the reduction tree."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dask_nn.errors import ModelError
from dask_nn.metrics.forward import floating_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

__all__ = ["LeafLayout", "LeafViews"]

# Every part begins on a cache line, so that views are aligned like tensors of their own.
ALIGNMENT = 16
# Scalars at the end of a leaf, followed by one "was used" mark for each parameter.
LOSS, NORMALIZER, STOP, SAVE, WAIT, FIRST_MARK = range(6)


class LeafViews(NamedTuple):
    """The parts of one leaf, as views of it.

    ``gradients`` have the shapes of the trained parameters, ``buffers`` those of the averaged
    module buffers, and ``tail`` holds loss sum, normaliser, three votes and the marks; ``scalars``
    is the tail as a NumPy array where the leaf is in the host's memory, much faster to access.
    """

    flat: torch.Tensor
    gradients: list[torch.Tensor]
    buffers: list[torch.Tensor]
    tail: torch.Tensor
    scalars: np.ndarray[Any, Any] | None


class LeafLayout:
    """Where gradients, module buffers and scalars lie in a leaf.

    Parameters
    ----------
    model : torch.nn.Module
        Its trained parameters and its averaged buffers, in the order of registration.

    Attributes
    ----------
    size : int
        Elements of a leaf.
    dtype : torch.dtype
        float64 if any parameter or buffer is, else float32.
    floating : torch.dtype
        Type of the model's inputs: that of its first floating parameter or buffer.
    parameters : list of torch.nn.Parameter
        What is trained.
    buffers : list of torch.Tensor
        Buffers whose changes are averaged over the shards: floating and integer ones.

    Raises
    ------
    ModelError
        If a parameter is complex.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if any(p.is_complex() for p in self.parameters):
            message = (
                f"{type(model).__name__} has complex parameters; expected real ones, such as the "
                "two parts of torch.view_as_real"
            )
            raise ModelError(message)
        self.buffers = [
            b for b in model.buffers() if b.dtype != torch.bool and not b.dtype.is_complex
        ]
        wide = any(t.dtype == torch.float64 for t in (*self.parameters, *self.buffers))
        self.dtype = torch.float64 if wide else torch.float32
        self.floating = floating_dtype(model)
        self._gradient_at, end = self._lay([tuple(p.shape) for p in self.parameters], 0)
        self._buffer_at, end = self._lay([tuple(b.shape) for b in self.buffers], end)
        self._tail_at = end
        self.tail_size = FIRST_MARK + len(self.parameters)
        self.size = end + -(-self.tail_size // ALIGNMENT) * ALIGNMENT

    def views(self, flat: torch.Tensor) -> LeafViews:
        """Give the parts of a leaf, shape (size,)."""
        tail = flat[self._tail_at : self._tail_at + self.tail_size]
        return LeafViews(
            flat,
            [flat[at : at + prod(shape)].view(shape) for at, shape in self._gradient_at],
            [flat[at : at + prod(shape)].view(shape) for at, shape in self._buffer_at],
            tail,
            tail.numpy() if tail.device.type == "cpu" else None,
        )

    @property
    def num_gradient_elements(self) -> int:
        """Elements before the buffers and the tail: gradients and their padding."""
        return self._buffer_at[0][0] if self._buffer_at else self._tail_at

    @property
    def num_result_elements(self) -> int:
        """Elements before the votes: gradients, buffers, loss sum and normaliser."""
        return self._tail_at + STOP

    @staticmethod
    def _lay(
        shapes: Sequence[tuple[int, ...]], at: int
    ) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
        places = []
        for shape in shapes:
            places.append((at, shape))
            at += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
        return places, at
