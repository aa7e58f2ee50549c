"""The tasks of some steps of the graph engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
from distributed import Future

from dask_nn.collectives.tree import Node, fold_program
from dask_nn.controller import graph_tasks as tasks
from dask_nn.data.batches import batch_dtypes
from dask_nn.data.stream import Stream
from dask_nn.training.layout import LeafLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch
    from distributed import Client

    from dask_nn.controller.block_fetch import BlockSource
    from dask_nn.data.plan import Plan
    from dask_nn.training.spec import TrainingSpec

__all__ = ["StepTasks"]


class StepTasks:
    """Submits steps as tasks: a gradient for every shard, the additions of the tree, an update.

    Parameters
    ----------
    client : Client
        Of the cluster.
    spec : TrainingSpec
        What is trained.
    payload : Future
        The pickled spec on the workers.
    data : tuple of tuple, or Stream
        For each block the Dask key of each field, or how blocks are computed.
    run_id : str
        The run.
    suffix : str
        Ends the names of all tasks.
    """

    def __init__(
        self,
        client: Client,
        spec: TrainingSpec,
        *,
        payload: Future[Any],
        data: BlockSource,
        run_id: str,
        suffix: str = "",
    ) -> None:
        self._client = client
        self._spec = spec
        self._payload = payload
        self._blocks = BlockTasks(client, data, run_id)
        self._run_id = run_id
        self._suffix = suffix
        self._dtypes = batch_dtypes(spec.fields, LeafLayout(spec.model).floating)
        nodes = [Node(shard, shard + 1) for shard in range(spec.shards)]
        self._additions = fold_program(spec.shards, nodes)
        self._windows: _Windows | None = None

    def submit(
        self, plan: Plan, epoch: int, steps: range, state: Future[Any]
    ) -> tuple[Future[Any], list[Future[Any]]]:
        """Submit some steps; give the last state and, per shard, the metrics' partials."""
        if self._windows is None or self._windows.plan is not plan:
            self._windows = _Windows(
                self._client, plan, self._blocks, self._spec.fields, self._dtypes
            )
        windows = self._windows
        current: Any = state
        leaves: list[list[Any]] = [[] for _ in range(plan.shards)]
        for t in steps:
            step = epoch * plan.num_steps + t
            values: list[Any] = []
            for shard in range(plan.shards):
                segments = plan.segments(t, shard)
                part = tasks.StepShard(
                    step,
                    shard,
                    plan.count(t, shard),
                    plan.step_count(t),
                    tuple((lo, hi) for _, lo, hi in segments),
                )
                leaf = self._delayed("shard_gradient", f"{step}-{shard}")(
                    self._payload,
                    self._run_id,
                    current,
                    part,
                    [windows.future(shard, j, step) for j, _, _ in segments],
                )
                values.append(leaf)
                leaves[shard].append(leaf)
            total = self._add(values, step)
            current = self._delayed("update", str(step))(
                self._payload, self._run_id, current, total, plan.step_count(t)
            )
        wanted = [current]
        first = epoch * plan.num_steps + steps.start
        if self._spec.metrics:
            wanted += [
                self._delayed("metric_partials", f"{epoch}-{steps.start}-{shard}")(
                    self._payload, tasks.Place(self._run_id, first, shard), found
                )
                for shard, found in enumerate(leaves)
            ]
        futures = self._client.compute(wanted)
        return futures[0], futures[1:]

    def _add(self, values: list[Any], step: int) -> Any:
        """Add the leaves in the order of the fixed tree."""
        if not self._additions:
            return values[0]
        found = dict(enumerate(values))
        for number, (dst, left, right) in enumerate(self._additions):
            found[dst] = self._delayed("add_leaves", f"{step}-{number}")(
                tasks.Place(self._run_id, step), found[left], found[right]
            )
        return found[len(values)]

    def _delayed(self, name: str, suffix: str) -> Any:
        """Give a task of a readable name, as the dashboard shows it."""
        key = f"{name}-{self._run_id}-{suffix}{self._suffix}"
        function = dask.delayed(getattr(tasks, name), pure=False, traverse=True)
        return lambda *arguments: function(*arguments, dask_key_name=key)

    def drop_before(self, t: int) -> None:
        """Release the windows that no step from ``t`` on needs."""
        if self._windows is not None:
            self._windows.drop_before(t)


class BlockTasks:
    """The values of blocks, as futures that tasks take.

    Parameters
    ----------
    client : Client
        Of the cluster.
    data : tuple of tuple, or Stream
        For each block the Dask key of each field, or how blocks are computed.
    run_id : str
        The run.
    validates : bool
        Whether they are those of the validation data.
    """

    def __init__(
        self, client: Client, data: BlockSource, run_id: str, *, validates: bool = False
    ) -> None:
        self._client = client
        self._validates = validates
        self._run_id = run_id
        self._data = data
        self._starts = data.starts if isinstance(data, Stream) else []

    def values(self, block: int, *, step: int, shard: int = -1) -> list[Future[Any]] | Future[Any]:
        """Give the arrays of a block; a stream's are computed by a task, once for each call."""
        if not isinstance(self._data, Stream):
            return [Future(key, self._client) for key in self._data[block]]
        place = self.place(step, shard)
        order = cloudpickle.dumps(self._data.one(block))
        shared: list[Any] = [Future(key, self._client) for key in self._data.shared]
        return self._client.submit(
            tasks.compute_block, place, block, order, shared, self._validates, pure=False
        )

    def place(self, step: int, shard: int) -> tasks.Place:
        """Say for whom a task works."""
        return tasks.Place(self._run_id, step, shard)

    def all(self, step: int) -> Iterator[list[Future[Any]] | Future[Any]]:
        """Give every block."""
        number = len(self._data.recipes) if isinstance(self._data, Stream) else len(self._data)
        return (self.values(block, step=step) for block in range(number))


class _Windows:
    """The window tasks that some steps of an epoch need, submitted once each."""

    def __init__(
        self,
        client: Client,
        plan: Plan,
        blocks: BlockTasks,
        fields: tuple[Any, ...],
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        self._client = client
        self.plan = plan
        self._blocks = blocks
        self._fields = fields
        self._dtypes = dtypes
        self._futures: dict[tuple[int, int], Future[Any]] = {}

    def future(self, shard: int, j: int, step: int) -> Future[Any]:
        """Give the future of a window's rows, in the order in which they are taken.

        The step is the first that needs it.
        """
        if (shard, j) not in self._futures:
            window = self.plan.windows(shard)[j]
            order: np.ndarray[Any, Any] = self.plan.window_order(shard, j)
            blocks = [
                self._blocks.values(piece.block, step=step, shard=shard) for piece in window.pieces
            ]
            self._futures[shard, j] = self._client.submit(
                tasks.open_window,
                self._blocks.place(step, shard),
                window,
                order,
                blocks,
                tuple(self.plan.block_lengths[piece.block] for piece in window.pieces),
                self._fields,
                self._dtypes,
                pure=False,
            )
        return self._futures[shard, j]

    def drop_before(self, t: int) -> None:
        """Release the windows that no step from ``t`` on needs."""
        for shard, j in list(self._futures):
            if self.plan.windows(shard)[j].stop <= t * self.plan.shard_batch_size:
                del self._futures[shard, j]
