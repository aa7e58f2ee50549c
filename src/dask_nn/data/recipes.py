"""How each block is computed, as a small graph of its own: for blocks that are not kept.

The graph of a whole collection is cut into one part for each block. What many blocks need (a mean
over everything, say) is left out of the parts: the cluster computes it once. What a few neighbours
share (a chunk that two blocks are cut from) is computed by each of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask._task_spec import Alias, DataNode, GraphNode, convert_legacy_graph
from dask.array.core import getter, getter_inline, getter_nofancy
from dask.core import flatten, toposort
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    type Key = Any
    type Array = np.ndarray[Any, Any]

__all__ = ["Recipe", "cook", "split_source", "write_recipes"]

# What more blocks than these need is computed once, by the cluster.
FEW_BLOCKS = 4

_MANY = frozenset({-1})
_GETTERS = (getter, getter_inline, getter_nofancy)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one block is computed.

    Parameters
    ----------
    graph : dict
        Tasks by key.
    keys : tuple
        What the block consists of: one key for each field.
    shared : tuple
        Keys that the graph refers to, but does not hold.
    """

    graph: dict[Key, GraphNode]
    keys: tuple[Key, ...]
    shared: tuple[Key, ...]

    def only(self, places: Sequence[int]) -> Recipe:
        """Give the part that computes some of the fields."""
        keys = tuple(self.keys[place] for place in places)
        graph: dict[Key, GraphNode] = {}
        missing: dict[Key, None] = {}
        for key in _needed(keys, self.graph, missing.setdefault):
            graph[key] = self.graph[key]
        return Recipe(graph, keys, tuple(missing))


def write_recipes(arrays: Sequence[da.Array]) -> tuple[list[Recipe], list[Delayed]]:
    """Cut the graph of aligned arrays into one recipe for each block.

    Parameters
    ----------
    arrays : sequence of Array
        The same number of row chunks, one chunk along the other axes.

    Returns
    -------
    recipes : list of Recipe
        One for each block.
    shared : list of Delayed
        What many of them need; each has the key by which recipes refer to it.
    """
    keys_of = [list(flatten(array.__dask_keys__())) for array in arrays]
    # All in one: alone, each would get a copy of what it has in common with the others.
    merged = HighLevelGraph.merge(*(array.dask for array in arrays))
    optimized = da.Array.__dask_optimize__(merged, [key for keys in keys_of for key in keys])
    graph: dict[Key, GraphNode] = convert_legacy_graph(ensure_dict(optimized))
    outputs = list(zip(*keys_of, strict=True))
    hubs = _find_hubs(graph, outputs)
    recipes = []
    for keys in outputs:
        shared: dict[Key, None] = {}
        part = {key: graph[key] for key in _needed(keys, graph, shared.setdefault, stop=hubs)}
        recipes.append(Recipe(part, keys, tuple(shared)))
    below = {key: graph[key] for key in _needed(list(hubs), graph, {}.setdefault)}
    layers = HighLevelGraph.from_collections("dask-nn-shared", below)
    return recipes, [Delayed(key, layers, layer="dask-nn-shared") for key in hubs]


def cook(recipe: Recipe, shared: Mapping[Key, Any]) -> tuple[Array, ...]:
    """Compute a block, in this thread.

    Parameters
    ----------
    recipe : Recipe
        How.
    shared : mapping
        The values of ``recipe.shared``.
    """
    graph: dict[Key, Any] = dict(recipe.graph)
    graph |= {key: DataNode(key, shared[key]) for key in recipe.shared}
    return tuple(np.asarray(value) for value in dask.get(graph, list(recipe.keys)))


def split_source(array: da.Array, rows: int) -> da.Array | None:
    """Cut an array into smaller blocks where its source can be read in slices of rows.

    Parameters
    ----------
    array : Array
        Perhaps straight from ``dask.array.from_array`` or ``from_zarr``.
    rows : int
        Most rows of a block.

    Returns
    -------
    Array or None
        The same values in smaller blocks; None if chunks are computed, not read.
    """
    # Not optimized: reading would be hidden inside a fused task.
    graph = convert_legacy_graph(ensure_dict(array.__dask_graph__()))
    task = graph.get(next(iter(flatten(array.__dask_keys__()))))
    while isinstance(task, Alias):
        task = graph.get(task.target)
    if getattr(task, "func", None) not in _GETTERS:
        return None
    source = graph.get(getattr(task.args[0], "key", None))
    value = getattr(source, "value", None)
    if getattr(value, "shape", None) != array.shape:
        return None
    cut = []
    for length in array.chunks[0]:
        number = max(1, -(-length // rows))
        bounds = [length * part // number for part in range(number + 1)]
        cut += [stop - start for start, stop in itertools.pairwise(bounds)]
    smaller: da.Array = da.from_array(value, chunks=(tuple(cut), *array.chunks[1:]))
    return smaller


def _needed(
    keys: Sequence[Key],
    graph: Mapping[Key, GraphNode],
    outside: Callable[[Key, None], object],
    *,
    stop: Mapping[Key, None] | None = None,
) -> Iterator[Key]:
    """Give the keys of a graph that some keys depend on; tell of those that it does not hold."""
    waiting = list(keys)
    seen = set(keys)
    while waiting:
        key = waiting.pop()
        if key not in graph or (stop is not None and key in stop):
            outside(key, None)
            continue
        yield key
        for dependency in graph[key].dependencies:
            if dependency not in seen:
                seen.add(dependency)
                waiting.append(dependency)


def _find_hubs(
    graph: Mapping[Key, GraphNode], outputs: Sequence[tuple[Key, ...]]
) -> dict[Key, None]:
    """Find what more than a few blocks need directly: not through another such key."""
    reached: dict[Key, frozenset[int]] = dict.fromkeys(graph, frozenset())
    for number, keys in enumerate(outputs):
        for key in keys:
            reached[key] = _join(reached[key], frozenset({number}))
    hubs: dict[Key, None] = {}
    dependencies = {key: set(node.dependencies) & graph.keys() for key, node in graph.items()}
    for key in reversed(toposort(graph, dependencies=dependencies)):
        reach = reached[key]
        node = graph[key]
        if reach is _MANY and not isinstance(node, DataNode):
            hubs[key] = None
            continue
        for dependency in node.dependencies:
            if dependency in reached:
                reached[dependency] = _join(reached[dependency], reach)
    return hubs


def _join(one: frozenset[int], other: frozenset[int]) -> frozenset[int]:
    if one is _MANY or other is _MANY:
        return _MANY
    joined = one | other
    return _MANY if len(joined) > FEW_BLOCKS else joined
