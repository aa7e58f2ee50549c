"""From lazy arrays to a stream of blocks, with as little looking at the data as is possible."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask.core import flatten
from dask.utils import format_bytes
from distributed.client import futures_of

from dask_nn.data.recipes import split_source, write_recipes
from dask_nn.data.stream import Stream, Surveyor
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

    type Array = np.ndarray[Any, Any]

__all__ = ["is_persisted", "measure", "stream_blocks"]

# Labels and weights of so many bytes in all go to every worker as they are.
KEPT_BYTES = 64 << 20
# Blocks that are computed to learn how large blocks are, where nothing says it.
SAMPLED_BLOCKS = 3


def is_persisted(array: da.Array, client: Client | None) -> bool:
    """Tell whether every block of an array is in memory, or on its way there."""
    if client is not None:
        return bool(len(futures_of(array)) >= array.npartitions)
    layer = array.dask.layers.get(array.name, {})
    values = (getattr(layer.get(key), "value", layer.get(key)) for key in _keys(array))
    return all(isinstance(value, np.ndarray) for value in values)


def _keys(array: da.Array) -> list[Any]:
    return list(flatten(array.__dask_keys__()))


def measure(arrays: Sequence[da.Array], client: Client | None) -> int:
    """Tell how many bytes arrays have, computing a few blocks of those of unknown length."""
    total = 0
    for array in arrays:
        if not np.isnan(array.nbytes):
            total += int(array.nbytes)
            continue
        blocks = array.blocks.ravel()
        step = max(1, len(blocks) // SAMPLED_BLOCKS)
        sampled = [da.count_nonzero(da.ones_like(block)) for block in blocks[::step]]
        try:
            counts = (
                dask.compute(*sampled) if client is None else client.gather(client.compute(sampled))
            )
        except Exception as error:
            message = f"some blocks could not be computed to see how large they are: {error!r}"
            raise DataError(message) from error
        total += int(np.mean(counts)) * array.dtype.itemsize * len(blocks)
    return total


def stream_blocks(
    arrays: dict[str, Any], *, client: Client | None, block_limit_bytes: int | None
) -> tuple[Stream, list[Any]]:
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
    futures : list
        What keeps the shared parts on the cluster.
    """
    lazy = {name: array for name, array in arrays.items() if isinstance(array, da.Array)}
    known = not any(np.isnan(array.shape[0]) for array in lazy.values())
    if known:
        lazy = _cut(lazy, block_limit_bytes)
    else:
        _check_same_blocks(lazy)
    names = list(arrays)
    places = tuple(names.index(name) for name in lazy)
    recipes, shared = write_recipes(list(lazy.values()))
    surveyor = Surveyor(client, shared)
    kept = {
        place: np.asarray(array)
        for place, (name, array) in enumerate(arrays.items())
        if name not in lazy
    }
    _check_kept(kept, names)
    small = [name for name in lazy if not name.startswith("X") and _is_small(lazy, name)]
    lengths = tuple(map(int, next(iter(lazy.values())).chunks[0])) if known else ()
    if known and small:
        parts = [recipe.only([list(lazy).index(name) for name in small]) for recipe in recipes]
        found = surveyor.look(_values, parts, " and ".join(small))
        columns = list(zip(*found, strict=True))
    elif not known:
        positions = [list(lazy).index(name) for name in small]
        found = surveyor.look(partial(_survey, positions), recipes, " and ".join(lazy))
        lengths = _lengths([shapes for shapes, _ in found], lazy, block_limit_bytes)
        columns = list(zip(*(values for _, values in found), strict=True))
    else:
        columns = []
    for name, column in zip(small, columns, strict=True):
        kept[names.index(name)] = np.concatenate(column)
    streamed = [number for number, name in enumerate(lazy) if name not in small]
    if small:
        recipes = [recipe.only(streamed) for recipe in recipes]
    surveyor.keep({key for recipe in recipes for key in recipe.shared})
    stream = Stream(
        recipes=tuple(recipes),
        places=tuple(places[number] for number in streamed),
        kept=kept,
        lengths=lengths,
        shared=surveyor.keys,
        values=surveyor.values,
    )
    return stream, surveyor.futures


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
        name: reference
        if name == first
        else (array if array.chunks[0] == rows else array.rechunk({0: rows}))
        for name, array in lazy.items()
    }


def _check_same_blocks(lazy: dict[str, da.Array]) -> None:
    numbers = {name: array.numblocks[0] for name, array in lazy.items()}
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{name} has {number}" for name, number in numbers.items())
        message = (
            f"inputs whose lengths are unknown must have the same number of blocks, but {listed}; "
            "call compute_chunk_sizes() on them, or repartition them alike"
        )
        raise DataError(message)


def _check_kept(kept: dict[int, Array], names: list[str]) -> None:
    for place, array in kept.items():
        if array.nbytes > KEPT_BYTES:
            message = (
                f"{names[place]} lies in this process and has {format_bytes(array.nbytes)}, too "
                "much to be sent to every worker; give it as a Dask array too"
            )
            raise DataError(message)


def _is_small(lazy: dict[str, da.Array], name: str) -> bool:
    """Tell whether a field is so small that every worker can have it."""
    array = lazy[name]
    if not np.isnan(array.nbytes):
        return bool(array.nbytes <= KEPT_BYTES)
    return bool(array.ndim == 1)


def _values(columns: tuple[Array, ...]) -> tuple[Array, ...]:
    return columns


def _survey(
    positions: list[int], columns: tuple[Array, ...]
) -> tuple[list[tuple[int, ...]], tuple[Array, ...]]:
    return [column.shape for column in columns], tuple(columns[place] for place in positions)


def _lengths(
    found: list[list[tuple[int, ...]]], lazy: dict[str, da.Array], limit_bytes: int | None
) -> tuple[int, ...]:
    """Check the shapes of all blocks, and give their rows."""
    row_bytes = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in lazy.values())
    for block, shapes in enumerate(found):
        rows = shapes[0][0] if shapes[0] else 0
        for (name, array), shape in zip(lazy.items(), shapes, strict=True):
            if shape[1:] != tuple(array.shape[1:]) or len(shape) != array.ndim:
                message = (
                    f"block {block} of {name} has shape {shape}, expected rows of shape "
                    f"{tuple(array.shape[1:])} as in the first block"
                )
                raise DataError(message)
            if shape[0] != rows:
                message = (
                    f"block {block} of {name} has {shape[0]} rows, but that of "
                    f"{next(iter(lazy))} has {rows}"
                )
                raise DataError(message)
        if limit_bytes is not None and rows * row_bytes > limit_bytes:
            message = (
                f"block {block} has {format_bytes(rows * row_bytes)}, more than a worker can work "
                f"on ({format_bytes(limit_bytes)}): repartition the collection"
            )
            raise DataError(message)
    return tuple(shapes[0][0] for shapes in found)
