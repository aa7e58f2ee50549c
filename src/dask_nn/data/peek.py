"""A look at the data before any work starts: some rows, and the values of the targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
from distributed import Future

from dask_nn.data.casts import find_misfit, joinable
from dask_nn.data.finite import check_found, not_finite
from dask_nn.data.lengths import check_shape
from dask_nn.data.problem import Problem, this_worker
from dask_nn.data.reader import with_retries
from dask_nn.data.sending import gather
from dask_nn.data.stream import Stream, Surveyor, needed_keys
from dask_nn.errors import ClusterError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

    from dask_nn.data.blocks import Blocks, Field

__all__ = ["LabelRange", "check_finite", "label_range", "sample"]

type Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """The least and greatest label, and whether labels to be ignored occur.

    ``low > high`` if there are no labels but ignored ones.
    """

    low: int
    high: int
    ignored: bool


def sample(blocks: Blocks, rows: int, *, client: Client | None) -> tuple[Array, ...]:
    """Give the first rows of the data, one array of native byte order for each field.

    Parameters
    ----------
    blocks : Blocks
        The data set.
    rows : int
        At most so many.
    client : Client or None
        Where the blocks are; this process if None.

    Raises
    ------
    DataError
        If blocks are not what their arrays said, hold no numbers, or cannot be computed.
    """
    takes = []
    for number, length in enumerate(blocks.lengths):
        if length and rows:
            takes.append((number, min(length, rows)))
            rows -= takes[-1][1]
    if blocks.stream is not None:
        heads = _heads_of_stream(blocks, takes, client)
    elif blocks.arrays is not None:
        heads = [[_head(array, take) for array in blocks.arrays[n]] for n, take in takes]
    elif client is None or blocks.keys is None:
        message = "blocks with keys need a client"
        raise ValueError(message)
    else:
        heads = client.gather(
            [
                [
                    client.submit(_head, Future(key, client), take, pure=False)
                    for key in blocks.keys[n]
                ]
                for n, take in takes
            ]
        )
    heads = [
        [_numbers(head, field, number) for head, field in zip(arrays, blocks.fields, strict=True)]
        for (number, _), arrays in zip(takes, heads, strict=True)
    ]
    for (number, take), arrays in zip(takes, heads, strict=True):
        for field, head in zip(blocks.fields, arrays, strict=True):
            what = f"block {number} of {field.name}, cut to its first rows,"
            check_shape(head.shape, field.shape, what, length=take)
    return tuple(np.concatenate(column) for column in zip(*heads, strict=True))


def label_range(blocks: Blocks, *, ignore: int, place: int, client: Client | None) -> LabelRange:
    """Find the range of integer labels, where they lie.

    Parameters
    ----------
    blocks : Blocks
        The data set.
    ignore : int
        A label that stands for none.
    place : int
        Which field holds the labels.
    client : Client or None
        Where the blocks are; this process if None.

    Raises
    ------
    DataError
        If a block has values that are no integers.
    """
    parts = []
    for block, part in enumerate(_on_blocks(partial(_range, ignore=ignore), blocks, place, client)):
        if isinstance(part, str):
            message = f"block {block} of {blocks.fields[place].name} {part}"
            raise DataError(message)
        parts.append(part)
    seen = [part for part in parts if part.low <= part.high]
    return LabelRange(
        low=min((part.low for part in seen), default=0),
        high=max((part.high for part in seen), default=-1),
        ignored=any(part.ignored for part in parts),
    )


def check_finite(blocks: Blocks, *, place: int, client: Client | None) -> None:
    """Check that a floating field has neither missing nor infinite values.

    Raises
    ------
    DataError
        If it has; names the field and the first such row.
    """
    parts = _on_blocks(not_finite, blocks, place, client)
    check_found(parts, blocks.lengths, blocks.fields[place].name)


def _on_blocks(
    function: Callable[[Array], Any], blocks: Blocks, place: int, client: Client | None
) -> list[Any]:
    """Apply a function to one field of every block, where it lies."""
    if blocks.stream is not None:
        stream = blocks.stream
        if place in stream.kept:
            starts = stream.starts
            column = stream.kept[place]
            return [
                function(column[start : start + length])
                for start, length in zip(starts, stream.lengths, strict=False)
            ]
        recipes = [recipe.only([stream.places.index(place)]) for recipe in stream.recipes]
        surveyor = Surveyor.of(stream, blocks.futures, client)
        return surveyor.look(partial(_first, function), recipes, blocks.fields[place].name)
    if blocks.arrays is not None:
        return [function(arrays[place]) for arrays in blocks.arrays]
    if client is None or blocks.keys is None:
        message = "blocks with keys need a client"
        raise ValueError(message)
    futures: list[Any] = [Future(keys[place], client) for keys in blocks.keys]
    return gather(client, client.map(function, futures, pure=False))


def _heads_of_stream(
    blocks: Blocks, takes: list[tuple[int, int]], client: Client | None
) -> list[list[Array]]:
    """Compute the first blocks, on the cluster if there is one."""
    stream = blocks.stream
    assert stream is not None  # noqa: S101 - for the type checker
    numbers = [number for number, _ in takes]
    starts = stream.starts
    few = replace(
        stream,
        recipes=tuple(stream.recipes[number] for number in numbers),
        lengths=tuple(stream.lengths[number] for number in numbers),
        numbers=tuple(numbers),
        kept={
            place: np.concatenate(
                [column[starts[n] : starts[n] + stream.lengths[n]] for n in numbers]
            )
            for place, column in stream.kept.items()
        },
    )
    few = replace(few, shared=needed_keys(few.recipes))
    of_key = dict(zip(stream.shared, blocks.futures, strict=False))
    order = cloudpickle.dumps((few, takes))
    try:
        heads: list[list[Array]] | Problem
        if client is None:
            heads = _heads(order, [])
        else:
            futures = [of_key[key] for key in few.shared]
            task = client.submit(_heads, order, futures, pure=False)
            heads = gather(client, [task])[0]
    except (ClusterError, DataError):
        raise
    except Exception as error:
        message = f"the first block could not be computed: {type(error).__name__}: {error}"
        raise DataError(message) from error
    if isinstance(heads, Problem):
        raise heads.error(stream.computed)
    return heads


def _heads(order: bytes, shared: list[Any]) -> list[list[Array]] | Problem:
    few: Stream
    few, takes = cloudpickle.loads(order)
    values = few.values | dict(zip(few.shared, shared, strict=False))
    heads = []
    for number, (block, take) in enumerate(takes):
        try:
            arrays = with_retries(partial(few.compute, number, few.starts[number], values))
        except Exception as error:
            return Problem.of(block, error, this_worker())
        heads.append([_head(array, take) for array in arrays])
    return heads


def _head(array: Array, rows: int) -> Array:
    return np.array(array[:rows], dtype=array.dtype.newbyteorder("="))


def _numbers(head: Array, field: Field, block: int) -> Array:
    """Give rows as numbers; those of objects in a type that holds what a batch holds."""
    if head.dtype.kind in "biuf":
        return head
    what = f"block {block} of {field.name}"
    return joinable(head, field.dtype.newbyteorder("="), field.name, what)


def _first(function: Callable[[Array], Any], columns: tuple[Array, ...]) -> Any:
    return function(columns[0])


def _range(labels: Array, *, ignore: int) -> LabelRange | str:
    """Give the range of a block's labels, or say why they are none."""
    labels = np.asarray(labels)
    if misfit := find_misfit(labels, np.dtype(np.int64)):
        return misfit
    kept = labels[labels != ignore]
    return LabelRange(
        low=int(kept.min()) if kept.size else 0,
        high=int(kept.max()) if kept.size else -1,
        ignored=kept.size < labels.size,
    )
