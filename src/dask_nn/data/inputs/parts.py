"""Dask arrays made of parts: one task for each, which gives the rows of one block."""

from __future__ import annotations

import operator
import pickle
import uuid
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict
from distributed.client import futures_of

from dask_nn.data.sending import gather
from dask_nn.errors import ClusterError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dask.delayed import Delayed
    from distributed import Client

__all__ = ["array_of_parts", "columns_of_parts", "compute_one", "delayed_parts"]


def array_of_parts(
    parts: Sequence[Delayed],
    take: Callable[[Any], Any],
    *,
    like: np.ndarray[Any, Any],
    lengths: Sequence[int] | None = None,
    name: str = "dask-nn-rows",
) -> da.Array:
    """Make a Dask array whose blocks are taken out of delayed values.

    Parameters
    ----------
    parts : sequence of Delayed
        One for each block.
    take : callable
        From the value of a part to its rows, shape (rows, ...).
    like : ndarray
        Shape (any number, ...): type and row shape of all blocks.
    lengths : sequence of int, optional
        Rows of each block, where they are known.
    name : str
        How the tasks are called on the dashboard.
    """
    name = f"{name}-{uuid.uuid4().hex}"
    zeros = (0,) * (like.ndim - 1)
    layer: dict[Any, Any] = {
        (name, number, *zeros): (take, part.key) for number, part in enumerate(parts)
    }
    dependencies: list[Any] = list(parts)
    graph = HighLevelGraph.from_collections(name, layer, dependencies=dependencies)
    rows = tuple(lengths) if lengths is not None else (np.nan,) * len(parts)
    chunks = (rows, *((length,) for length in like.shape[1:]))
    return da.Array(graph, name, chunks, dtype=like.dtype, meta=like[:0])


def columns_of_parts(
    parts: Sequence[Delayed],
    first: Any,
    *,
    lengths: Sequence[int] | None = None,
    what: str,
) -> list[Any]:
    """Make the columns of parts that are tuples of arrays, dictionaries of arrays, or arrays.

    Parameters
    ----------
    parts : sequence of Delayed
        One for each block.
    first : Any
        The value of the first part.
    lengths : sequence of int, optional
        Rows of each block, where they are known.
    what : str
        How errors call the collection.

    Returns
    -------
    list of Array, or of dict of str to Array
        One for each member of the tuple; one alone if the parts are no tuples.
    """
    if not isinstance(first, tuple | list):
        return [_column(parts, first, _itself, lengths, what)]
    return [
        _column(parts, member, _Taker((place,)), lengths, what)
        for place, member in enumerate(first)
    ]


def compute_one(part: Delayed, client: Client | None, what: str) -> Any:
    """Compute one part, to learn what it looks like.

    Raises
    ------
    DataError
        If it cannot be computed.
    """
    try:
        if client is None:
            return part.compute()
        if futures_of(part):
            return client.compute(part).result()
        # Inside a task of its own: the scheduler would confuse its tasks with those of the whole,
        # which is optimized in another way.
        (optimized,) = dask.optimize(part)
        order = cloudpickle.dumps((ensure_dict(optimized.__dask_graph__()), part.key))
        return gather(client, [client.submit(_compute, order, pure=False)])[0]
    except ClusterError:
        raise
    except Exception as error:
        message = f"the first part of {what} could not be computed: {error!r}"
        raise DataError(message) from error


def _compute(order: bytes) -> Any:
    graph, key = pickle.loads(order)  # noqa: S301 - the client's own
    return dask.get(graph, key)


def _column(
    parts: Sequence[Delayed],
    first: Any,
    take: Callable[[Any], Any],
    lengths: Sequence[int] | None,
    what: str,
) -> Any:
    if isinstance(first, dict):
        place = take.path if isinstance(take, _Taker) else ()
        return {
            key: _column(parts, value, _Taker((*place, key)), lengths, what)
            for key, value in first.items()
        }
    try:
        like = np.asarray(_plain(first))
    except ValueError as error:
        message = f"the parts of {what} must be arrays, or pairs of them: {error}"
        raise DataError(message) from error
    if like.ndim == 0 or like.dtype.kind == "O":
        message = (
            f"the parts of {what} must be arrays of rows, or pairs (X, y) of them, got "
            f"{type(first).__name__}"
        )
        raise DataError(message)
    return array_of_parts(parts, take, like=like, lengths=lengths)


class _Taker:
    """Takes a member out of nested tuples and dictionaries; pickles, and has a name."""

    def __init__(self, path: tuple[Any, ...]) -> None:
        self.path = path

    def __call__(self, value: Any) -> Any:
        for step in self.path:
            value = operator.getitem(value, step)
        return np.asarray(_plain(value))


def _itself(value: Any) -> Any:
    return np.asarray(_plain(value))


def _plain(value: Any) -> Any:
    """Give torch tensors and frames as what NumPy reads."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return value


def delayed_parts(value: Any) -> list[Delayed] | None:
    """Give the parts of a list of Delayed, or of pairs of them; None if it is something else."""
    from dask.delayed import Delayed

    if isinstance(value, Delayed):
        return [value]
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(item, Delayed) for item in value):
        return list(value)
    if all(
        isinstance(item, list | tuple) and item and all(isinstance(m, Delayed) for m in item)
        for item in value
    ):
        return [dask.delayed(tuple(item), pure=False) for item in value]
    return None
