"""Adding up nodes of the fixed tree, with all operands known beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dask_nn.collectives.tree import Node, fold_program

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Fold", "slice_bounds"]

LINE_ELEMENTS = 16


class Fold:
    """The additions that make one node of the tree out of nodes inside it.

    Parameters
    ----------
    target : Node
        The node to make.
    nodes : sequence of Node
        Cover the target without overlap.
    values : sequence of Tensor
        One for each of the nodes; only read.
    total : Tensor
        Gets the target's value.
    """

    def __init__(
        self,
        target: Node,
        nodes: Sequence[Node],
        values: Sequence[torch.Tensor],
        total: torch.Tensor,
    ) -> None:
        # The shape of a node depends on its size alone.
        moved = [Node(node.lo - target.lo, node.hi - target.lo) for node in nodes]
        program = fold_program(target.hi - target.lo, moved)
        num_scratch = max((add.dst for add in program), default=0) - len(nodes)
        every = [*values, total, *(torch.zeros_like(total) for _ in range(num_scratch))]
        self._steps = [(every[a.left], every[a.right], every[a.dst]) for a in program]
        self._copied = None if program else (total, every[0])

    def run(self) -> None:
        """Add, the last time into the total."""
        for left, right, out in self._steps:
            torch.add(left, right, out=out)
        if self._copied is not None:
            total, only = self._copied
            total.copy_(only)


def slice_bounds(leaf_size: int, parts: int) -> list[int]:
    """Cut a leaf between cache lines into parts of about equal size.

    Returns
    -------
    list of int
        Shape (parts + 1,); part ``i`` is ``[bounds[i], bounds[i + 1])`` and may be empty.
    """
    lines = -(-leaf_size // LINE_ELEMENTS)
    inner = [min(lines * part // parts * LINE_ELEMENTS, leaf_size) for part in range(parts)]
    return [*inner, leaf_size]
