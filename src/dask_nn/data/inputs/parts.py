"""Dask arrays made of parts: one task for each, which gives the rows of one block."""

from __future__ import annotations

import operator
import pickle
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
from dask._task_spec import Alias
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.utils import ensure_dict
from distributed.client import futures_of

from dask_nn.data.inputs.plain import as_numpy
from dask_nn.data.problem import Problem, this_worker
from dask_nn.data.sending import gather, wait_while_able
from dask_nn.errors import ClusterError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dask.delayed import Delayed
    from distributed import Client, Future

__all__ = ["array_of_parts", "columns_of_parts", "delayed_parts", "head_of", "look_at"]


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
    graph = _with_own_keys(HighLevelGraph.from_collections(name, layer, dependencies=dependencies))
    rows = tuple(lengths) if lengths is not None else (np.nan,) * len(parts)
    chunks = (rows, *((length,) for length in like.shape[1:]))
    return da.Array(graph, name, chunks, dtype=like.dtype, meta=like[:0])


def _with_own_keys(graph: HighLevelGraph) -> HighLevelGraph:
    """Give every alias the key under which it stands.

    ``dask.dataframe.from_delayed`` with ``verify_meta=False`` gives it that of its target, by which
    Dask joins it with the tasks before it; what needs it would then miss it.
    """
    mended: dict[str, Any] = {}
    for name, layer in graph.layers.items():
        if not isinstance(layer, MaterializedLayer):
            continue
        aliases = {
            key: Alias(key, node.target)
            for key, node in layer.mapping.items()
            if isinstance(node, Alias) and node.key != key
        }
        if aliases:
            mended[name] = MaterializedLayer(
                {**layer.mapping, **aliases},
                annotations=layer.annotations,
                collection_annotations=layer.collection_annotations,
            )
    return HighLevelGraph({**graph.layers, **mended}, graph.dependencies) if mended else graph


def columns_of_parts(
    parts: Sequence[Delayed],
    first: Any,
    *,
    lengths: Sequence[int] | None = None,
) -> list[Any]:
    """Make the columns of parts that are tuples of arrays, dictionaries of arrays, or arrays.

    Parameters
    ----------
    parts : sequence of Delayed
        One for each block.
    first : Any
        What `head_of` gives of a part.
    lengths : sequence of int, optional
        Rows of each block, where they are known.

    Returns
    -------
    list of Array, or of dict of str to Array
        One for each member of the tuple; one alone if the parts are no tuples.
    """
    if not isinstance(first, tuple | list):
        return [_column(parts, first, _Taker(()), lengths)]
    return [_column(parts, member, _Taker((place,)), lengths) for place, member in enumerate(first)]


def look_at(
    part: Delayed,
    function: Callable[..., Any],
    client: Client | None,
    *,
    what: str,
    number: int = 0,
    **options: Any,
) -> Any:
    """Apply a function to one part, where it is computed: only what it returns travels.

    Parameters
    ----------
    part : Delayed
        To learn from it what all look like.
    function : callable
        ``function(value, what=what, **options)``.
    client : Client or None
        Of the cluster; this process if None.
    what : str
        How errors call the collection.
    number : int
        Of the part.

    Raises
    ------
    DataError
        If it cannot be computed; names it.
    """
    look = partial(function, what=what, **options)
    try:
        if client is None:
            return dask.delayed(look, pure=False)(part).compute()
        if futures_of(part):
            future = client.compute(dask.delayed(look, pure=False)(part))
            return _result(future, number, client, what)
        # Inside a task of its own: the scheduler would confuse its tasks with those of the whole,
        # which is optimized in another way.
        (optimized,) = dask.optimize(part)
        order = cloudpickle.dumps((look, ensure_dict(optimized.__dask_graph__()), part.key))
        (found,) = gather(client, [client.submit(_look, order, number, pure=False)])
    except (ClusterError, DataError):
        raise
    except Exception as error:
        raise Problem.of(number, error).error(what) from error
    if isinstance(found, Problem):
        raise found.error(what)
    return found


def _result(future: Future[Any], number: int, client: Client, what: str) -> Any:
    wait_while_able(client, [future])
    if future.status == "error" and not isinstance(future.exception(), DataError):
        raise Problem.of_future(number, future, client).error(what)
    return future.result()


def _look(order: bytes, number: int) -> Any:
    look, graph, key = pickle.loads(order)  # noqa: S301 - the client's own
    try:
        part = dask.get(graph, key)
    except Exception as error:
        return Problem.of(number, error, this_worker())
    return look(part)


def head_of(value: Any, *, what: str) -> Any:
    """Give what no rows of a part are: its arrays, shape (0, ...), in its tuples and dictionaries.

    Raises
    ------
    DataError
        If it holds anything but arrays of rows.
    """
    if isinstance(value, tuple | list):
        return tuple(_head(member, what) for member in value)
    return _head(value, what)


def _head(value: Any, what: str) -> Any:
    if isinstance(value, dict):
        return {key: _head(member, what) for key, member in value.items()}
    try:
        array = as_numpy(value)
    except ValueError as error:
        message = f"the parts of {what} must be arrays, or pairs of them: {error}"
        raise DataError(message) from error
    if array.ndim == 0 or array.dtype.kind == "O":
        message = (
            f"the parts of {what} must be arrays of rows, or pairs (X, y) of them, got "
            f"{type(value).__name__}"
        )
        raise DataError(message)
    return np.empty((0, *array.shape[1:]), array.dtype)


def _column(
    parts: Sequence[Delayed],
    first: Any,
    take: _Taker,
    lengths: Sequence[int] | None,
) -> Any:
    if isinstance(first, dict):
        return {
            key: _column(parts, value, _Taker((*take.path, key)), lengths)
            for key, value in first.items()
        }
    return array_of_parts(parts, take, like=first, lengths=lengths)


class _Taker:
    """Takes a member out of nested tuples and dictionaries; pickles, and has a name."""

    def __init__(self, path: tuple[Any, ...]) -> None:
        self.path = path

    def __call__(self, value: Any) -> Any:
        for step in self.path:
            value = operator.getitem(value, step)
        return as_numpy(value)


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
