"""From lazy arrays to a stream of blocks, with as little looking at the data as is possible."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask._task_spec import convert_legacy_graph
from dask.core import flatten
from dask.delayed import Delayed, delayed
from dask.utils import ensure_dict, format_bytes
from distributed.client import futures_of

from dask_nn.data.casts import join
from dask_nn.data.cuts import check_width, cut_rows
from dask_nn.data.finite import check_found, not_finite
from dask_nn.data.lengths import check_rows, check_shape
from dask_nn.data.problem import Problem, TaskLog, find_problem
from dask_nn.data.recipes import inseparable, origin, split_source, write_recipes
from dask_nn.data.sending import gather, wait_while_able
from dask_nn.data.sizes import KEPT_BYTES
from dask_nn.data.stream import Stream, Surveyor, needed_keys
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distributed import Client

    type Array = np.ndarray[Any, Any]

__all__ = ["is_persisted", "measure", "stream_blocks"]

# Blocks that are computed to learn how large blocks are, where nothing says it.
SAMPLED_BLOCKS = 3


def is_persisted(array: da.Array, client: Client | None) -> bool:
    """Tell whether every block of an array is in memory, or on its way there.

    What is computed from persisted blocks is not, but blocks chosen from them are.
    """
    if client is not None:
        held = {future.key for future in futures_of(array)}
        if not held or held.issuperset(_keys(array)):
            return bool(held)
        graph = convert_legacy_graph(ensure_dict(array.__dask_graph__()))
        return held.issuperset(origin(key, graph) for key in _keys(array))
    layer = array.dask.layers.get(array.name, {})
    values = (getattr(layer.get(key), "value", layer.get(key)) for key in _keys(array))
    return all(isinstance(value, np.ndarray) for value in values)


def _keys(array: da.Array) -> list[Any]:
    return list(flatten(array.__dask_keys__()))


def measure(arrays: Mapping[str, da.Array], client: Client | None) -> int:
    """Tell how many bytes arrays have, computing a few blocks of those of unknown length.

    Raises
    ------
    DataError
        If such a block cannot be computed; names it.
    """
    total = 0
    for name, array in arrays.items():
        if not np.isnan(array.nbytes):
            total += int(array.nbytes)
            continue
        blocks = _delayed_blocks(array)
        step = max(1, len(blocks) // SAMPLED_BLOCKS)
        size_of = delayed(np.size, pure=False)
        sampled = {number: size_of(blocks[number]) for number in range(0, len(blocks), step)}
        counts = (
            _computed_here(name, sampled) if client is None else _computed(name, sampled, client)
        )
        total += int(np.mean(counts)) * array.dtype.itemsize * len(blocks)
    return total


def _delayed_blocks(array: da.Array) -> list[Delayed]:
    """Give the blocks one by one, with keys of their own.

    The scheduler would confuse their tasks with those of the whole, which is optimized in another
    way.
    """
    layers: Any = array.__dask_graph__()
    graph = convert_legacy_graph(ensure_dict(layers))
    pinned = any(layer.annotations for layer in layers.layers.values())
    if pinned or any(inseparable(graph)):  # by their keys
        return list(array.to_delayed(optimize_graph=False).ravel())
    token = uuid.uuid4().hex
    renamed = {key: f"dask-nn-measure-{token}-{number}" for number, key in enumerate(graph)}
    own = {renamed[key]: node.substitute(renamed, renamed[key]) for key, node in graph.items()}
    return [Delayed(renamed[key], own) for key in _keys(array)]


def _computed_here(name: str, parts: Mapping[int, Any]) -> Sequence[Any]:
    """Compute numbers that are made of some blocks, in this process."""
    try:
        with TaskLog() as log:
            found: Sequence[Any] = dask.compute(*parts.values())
    except Exception as error:
        if (problem := find_problem(parts.items(), log)) is not None:
            raise problem.error(name) from error
        message = f"blocks of {name} could not be computed to see how large they are: {error!r}"
        raise DataError(message) from error
    return found


def _computed(name: str, parts: Mapping[int, Any], client: Client) -> Sequence[Any]:
    """Compute numbers that are made of some blocks, on the cluster."""
    futures = client.compute(list(parts.values()))
    wait_while_able(client, futures)
    for number, future in zip(parts, futures, strict=True):
        if future.status == "error":
            problem = Problem.of_future(number, future, client)
            raise problem.error(name) from future.exception()
    return gather(client, futures)


def stream_blocks(
    arrays: dict[str, Any], *, client: Client | None, block_limit_bytes: int | None
) -> tuple[Stream, Surveyor]:
    """Make a stream of aligned arrays.

    Parameters
    ----------
    arrays : dict
        From name to Dask array with one chunk along all axes but the first, or NumPy array.
    client : Client or None
        Looks at the blocks; this process if None.
    block_limit_bytes : int or None
        Largest block that a worker can work on.

    Returns
    -------
    stream : Stream
        For the workers.
    surveyor : Surveyor
        Holds the shared parts on the cluster: `futures`, and `literals` that were sent there.

    Raises
    ------
    DataError
        If the length of an axis other than the first is unknown, before anything is computed; if a
        block cannot be computed, is too large, or is not what its array says.
    """
    names = list(arrays)
    lazy = {name: array for name, array in arrays.items() if isinstance(array, da.Array)}
    kept = {
        place: np.asarray(array)
        for place, (name, array) in enumerate(arrays.items())
        if name not in lazy
    }
    _check_inputs(lazy, kept, names)
    finite: set[int] = set()
    known = not any(np.isnan(array.shape[0]) for array in lazy.values())
    if not known and len({array.numblocks[0] for array in lazy.values()}) > 1:
        lazy = {name: _with_lengths(name, array, client) for name, array in lazy.items()}
        known = True
    if known:
        lazy = _cut(lazy, block_limit_bytes)
    surveyor = Surveyor(client)
    recipes, shared = write_recipes(list(lazy.values()), surveyor.sizes)
    surveyor.share(shared)
    places = [names.index(name) for name in lazy]
    types = [array.dtype for array in lazy.values()]
    targets = [number for number, name in enumerate(lazy) if not name.startswith("X")]
    if known:
        lengths = tuple(map(int, next(iter(lazy.values())).chunks[0]))
        small = [number for number in targets if list(lazy.values())[number].nbytes <= KEPT_BYTES]
        if small:
            parts = [recipe.only(small) for recipe in recipes]
            of = [names[places[number]] for number in small]
            found = surveyor.look(_values, parts, " and ".join(of))
            _check_shapes(found, lengths, {name: lazy[name] for name in of})
            joined = {
                places[number]: join(column, types[number], names[places[number]])
                for number, column in zip(small, zip(*found, strict=True), strict=True)
            }
            kept |= {place: one for place, one in joined.items() if one.nbytes <= KEPT_BYTES}
    else:
        share = max(1, 2 * KEPT_BYTES // max(1, len(recipes)))
        look = partial(_survey, targets, share)
        found = surveyor.look(look, recipes, " and ".join(lazy))
        lengths = _lengths([block.shapes for block in found], lazy, block_limit_bytes)
        for number, target in enumerate(targets):
            missing = [block.missing[number] for block in found]
            check_found(missing, lengths, names[places[target]])
            finite.add(places[target])
            values = [block.values[number] for block in found]
            if all(value is not None for value in values):
                column = join(values, types[target], names[places[target]])
                if column.nbytes <= KEPT_BYTES:
                    kept[places[target]] = column
    streamed = [number for number, place in enumerate(places) if place not in kept]
    if len(streamed) < len(places):
        recipes = [recipe.only(streamed) for recipe in recipes]
    surveyor.keep(set(needed_keys(recipes)))
    stream = Stream(
        recipes=tuple(recipes),
        names=tuple(names),
        places=tuple(places[number] for number in streamed),
        kept=kept,
        lengths=lengths,
        shared=surveyor.keys,
        values=surveyor.values,
        finite=frozenset(finite),
    )
    return stream, surveyor


def _with_lengths(name: str, array: da.Array, client: Client | None) -> da.Array:
    """Find the rows of an array's blocks by computing each of them once."""
    if not np.isnan(array.shape[0]):
        return array
    surveyor = Surveyor(client)
    recipes, shared = write_recipes([array], surveyor.sizes)
    surveyor.share(shared)
    found = surveyor.look(partial(_survey, [], 0), recipes, name)
    lengths = _lengths([block.shapes for block in found], {name: array}, None)
    return da.Array(array.dask, array.name, (lengths, *array.chunks[1:]), meta=array)


