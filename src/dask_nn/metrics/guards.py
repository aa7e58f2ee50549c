"""Blocks whose troubles are told by block and worker, and which are read again after a moment."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import dask.array as da
from dask._task_spec import Alias, GraphNode, Task, convert_legacy_graph
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.utils import ensure_dict, key_split
from distributed import Future, Reschedule, get_worker

from dask_nn.errors import DaskNNError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    type Key = Any

__all__ = ["guarded"]

_SEVERAL: Final = -1


def guarded(array: da.Array, *, pauses_s: Sequence[float]) -> da.Array:
    """Give an array whose blocks are computed as before, but fail with a name.

    Every task on the way to a block is tried again where a file system or store fails for a
    moment; what it raises in the end says which block could not be computed, and on which worker.

    Parameters
    ----------
    array : Array
        With one chunk along all axes but the first.
    pauses_s : sequence of float
        Between attempts.

    Returns
    -------
    Array
        Of the same keys. Its graph is optimized already, and a block is read and worked on by one
        task: Dask makes two of it because the second also needs what all blocks share.
    """
    keys = list(flatten(array.__dask_keys__()))
    optimized = da.Array.__dask_optimize__(array.dask, keys)
    graph: dict[Key, GraphNode] = convert_legacy_graph(ensure_dict(optimized))
    owners = _owners(graph, keys)
    _fuse(graph, keys, owners)
    pauses = tuple(pauses_s)
    layer: dict[Key, Any] = {
        key: _guard(node, owners.get(key, _SEVERAL), pauses) for key, node in graph.items()
    }
    layer |= _futures(array.dask)
    whole = HighLevelGraph({array.name: layer}, {array.name: set()})
    return da.Array(whole, array.name, array.chunks, dtype=array.dtype, meta=array._meta)  # noqa: SLF001


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
        for pause_s in (*self.pauses_s, None):
            try:
                return self.node(found)
            except Reschedule:  # no failure: of Dask's own
                raise
            except OSError as error:  # a file system or a store that fails for a moment
                if pause_s is None:
                    attempts = len(self.pauses_s) + 1
                    raise self._named(error, f" after {attempts} attempts") from error
                time.sleep(pause_s)
            except Exception as error:
                raise self._named(error) from error
        raise AssertionError(self.block)  # pragma: no cover

    def _named(self, error: Exception, often: str = "") -> DaskNNError:
        """Make an error that says what could not be computed, and where."""
        address = _address()
        where = f" on worker {address}" if address else ""
        text = f"{self._what()} could not be computed{where}{often}: "
        cause: BaseException | None = error
        kind: type[DaskNNError] = DataError
        if isinstance(error, DaskNNError):
            kind, cause = type(error), error.__cause__
            if self.block == _SEVERAL and str(error).startswith("block "):
                # One that is cut: its error names it, as it was given, and its field.
                text = f"{error} (found{where})" if where else str(error)
            else:
                text += str(error)
        else:
            text += f"{type(error).__name__}: {error}"
        if cause is not None and address:  # causes do not travel
            text += f"\n{''.join(traceback.format_exception(cause))}"
        return kind(text)

    def _what(self) -> str:
        if self.block != _SEVERAL:
            return f"block {self.block}"
        key = self.node.key
        number = f"block {key[1]} of " if isinstance(key, tuple) else ""
        return f"{number}{key_split(key)!r}, which several blocks need,"


def _guard(node: GraphNode, owner: int, pauses_s: tuple[float, ...]) -> GraphNode:
    if not _can_move(node):
        return node
    assert isinstance(node, Task)  # noqa: S101 - for the type checker
    needs = tuple(node.dependencies)
    return Task(
        node.key,
        _Guarded(node, needs, owner, pauses_s),
        *(Alias(key) for key in needs),
        _data_producer=node.data_producer,
    )


def _owners(graph: Mapping[Key, GraphNode], outputs: Sequence[Key]) -> dict[Key, int]:
    """Find for each key the only block that needs it, or that several do."""
    owners: dict[Key, int] = {}
    for number, output in enumerate(outputs):
        waiting = [output]
        while waiting:
            key = waiting.pop()
            before = owners.get(key)
            if key not in graph or before in (number, _SEVERAL):
                continue
            owners[key] = number if before is None else _SEVERAL
            waiting += graph[key].dependencies
    return owners


def _fuse(graph: dict[Key, GraphNode], outputs: Sequence[Key], owners: Mapping[Key, int]) -> None:
    """Join every output with the task before it, and so on, while there is one for it alone."""
    dependents = Counter(need for node in graph.values() for need in node.dependencies)
    for number, output in enumerate(outputs):
        while True:
            node = graph[output]
            own = [need for need in node.dependencies if owners.get(need) == number]
            if len(own) != 1 or dependents[own[0]] != 1 or not _can_move(graph[own[0]], node):
                break
            graph[output] = Task.fuse(graph.pop(own[0]), node, key=output)


def _can_move(*nodes: GraphNode) -> bool:
    """Tell whether tasks can be part of others: no tasks of a shuffle, no futures, no data."""
    return all(
        type(node) is Task
        and not any(
            isinstance(argument, Future) for argument in (*node.args, *node.kwargs.values())
        )
        for node in nodes
    )


def _futures(graph: HighLevelGraph) -> dict[Key, Future[Any]]:
    """Give what keeps persisted blocks on the cluster, which optimizing leaves out."""
    return {
        key: value
        for layer in graph.layers.values()
        if isinstance(getattr(layer, "mapping", None), dict)
        for key, value in layer.items()
        if isinstance(value, Future)
    }


def _address() -> str:
    try:
        return str(get_worker().address)
    except ValueError:  # no task of a cluster
        return ""
