"""Folding the leaves of a rank's own shards into its subtree roots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dask_nn.collectives.tree import roots, stack_program

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.training.layout import LeafLayout, LeafViews

__all__ = ["LocalFold"]


class LocalFold:
    """Computes one leaf after the other, adding in the order of the fixed tree.

    Parameters
    ----------
    layout : LeafLayout
        Of the leaves.
    shards : int
        Leaves of the whole tree.
    own : range
        This rank's shards.
    device : torch.device
        Where the leaves are.
    """

    def __init__(
        self, layout: LeafLayout, *, shards: int, own: range, device: torch.device
    ) -> None:
        self._layout = layout
        nodes = roots(shards, own.start, own.stop)
        self._programs = [(node, stack_program(node)) for node in nodes]
        depth = max((len(program).bit_length() for _, program in self._programs), default=0)
        self._scratch = [
            layout.views(torch.zeros(layout.size, dtype=layout.dtype, device=device))
            for _ in range(depth)
        ]
        self._views: dict[int, LeafViews] = {}

    def run(self, slots: list[torch.Tensor], compute: Callable[[int, LeafViews], None]) -> None:
        """Fill the slots, one for each subtree root.

        Parameters
        ----------
        slots : list of Tensor
            Shape (leaf_size,) each.
        compute : callable
            Writes the leaf of a shard: ``compute(shard, views)``.
        """
        for slot, (node, program) in zip(slots, self._programs, strict=True):
            if len(program) == 1:
                compute(node.lo, self._views_of(slot))
                continue
            stack = [self._views_of(slot), *self._scratch]
            top = 0
            for shard, merges in zip(range(node.lo, node.hi), program, strict=True):
                compute(shard, stack[top])
                top += 1
                for _ in range(merges):
                    top -= 1
                    stack[top - 1].flat.add_(stack[top].flat)

    def _views_of(self, slot: torch.Tensor) -> LeafViews:
        views = self._views.get(id(slot))
        if views is None:
            views = self._views[id(slot)] = self._layout.views(slot)
        return views