def _cut(lazy: dict[str, da.Array], limit_bytes: int | None) -> dict[str, da.Array]:
    """Cut arrays at the rows of the first, and smaller where a block would be too large."""
    (first, reference), *_ = lazy.items()
    row_bytes = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in lazy.values())
    largest = max(reference.chunks[0], default=0)
    if limit_bytes is not None and largest * row_bytes > limit_bytes:
        smaller = split_source(reference, max(1, limit_bytes // max(1, row_bytes)))
        if smaller is None:
            block = reference.chunks[0].index(largest)
            message = (
                f"block {block} of {first} has {format_bytes(largest * row_bytes)}, more than a "
                f"worker can work on ({format_bytes(limit_bytes)}), and it is computed as a "
                "whole: rechunk it where it is made, or use workers with more memory"
            )
            raise DataError(message)
        reference = smaller
    rows = reference.chunks[0]
    return {
        name: reference if name == first else cut_rows(name, array, rows)
        for name, array in lazy.items()
    }


def _check_inputs(lazy: dict[str, da.Array], kept: dict[int, Array], names: list[str]) -> None:
    for name, chunked in lazy.items():
        check_width(name, chunked)
    for place, array in kept.items():
        if array.nbytes > KEPT_BYTES:
            message = (
                f"{names[place]} lies in this process and has {format_bytes(array.nbytes)}, too "
                "much to be sent to every worker; give it as a Dask array too"
            )
            raise DataError(message)


def _check_shapes(
    found: Sequence[tuple[Array, ...]], lengths: Sequence[int], told: Mapping[str, da.Array]
) -> None:
    """Check that blocks, of one column for each array, have the rows that the arrays tell."""
    for block, (columns, length) in enumerate(zip(found, lengths, strict=True)):
        check_rows(block, columns, length, of=list(told))
        for (name, array), column in zip(told.items(), columns, strict=True):
            check_shape(column.shape, array.shape[1:], f"block {block} of {name}")


def _values(columns: tuple[Array, ...]) -> tuple[Array, ...]:
    return columns


class _Surveyed(NamedTuple):
    """What is found out of a block: all shapes; and of some fields the values, or what is wrong."""

    shapes: list[tuple[int, ...]]
    values: list[Array | None]
    missing: list[tuple[int, int]]


def _survey(targets: list[int], share_bytes: int, columns: tuple[Array, ...]) -> _Surveyed:
    """Look at a block once; give back targets of no more than a share of what may be kept."""
    found = [columns[target] for target in targets]
    return _Surveyed(
        [column.shape for column in columns],
        [column if column.nbytes <= share_bytes else None for column in found],
        [not_finite(column) for column in found],
    )


def _lengths(
    found: list[list[tuple[int, ...]]], lazy: dict[str, da.Array], limit_bytes: int | None
) -> tuple[int, ...]:
    """Check the shapes of all blocks, and give their rows."""
    row_bytes = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in lazy.values())
    for block, shapes in enumerate(found):
        rows = shapes[0][0] if shapes[0] else 0
        for (name, array), shape in zip(lazy.items(), shapes, strict=True):
            check_shape(shape, array.shape[1:], f"block {block} of {name}")
            if shape[0] != rows:
                message = (
                    f"block {block} of {name} has {shape[0]} rows, but that of "
                    f"{next(iter(lazy))} has {rows}"
                )
                raise DataError(message)
        if limit_bytes is not None and rows * row_bytes > limit_bytes:
            message = (
                f"block {block} of {' and '.join(lazy)} has {format_bytes(rows * row_bytes)}, more "
                f"than a worker can work on ({format_bytes(limit_bytes)}): repartition the "
                "collection"
            )
            raise DataError(message)
    return tuple(shapes[0][0] for shapes in found)
