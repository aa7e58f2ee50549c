"""Blocks whose troubles are told by block and worker, and which are read again after a moment."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import dask.array as da
from dask._task_spec import Alias, GraphNode, Task, convert_legacy_graph
from dask.base import tokenize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict
from distributed import Future, Reschedule, get_worker

from dask_nn.errors import DaskNNError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    type Key = Any

__all__ = ["guarded", "in_block"]

_SEVERAL: Final = -1


def guarded(arrays: Sequence[da.Array], *, pauses_s: Sequence[float]) -> list[da.Array]:
    """Give arrays whose blocks are computed as before, but fail with a name.

    Every task on the way to a block is tried again where a file system or store fails for a
    moment; what it raises in the end says which block could not be computed, and on which worker.

    Parameters
    ----------
    arrays : sequence of Array
        The same number of row chunks, one chunk along the other axes.
    pauses_s : sequence of float
        Between attempts.

    Returns
    -------
    list of Array
        Their graph is optimized already; equal arrays give equal keys.
    """
    keys_of = [list(flatten(array.__dask_keys__())) for array in arrays]
    merged = HighLevelGraph.merge(*(array.dask for array in arrays))
    optimized = da.Array.__dask_optimize__(merged, [key for keys in keys_of for key in keys])
    graph: dict[Key, GraphNode] = convert_legacy_graph(ensure_dict(optimized))
    owners = _owners(graph, list(zip(*keys_of, strict=True)))
    pauses = tuple(pauses_s)
    inner: dict[Key, Any] = {
        key: _guard(node, graph, owners.get(key, _SEVERAL), pauses) for key, node in graph.items()
    }
    inner |= _futures(merged)
    token = tokenize(*(array.name for array in arrays))
    below = f"dask-nn-guarded-{token}"
    found = []
    for place, (array, keys) in enumerate(zip(arrays, keys_of, strict=True)):
        name = f"dask-nn-block-{token}-{place}"
        layer = {(name, *key[1:]): Alias((name, *key[1:]), target=key) for key in keys}
        layers = HighLevelGraph({below: inner, name: layer}, {below: set(), name: {below}})
        found.append(da.Array(layers, name, array.chunks, dtype=array.dtype, meta=array._meta))  # noqa: SLF001
    return found


def in_block(number: int, error: Exception) -> Exception:
    """Make of what was raised while a block was worked on an error that names it."""
    if isinstance(error, DaskNNError):
        where = _where()
        return type(error)(f"block {number}{where}: {error}")
    return ModelError(_told(f"block {number} could not be processed", error))


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A task of a block.

    Parameters
    ----------
    node : Task
        What is done.
    needs : tuple
        The keys of what it is called with.
    block : int
        The block that needs it.
    pauses_s : tuple of float
        Between attempts.
    """

    node: Task
    needs: tuple[Key, ...]
    block: int
    pauses_s: tuple[float, ...]

    def __call__(self, *values: Any) -> Any:
        found = dict(zip(self.needs, values, strict=True))
        what = "what several blocks need" if self.block == _SEVERAL else f"block {self.block}"
        for pause_s in (*self.pauses_s, None):
            try:
                return self.node(found)
            except Reschedule:  # no failure: of Dask's own
                raise
            except OSError as error:  # a file system or a store that fails for a moment
                if pause_s is None:
                    times = f" after {len(self.pauses_s) + 1} attempts"
                    text = _told(f"{what} could not be computed", error, times)
                    raise DataError(text) from error
                time.sleep(pause_s)
            except DaskNNError as error:
                message = f"{what} could not be computed{_where()}: {error}"
                raise DataError(message) from error
            except Exception as error:
                raise DataError(_told(f"{what} could not be computed", error)) from error
        raise AssertionError(what)  # pragma: no cover


def _guard(
    node: GraphNode, graph: Mapping[Key, GraphNode], owner: int, pauses_s: tuple[float, ...]
) -> GraphNode:
    # Tasks of a shuffle have types of their own; futures must stay where Dask sees them.
    if type(node) is not Task or not node.dependencies <= graph.keys():
        return node
    needs = tuple(node.dependencies)
    return Task(
        node.key,
        _Guarded(node, needs, owner, pauses_s),
        *(Alias(key) for key in needs),
        _data_producer=node.data_producer,
    )


def _owners(graph: Mapping[Key, GraphNode], outputs: Sequence[tuple[Key, ...]]) -> dict[Key, int]:
    """Find for each key the only block that needs it, or that several do."""
    owners: dict[Key, int] = {}
    for number, keys in enumerate(outputs):
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            before = owners.get(key)
            if key not in graph or before in (number, _SEVERAL):
                continue
            owners[key] = number if before is None else _SEVERAL
            waiting += graph[key].dependencies
    return owners


def _futures(graph: HighLevelGraph) -> dict[Key, Future[Any]]:
    """Give what keeps persisted blocks on the cluster, which optimizing leaves out."""
    return {
        key: value
        for layer in graph.layers.values()
        if isinstance(getattr(layer, "mapping", None), dict)
        for key, value in layer.items()
        if isinstance(value, Future)
    }


def _where() -> str:
    try:
        return f" on worker {get_worker().address}"
    except ValueError:  # no task of a cluster
        return ""


def _told(text: str, error: Exception, times: str = "") -> str:
    where = _where()
    line = f"{text}{where}{times}: {type(error).__name__}: {error}"
    if not where:  # the cause stands beside it
        return line
    return f"{line}\n{''.join(traceback.format_exception(error))}"
