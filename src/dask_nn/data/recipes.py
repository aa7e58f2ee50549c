"""How each block is computed, as a small graph of its own: for blocks that are not kept.

The graph of a whole collection is cut into one part for each block. What many blocks need (a mean
over everything, say) is left out of the parts, if it is small: the cluster computes it once. What a
few neighbours share (a chunk that two blocks are cut from), and what is too large to be at every
worker, is computed by each of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask._task_spec import Alias, DataNode, GraphNode, Task, convert_legacy_graph
from dask.array.core import getter, getter_inline, getter_nofancy, slices_from_chunks
from dask.core import flatten, toposort
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict, format_bytes, key_split
from distributed.client import futures_of

from dask_nn.data.sizes import LARGE_LITERAL_BYTES, SHARED_BYTES, pickled_bytes
from dask_nn.data.zarr_rows import watched
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from distributed import Future

    type Key = Any
    type Array = np.ndarray[Any, Any]

__all__ = ["Literal", "Recipe", "cook", "inseparable", "origin", "split_source", "write_recipes"]

# What no more blocks than these need is computed by each of them.
FEW_BLOCKS = 4
# What is too large to be shared may be computed so often in an epoch, not more often.
MOST_REPEATS = 16
# So many values of one kind are looked at, to tell how large all of them are.
SAMPLED = 2

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


@dataclass(frozen=True)
class Literal:
    """A large value that a graph holds, such as a dataset: sent once, not with every block."""

    key: Key
    value: Any


def write_recipes(
    arrays: Sequence[da.Array], sizes: Callable[[Sequence[Delayed]], list[int]] | None = None
) -> tuple[list[Recipe], list[Delayed | Future[Any] | Literal]]:
    """Cut the graph of aligned arrays into one recipe for each block.

    Parameters
    ----------
    arrays : sequence of Array
        The same number of row chunks, one chunk along the other axes.
    sizes : callable, optional
        Computes values and tells their sizes in bytes; without it all are taken for small.

    Returns
    -------
    recipes : list of Recipe
        One for each block.
    shared : list of Delayed, Future or Literal
        What many of them need, computed yet or not; each has the key by which recipes refer to it.

    Raises
    ------
    DataError
        If blocks cannot be computed one by one: because of a shuffle or rechunk over all workers
        at once, or because something large would be computed for each of many blocks.
    """
    keys_of = [list(flatten(array.__dask_keys__())) for array in arrays]
    # All in one: alone, each would get a copy of what it has in common with the others.
    merged = HighLevelGraph.merge(*(array.dask for array in arrays))
    optimized = da.Array.__dask_optimize__(merged, [key for keys in keys_of for key in keys])
    graph: dict[Key, GraphNode] = convert_legacy_graph(ensure_dict(optimized))
    _check_separable(graph)
    # What is persisted is no task any more: its keys stand outside of the graph.
    held = {future.key: future for future in futures_of(list(arrays))}
    outputs = list(zip(*keys_of, strict=True))
    repeated: set[str] = set()
    small: set[str] = set()
    room = SHARED_BYTES
    while True:
        hubs = _find_hubs(graph, outputs, repeated)
        kinds: dict[str, list[Key]] = {}
        for key in hubs:
            if not isinstance(graph[key], DataNode) and key_split(key) not in small:
                kinds.setdefault(key_split(key), []).append(key)
        found = _measured(kinds, graph, sizes)
        for kind, size in sorted(found.items(), key=lambda item: item[1]):
            if size <= room:
                small.add(kind)
                room -= size
            else:
                repeated.add(kind)
        if small.issuperset(kinds):
            break
    recipes = []
    needed: dict[Key, None] = {}
    watch = _Watch()
    for keys in outputs:
        shared: dict[Key, None] = {}
        wanted = _needed(keys, graph, shared.setdefault, stop=hubs)
        part = {key: watch.over(graph[key]) for key in wanted}
        recipes.append(Recipe(part, keys, tuple(shared)))
        needed |= shared
    _check_repeats(recipes, repeated)
    computed = _delayed([key for key in hubs if not isinstance(graph[key], DataNode)], graph)
    known: dict[Key, Any] = computed | held
    return recipes, [
        known[key] if key in known else Literal(key, getattr(graph[key], "value", None))
        for key in needed
    ]


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
        The same values in smaller blocks; None unless each block is read from the place in one
        source that it has in the array.
    """
    # Not optimized: reading would be hidden inside a fused task.
    graph = convert_legacy_graph(ensure_dict(array.__dask_graph__()))
    found = _only_source(array, graph)
    if found is None or getattr(found[0], "shape", None) != array.shape:
        return None
    source, how = found
    cut = []
    for length in array.chunks[0]:
        number = max(1, -(-length // rows))
        bounds = [length * part // number for part in range(number + 1)]
        cut += [stop - start for start, stop in itertools.pairwise(bounds)]
    smaller: da.Array = da.from_array(source, chunks=(tuple(cut), *array.chunks[1:]), **how)
    return smaller


def origin(key: Key, graph: Mapping[Key, GraphNode]) -> Key:
    """Give the key that another one stands for."""
    while isinstance(node := graph.get(key), Alias) and node.target != key:
        key = node.target
    return key


def _only_source(
    array: da.Array, graph: Mapping[Key, GraphNode]
) -> tuple[Any, dict[str, Any]] | None:
    """Find what all blocks are read from, each at its own place, and how (under what lock).

    None if there is no such thing: blocks in another order are not the rows of a source, nor are
    blocks of which some are computed.
    """
    found: set[Key] = set()
    how: dict[str, Any] = {}
    keys = flatten(array.__dask_keys__())
    for key, place in zip(keys, slices_from_chunks(array.chunks), strict=True):
        task = graph.get(origin(key, graph))
        if not isinstance(task, Task) or task.func not in _GETTERS or len(task.args) != 2:
            return None
        read_from, index = task.args
        if getattr(index, "value", index) != place:
            return None
        found.add(getattr(read_from, "key", None))
        if len(found) > 1:
            return None
        how = dict(task.kwargs)
    source = graph.get(found.pop()) if found else None
    return (source.value, how) if isinstance(source, DataNode) else None


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
    graph: Mapping[Key, GraphNode], outputs: Sequence[tuple[Key, ...]], repeated: Collection[str]
) -> dict[Key, None]:
    """Find what more than a few blocks need directly: not through another such key."""
    reached: dict[Key, frozenset[int]] = dict.fromkeys(graph, frozenset())
    for number, keys in enumerate(outputs):
        for key in graph.keys() & set(keys):
            reached[key] = _join(reached[key], frozenset({number}))
    hubs: dict[Key, None] = {}
    dependencies = {key: set(node.dependencies) & graph.keys() for key, node in graph.items()}
    for key in reversed(toposort(graph, dependencies=dependencies)):
        reach = reached[key]
        node = graph[key]
        if reach and _is_hub(key, node, reach, repeated):
            hubs[key] = None
            continue
        for dependency in node.dependencies:
            if dependency in reached:
                reached[dependency] = _join(reached[dependency], reach)
    return hubs


def _is_hub(key: Key, node: GraphNode, reach: frozenset[int], repeated: Collection[str]) -> bool:
    if isinstance(node, DataNode):
        return reach is _MANY and pickled_bytes(node.value) > LARGE_LITERAL_BYTES
    return reach is _MANY and not isinstance(node, Alias) and key_split(key) not in repeated


def _join(one: frozenset[int], other: frozenset[int]) -> frozenset[int]:
    if one is _MANY or other is _MANY:
        return _MANY
    joined = one | other
    return _MANY if len(joined) > FEW_BLOCKS else joined


def _measured(
    kinds: Mapping[str, Sequence[Key]],
    graph: Mapping[Key, GraphNode],
    sizes: Callable[[Sequence[Delayed]], list[int]] | None,
) -> dict[str, int]:
    """Estimate the bytes of all values of each kind, by computing one or two of them."""
    if sizes is None or not kinds:
        return dict.fromkeys(kinds, 0)
    sampled = {kind: {keys[0], keys[-1]} for kind, keys in kinds.items()}
    flat = [(kind, key) for kind, keys in sampled.items() for key in keys]
    found = sizes(list(_delayed([key for _, key in flat], graph).values()))
    largest: dict[str, int] = {}
    for (kind, _), size in zip(flat, found, strict=True):
        largest[kind] = max(largest.get(kind, 0), size)
    return {kind: largest[kind] * len(keys) for kind, keys in kinds.items()}


def _delayed(keys: Sequence[Key], graph: Mapping[Key, GraphNode]) -> dict[Key, Delayed]:
    """Make parts of a graph that can be computed, in one graph: what they share is done once."""
    below = {needed: graph[needed] for needed in _needed(keys, graph, {}.setdefault)}
    layers = HighLevelGraph.from_collections("dask-nn-shared", below)
    return {key: Delayed(key, layers, layer="dask-nn-shared") for key in keys}


class _Watch:
    """Has stores looked at again at every read; each is listed once, however many blocks it has."""

    def __init__(self) -> None:
        self._watched: dict[int, Any] = {}

    def over(self, node: GraphNode) -> GraphNode:
        if not isinstance(node, DataNode):
            return node
        number = id(node.value)  # the graph holds it
        if number not in self._watched:
            self._watched[number] = watched(node.value)
        value = self._watched[number]
        return node if value is node.value else DataNode(node.key, value)


def _check_separable(graph: Mapping[Key, GraphNode]) -> None:
    """Refuse graphs whose tasks talk to each other beside the graph."""
    for key in inseparable(graph):
        raise DataError(
            f"{key_split(key)!r} moves rows between all workers at once (P2P), so no block can "
            "be computed alone, as memory='stream' does: write the result to Zarr or Parquet "
            "first, use memory='resident', or for a rechunk set "
            "dask.config.set({'array.rechunk.method': 'tasks'}) where it is made"
        )


def inseparable(graph: Mapping[Key, GraphNode]) -> Iterator[Key]:
    """Give the tasks that talk to each other beside the graph, by keys that must stay theirs."""
    for key, node in graph.items():
        modules = {type(node).__module__, getattr(getattr(node, "func", None), "__module__", "")}
        if any((module or "").startswith("distributed.shuffle") for module in modules):
            yield key


def _check_repeats(recipes: Sequence[Recipe], repeated: Collection[str]) -> None:
    """Refuse to compute something large again and again."""
    if not repeated:
        return
    counts = Counter(
        key for recipe in recipes for key in recipe.graph if key_split(key) in repeated
    )
    for key, count in counts.most_common(1):
        if count > MOST_REPEATS:
            raise DataError(
                f"{count} blocks need the same {key_split(key)!r}, which is too large to be at "
                f"every worker (all of them have more than {format_bytes(SHARED_BYTES)}) and would "
                "be computed anew for each block: use blocks as large as those of the source, "
                "write the result to Zarr or Parquet first, or use memory='resident'"
            )
