"""The one binary tree in which the shards' buffers are added, whatever ranks hold them.

Floating-point addition is not associative, so a sum has reproducible bits only
if its order is fixed. Here the order is a binary tree over the shards
``0..V-1``, split as in a Merkle tree hash (RFC 6962, section 2.1): a node of
``n`` leaves has the largest power of two below ``n`` on its left. The shape of
a node depends on its size alone. A rank folds the shards it owns into the
maximal nodes inside its range; the ranks then fold these roots further in the
same tree. An addition is always ``left + right``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Addition",
    "Node",
    "all_roots",
    "fold_program",
    "group_roots",
    "roots",
    "shard_range",
    "split",
    "stack_program",
]


class Node(NamedTuple):
    """A node of the tree: the sum over the shards ``lo..hi-1``."""

    lo: int
    hi: int


class Addition(NamedTuple):
    """One addition of a fold: ``values[dst] = values[left] + values[right]``.

    `dst` may equal `left` or `right`, but is never one of the folded nodes.
    """

    dst: int
    left: int
    right: int


def split(lo: int, hi: int) -> int:
    """Return where the node ``[lo, hi)`` is cut into its left and right child.

    Raises
    ------
    ConfigurationError
        If the node has fewer than two leaves.
    """
    if hi - lo < 2:
        message = f"only a node of two or more shards can be split, got [{lo}, {hi})"
        raise ConfigurationError(message)
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def shard_range(rank: int, world_size: int, shards: int) -> tuple[int, int]:
    """Return the contiguous range ``(lo, hi)`` of shards that a rank computes.

    The range is empty for some ranks where `world_size` exceeds `shards`.

    Raises
    ------
    ConfigurationError
        If `rank` is not in ``0..world_size-1`` or `shards` is negative.
    """
    if not 0 <= rank < world_size:
        message = f"rank must be in 0..{world_size - 1}, got {rank}"
        raise ConfigurationError(message)
    if shards < 0:
        message = f"shards must not be negative, got {shards}"
        raise ConfigurationError(message)
    return shards * rank // world_size, shards * (rank + 1) // world_size


def roots(shards: int, lo: int, hi: int) -> tuple[Node, ...]:
    """Return the maximal nodes of the tree over `shards` that lie in ``[lo, hi)``.

    They are disjoint, in order, and cover the range; an empty range has none.

    Raises
    ------
    ConfigurationError
        If the range is not inside ``[0, shards)``.
    """
    if not 0 <= lo <= hi <= shards:
        message = f"expected a range of shards inside [0, {shards}), got [{lo}, {hi})"
        raise ConfigurationError(message)
    found: list[Node] = []
    pending = [Node(0, shards)]
    while pending:
        node = pending.pop()
        if max(node.lo, lo) >= min(node.hi, hi):
            continue
        if lo <= node.lo and node.hi <= hi:
            found.append(node)
            continue
        middle = split(*node)
        pending += [Node(middle, node.hi), Node(node.lo, middle)]
    return tuple(found)


def all_roots(shards: int, world_size: int) -> tuple[tuple[Node, ...], ...]:
    """Return the roots that each rank contributes, one tuple per rank.

    Together, in rank order, they cover ``0..shards-1`` without overlap.
    """
    return tuple(
        roots(shards, *shard_range(rank, world_size, shards)) for rank in range(world_size)
    )


def group_roots(shards: int, sizes: Sequence[int]) -> tuple[tuple[Node, ...], ...]:
    """Return the roots that each group of ranks contributes, one tuple per group.

    Parameters
    ----------
    shards : int
        Number of leaves of the whole tree.
    sizes : sequence of int
        Ranks of each group; ranks of a group follow each other.
    """
    world_size = sum(sizes)
    found = []
    first = 0
    for size in sizes:
        low, _ = shard_range(first, world_size, shards)
        first += size
        _, high = shard_range(first - 1, world_size, shards)
        found.append(roots(shards, low, high))
    return tuple(found)


def stack_program(node: Node) -> list[int]:
    """Return how to fold the leaves of a node in order on a small stack.

    After leaf ``i`` is pushed, the two values on top are replaced by their sum
    (``left + right``, right being the top) ``program[i]`` times. In the end the
    stack holds the node's value alone; it never holds more than
    ``floor(log2(len(program))) + 1`` values.

    Returns
    -------
    list of int
        One number of merges per leaf, shape ``(node.hi - node.lo,)``; empty for
        an empty node.
    """
    program = [0] * (node.hi - node.lo)
    pending = [node] if node.hi - node.lo > 1 else []
    while pending:
        inner = pending.pop()
        # A node is complete, and so merged, when its last leaf has come.
        program[inner.hi - 1 - node.lo] += 1
        middle = split(*inner)
        children = (Node(inner.lo, middle), Node(middle, inner.hi))
        pending += [child for child in children if child.hi - child.lo > 1]
    return program


def fold_program(shards: int, nodes: Sequence[Node]) -> list[Addition]:
    """Return the additions that combine disjoint covering nodes to the total.

    The value of ``nodes[i]`` has index ``i`` and is only read. Indices from
    ``len(nodes)`` on are scratch buffers, numbered without gaps and reused; no
    more are needed than the tree is deep. The total ends in scratch buffer
    ``len(nodes)``, or, if there is a single node and so no addition, in 0.

    Parameters
    ----------
    shards : int
        Number of leaves of the whole tree.
    nodes : sequence of Node
        Nodes of that tree, in any order, covering ``[0, shards)`` without overlap.

    Raises
    ------
    ConfigurationError
        If the nodes are none of this tree's, overlap, or leave a shard out.
    """
    index_of = {Node(*node): index for index, node in enumerate(nodes)}
    used: set[Node] = set()
    additions: list[Addition] = []

    def fold(node: Node, scratch: int) -> int:
        if node in index_of:
            used.add(node)
            return index_of[node]
        if node.hi - node.lo < 2:
            message = (
                f"the nodes must cover every shard of 0..{shards - 1}, but [{node.lo}, {node.hi}) "
                f"is in none of {list(index_of)}"
            )
            raise ConfigurationError(message)
        middle = split(*node)
        left = fold(Node(node.lo, middle), scratch)
        right = fold(Node(middle, node.hi), scratch + 1 if left == scratch else scratch)
        additions.append(Addition(scratch, left, right))
        return scratch

    fold(Node(0, shards), len(nodes))
    if len(used) != len(nodes):
        strange = [node for node in nodes if node not in used] or list(nodes)
        message = (
            f"the nodes must be disjoint nodes of the tree over {shards} shards, got {strange}"
        )
        raise ConfigurationError(message)
    return additions
